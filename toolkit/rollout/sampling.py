"""Choosing the next token: settings, a seed for each text, and one pass over the logits where no filter needs more.

Shapes: B rows, V the vocabulary's real size, K candidates, L tokens said so far (prompt included).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from deepspeed.runtime.rollout import SamplingConfig
from torch import Tensor

from toolkit.seeds import philox
from toolkit.settings import SamplingSettings

BLOCK = 256  # entries whose sum is one number of the outer cumulative distribution
CANDIDATES = 256  # where top-p first looks for its nucleus


@dataclass
class SeededSampling(SamplingConfig):
    """DeepSpeed's sampling settings and a seed for each prompt, so that a text depends neither on the rows generated
    beside it nor on the number of ranks. temperature <= 0 is greedy.

    min_p: tokens below this part of the likeliest token's probability are not chosen (arXiv 2407.01082); 0 is off.
    repetition_penalty: logits of tokens already in prompt or text are divided by it where positive, multiplied where
    negative (arXiv 1909.05858); 1 is off.
    no_repeat_ngram_size: a token that would end an n-gram of this size that is already in prompt or text is not chosen
    (arXiv 1705.04304, as transformers has it); 0 is off.
    """

    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seeds: Sequence[int] = ()

    @classmethod
    def of(cls, settings: SamplingSettings, max_new_tokens: int, seeds: Sequence[int]) -> Self:
        """The `settings` of a config, for texts with these seeds."""
        names = [f.name for f in fields(SamplingSettings)]
        return cls(max_new_tokens, seeds=seeds, **{name: getattr(settings, name) for name in names})

    @property
    def looks_back(self) -> bool:
        """Whether a rule asks which tokens came before."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0


def sequence_seed(seed: int, step: int, row: int) -> int:
    """The seed of one generated text: of row `row` of the global batch, whichever rank it is on."""
    return int(philox(seed, step, row).random_raw())


def uniform_draws(seed: int, count: int) -> np.ndarray:
    """The float64 draws in [0, 1) that choose the tokens of the text with this seed."""
    return np.random.Generator(philox(seed)).random(count)


def choose_tokens(
    logits_BV: Tensor,
    sampling: SeededSampling,
    draws_B: Tensor,
    seen_BL: Tensor | None = None,
    length_B: Tensor | None = None,
) -> Tensor:
    """The next token of each row, int64 [B].

    Order of the rules: repetition penalty on the tokens in `seen_BL`, repeated n-grams of its first `length_B` tokens
    (None: of all), temperature, top-k, nucleus (top-p, arXiv 1904.09751), min-p; then the inverse of the cumulative
    distribution at `draws_B` (float64 in [0, 1)): in the order of ids, or where top-k or top-p is on, likeliest first.
    The likeliest token that no n-gram forbids always stays. Greedy for temperature <= 0. `logits_BV` is fp32 and may
    be changed. What `seen_BL` holds after `length_B` has to be in the row anyway.
    """
    # What was said before: tokens become less likely, or are forbidden.
    if sampling.repetition_penalty != 1 and seen_BL is not None:
        said_BL, penalty = logits_BV.gather(1, seen_BL), sampling.repetition_penalty
        said_BL = torch.where(said_BL > 0, said_BL / penalty, said_BL * penalty)
        logits_BV = logits_BV.scatter(1, seen_BL, said_BL)
    if sampling.no_repeat_ngram_size and seen_BL is not None:
        if length_B is None:
            length_B = seen_BL.new_full((len(seen_BL),), seen_BL.shape[1])
        logits_BV = _without_repeats(logits_BV, sampling.no_repeat_ngram_size, seen_BL, length_B)
    if sampling.temperature <= 0:
        return logits_BV.argmax(-1)
    # The likeliest tokens in order, where a filter asks for them.
    probs_BV = torch.softmax(logits_BV if sampling.temperature == 1 else logits_BV / sampling.temperature, -1)
    has_top_k = 0 < sampling.top_k < probs_BV.shape[1]
    if has_top_k or sampling.top_p < 1:
        probs_BK, ids_BK = _nucleus(probs_BV, sampling.top_k if has_top_k else None, sampling.top_p)
        if sampling.min_p > 0:
            probs_BK = probs_BK.masked_fill(probs_BK < sampling.min_p * probs_BK[:, :1], 0)
        return ids_BK.gather(1, _inverse(probs_BK.double().cumsum(-1), draws_B[:, None])).squeeze(1)
    # Otherwise one pass over the probabilities, in the order of ids.
    if sampling.min_p > 0:
        probs_BV = probs_BV.masked_fill(probs_BV < sampling.min_p * probs_BV.amax(-1, keepdim=True), 0)
    return _draw(probs_BV, draws_B)


