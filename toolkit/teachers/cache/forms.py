"""What is kept of a distribution over the vocabulary, and what the loss gets back from it.

Legend: N positions, n of a tile, V vocabulary, K ids a position, U ids of all positions together, H hidden size.

Numbers have 16 bits. A log-probability in fp16 has a relative error of 2^-11, so p is off by p |log p| 2^-11, at most
1.8e-4, and near p = 1, where fixed point or bf16 would round to 1, by next to nothing. The tail is stored as the
logarithm of its mass, summed from the tokens that are left out and not by 1 - sum, so small ones keep their digits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toolkit.divergences import Head, Hidden, TopKTeacher, default_budget_mib
from toolkit.divergences.products import Projection
from toolkit.divergences.spec import Divergence
from toolkit.divergences.top_k import WITH_TOP_K

#: of a tile's working memory, per logit: products, logits, log-probabilities (fp32), their exponentials and sums (fp64)
BYTES_PER_LOGIT = 32
MAX_DRAWS = 2**16 - 1
SMALLEST_MASS = torch.finfo(torch.float64).tiny  # of a tail that has any: a reverse KL to nothing is infinite
MAX_VOCABULARY = 2**24

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Form:
    """Either the `top_k` most probable tokens with the mass of all others, or `draws` random ones with their counts.
    `seed` is that of the draws.

    Draws are stratified: one in each of `draws` equal parts of the cumulative distribution. Counts / draws has the
    expectation p, as independent draws have (random sampling distillation, arXiv 2503.16870), with a variance that is
    never above theirs. Beside them is the entropy of p, so that the forward KL is unbiased as well as its gradient.
    """

    top_k: int = 0
    draws: int = 0
    seed: int = 0

    def validate(self, vocabulary_size: int) -> None:
        """Raises ValueError for what cannot be stored."""
        if (self.top_k > 0) == (self.draws > 0):
            raise ValueError(f"--top-k {self.top_k} with --draws {self.draws}: give one of them, a number of 1 or more")
        if self.top_k > vocabulary_size:
            raise ValueError(f"--top-k {self.top_k}, but the vocabulary has {vocabulary_size} entries; lower it")
        if self.draws > MAX_DRAWS:
            raise ValueError(f"--draws {self.draws} is above {MAX_DRAWS}, what 16 bits count; lower it")
        if vocabulary_size > MAX_VOCABULARY:
            raise ValueError(f"the vocabulary has {vocabulary_size} entries, above the {MAX_VOCABULARY} of 24-bit ids")

    def __str__(self) -> str:
        return f"top {self.top_k}" if self.top_k else f"{self.draws} draws"

    def check_divergence(self, divergence: Divergence) -> None:
        """Raises ValueError for a divergence that cannot be computed, or not without bias, from this form."""
        name, alpha = divergence.name, divergence.alpha
        if name not in WITH_TOP_K:
            needs = "needs the teacher's whole distribution"
            raise ValueError(f"loss.divergence = {name!r} {needs}; from a cache: {', '.join(WITH_TOP_K)}")
        if self.draws and name != "fkl" and not (name == "skl" and alpha == 0):
            raise ValueError(
                f"loss.divergence = {name!r} with a cache of {self.draws} draws: counts stand for probabilities only "
                "where these enter linearly, which is fkl alone; use fkl, or a cache made with --top-k"
            )

    def arrays(self, log_p_nV: Tensor, uniforms: np.ndarray | None) -> Arrays:
        """What is stored of each row of `log_p_nV` (overwritten): per position, or per id ("U_..."). uniforms: [n,
        draws] in [0, 1), for draws alone."""
        # Top k: the most probable tokens are kept, and the mass of all others.
        if self.top_k:
            log_probs_nK, ids_nK = log_p_nV.topk(self.top_k)
            log_tail_n = log_p_nV.scatter_(1, ids_nK, -torch.inf).logsumexp(-1)
            return {
                "U_ids": _numpy(ids_nK).ravel(), "U_log_probs": _half(log_probs_nK).ravel(),
                "log_tails": _half(log_tail_n),
            }  # fmt: skip

        # Draws: a point falls into each part of the cumulative distribution, and the tokens that are hit are counted.
        p_nV = log_p_nV.exp()
        entropy_n = -(p_nV * log_p_nV).sum(-1)
        ends_nV = p_nV.double().cumsum_(-1)  # in fp32 the sum of 10^5 probabilities would move the draws
        n, v = ends_nV.shape
        strata = torch.arange(self.draws, device=ends_nV.device)
        points_nD = (strata + torch.from_numpy(uniforms).to(ends_nV.device)) / self.draws * ends_nV[:, -1:]
        ids_nD = torch.searchsorted(ends_nV, points_nD, right=True).clamp_(max=v - 1)
        rows_n1 = torch.arange(n, device=ids_nD.device).unsqueeze(-1) * v
        flat, counts = (rows_n1 + ids_nD).flatten().unique_consecutive(return_counts=True)
        return {
            "U_ids": _numpy(flat % v), "U_counts": _numpy(counts), "distinct": np.bincount(_numpy(flat // v)),
            "entropies": _half(entropy_n),
        }  # fmt: skip

    def packed(self, arrays: Arrays, vocabulary_size: int) -> Arrays:
        """With every integer in as few bytes as hold it."""
        count = np.uint8 if self.draws < 2**8 else np.uint16
        types = {"U_counts": count, "distinct": count}
        found = {name: array.astype(types.get(name, array.dtype), copy=False) for name, array in arrays.items()}
        return found | {"U_ids": pack_ids(arrays["U_ids"], vocabulary_size)}

    def signal(self, arrays: Mapping[str, np.ndarray], vocabulary_size: int) -> TopKTeacher:
        """The teacher of the positions whose packed arrays these are."""
        # Top k: the probabilities that were stored are brought to a sum of 1.
        ids = unpack_ids(arrays["U_ids"])
        if self.top_k:
            log_probs_NK = torch.from_numpy(arrays["U_log_probs"].astype(np.float32)).view(-1, self.top_k)
            log_tail_N1 = torch.from_numpy(arrays["log_tails"].astype(np.float32)).unsqueeze(-1)
            both = torch.cat([log_probs_NK, log_tail_N1], -1).log_softmax(-1)  # rounding left the sum near 1
            tail_mass_N = both[:, -1].double().exp()  # fp32 has nothing below e^-104
            tail_mass_N = tail_mass_N.clamp(min=SMALLEST_MASS).where(log_tail_N1[:, 0] != -torch.inf, 0.0)
            return TopKTeacher(torch.from_numpy(ids).view(-1, self.top_k), both[:, :-1], tail_mass_N)

        # Draws: positions have different numbers of tokens, so the shorter ones are filled up with others of no mass.
        distinct_N = arrays["distinct"].astype(np.int64)
        n, k = len(distinct_N), int(distinct_N.max(initial=1))
        is_drawn_NK = np.arange(k) < distinct_N[:, None]
        ids_NK, p_NK = np.zeros((n, k), np.int64), np.zeros((n, k), np.float32)
        ids_NK[is_drawn_NK], p_NK[is_drawn_NK] = ids, arrays["U_counts"] / self.draws
        _fill_with_others(ids_NK, is_drawn_NK, vocabulary_size)
        entropy_N = torch.from_numpy(arrays["entropies"].astype(np.float32))
        p = torch.from_numpy(p_NK)
        offset_N = torch.special.entr(p).sum(-1) - entropy_N
        return TopKTeacher(torch.from_numpy(ids_NK), p.log(), torch.zeros(n), offset_N)


def pack_ids(ids: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """uint16 where that holds every id, else three bytes each, lowest first: uint8 [U, 3]."""
    if vocabulary_size <= 2**16:
        return ids.astype(np.uint16)
    return np.ascontiguousarray(ids.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3])


def unpack_ids(packed: np.ndarray) -> np.ndarray:
    """int64 [U]"""
    if packed.ndim == 1:
        return packed.astype(np.int64)
    wide = np.zeros((len(packed), 4), np.uint8)
    wide[:, :3] = packed
    return wide.view("<u4").ravel().astype(np.int64)


def log_prob_tiles(
    hidden_NH: Tensor, head: Head, vocabulary_size: int, temperature: float, budget_mib: float | None = None
) -> Iterator[Tensor]:
    """fp32 log-probabilities [n, V] of a few positions at a time, within the budget (one position at least)."""
    budget_mib = default_budget_mib(hidden_NH.device, budget_mib)
    rows = max(1, int(budget_mib * 2**20) // (vocabulary_size * BYTES_PER_LOGIT))
    if hidden_NH.device.type == "cpu":
        hidden_NH = hidden_NH.float()  # a bf16 product would round logits to bf16; this is done once, so it may be slow
    projection = Projection(Hidden(hidden_NH, head), torch.float32)
    rows = min(rows, max(1, len(hidden_NH)))
    projection.allocate(rows=rows, columns=vocabulary_size, block_bytes=int(budget_mib * 2**18))
    columns = range(vocabulary_size)
    head = head.part(columns, torch.float32)
    for start in range(0, len(hidden_NH), rows):
        products_nV = projection.project(slice(start, start + rows), columns)
        yield (head.to_logits_(products_nV.float()) / temperature).log_softmax(-1)


def _fill_with_others(ids_NK: np.ndarray, is_set_NK: np.ndarray, vocabulary_size: int) -> None:
    """Gives the places that are not set ids that their row does not hold: the loss wants different ones. Of the lowest
    2 K ids a row can hold K at most, so enough are left."""
    n, k = ids_NK.shape
    is_taken = np.zeros((n, min(2 * k, vocabulary_size)), bool)
    row, column = np.nonzero(is_set_NK & (ids_NK < is_taken.shape[1]))
    is_taken[row, ids_NK[row, column]] = True
    free_first = np.argsort(is_taken, axis=1, kind="stable")[:, :k]
    # The j-th place that is not set gets the j-th id that is free.
    place_NK = np.cumsum(~is_set_NK, axis=1) - 1
    row, column = np.nonzero(~is_set_NK)
    ids_NK[row, column] = free_first[row, place_NK[row, column]]


def _half(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float16).cpu().numpy()


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