def _without_repeats(logits_BV: Tensor, size: int, seen_BL: Tensor, length_B: Tensor) -> Tensor:
    """Minus infinity where a token would make the row's last `size` tokens an n-gram that it holds already."""
    starts = seen_BL.shape[1] - size + 1  # places where an n-gram can begin
    if starts < 1:
        return logits_BV
    place = torch.arange(seen_BL.shape[1], device=seen_BL.device)
    last_BK = seen_BL.gather(1, (length_B[:, None] - size + 1 + place[: size - 1]).clamp(min=0))
    repeats_BL = place[:starts] + size <= length_B[:, None]
    for k in range(size - 1):
        repeats_BL = repeats_BL & (seen_BL[:, k : k + starts] == last_BK[:, k : k + 1])
    # One more column, for the tokens that nothing forbids: no size here depends on what was found.
    rows, spare = logits_BV.shape
    ends_BL = torch.where(repeats_BL, seen_BL[:, size - 1 :].clamp(max=spare), spare)
    forbidden_BV = torch.zeros(rows, spare + 1, dtype=torch.bool, device=logits_BV.device)
    return logits_BV.masked_fill(forbidden_BV.scatter_(1, ends_BL, True)[:, :spare], -torch.inf)


def _nucleus(probs_BV: Tensor, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor]:
    """(probabilities, ids) of the tokens that stay, likeliest first; the probabilities of those that go are 0."""
    size = probs_BV.shape[1]
    count = min(top_k or CANDIDATES, size)
    while True:  # a whole sort of a vocabulary takes longer than a small student's forward pass
        probs_BK, ids_BK = probs_BV.topk(count, -1)
        mass_BK = probs_BK.double().cumsum(-1)
        total = mass_BK[:, -1:] if top_k else 1.0
        if top_k or count == size or bool((mass_BK[:, -1] >= top_p).all()):
            return probs_BK.masked_fill(mass_BK - probs_BK >= top_p * total, 0), ids_BK
        count = min(4 * count, size)


def _draw(weights_BV: Tensor, draws_B: Tensor) -> Tensor:
    """Index drawn with probability weights / sum: first a block, then inside it, so that no [B, V] is accumulated."""
    rows, size = weights_BV.shape
    whole = size // BLOCK
    sums = weights_BV[:, : whole * BLOCK].view(rows, whole, BLOCK).sum(-1).double()
    rest = weights_BV[:, whole * BLOCK :].sum(-1, keepdim=True).double()
    outer = torch.cat([sums, rest], 1).cumsum(-1)
    block_B1 = _inverse(outer, draws_B[:, None])
    below = torch.where(block_B1 > 0, outer.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    inside = (draws_B[:, None] * outer[:, -1:] - below) / (outer.gather(1, block_B1) - below)
    ids_BK = block_B1 * BLOCK + torch.arange(BLOCK, device=weights_BV.device)
    weights_BK = weights_BV.gather(1, ids_BK.clamp(max=size - 1)).masked_fill(ids_BK >= size, 0)
    return ids_BK.gather(1, _inverse(weights_BK.double().cumsum(-1), inside)).squeeze(1)


def _inverse(cumulative: Tensor, at: Tensor) -> Tensor:
    """First index whose cumulative sum exceeds `at` (in [0, 1]) times the total; never one without weight."""
    total = cumulative[:, -1:].contiguous()
    target = torch.minimum(at.clamp(min=0) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)
