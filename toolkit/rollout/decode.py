"""The decode loop: rows of ragged length side by side, in a cache that is allocated once.

Tokens of all rows lie behind each other in one line, [1, N]: a prompt pass computes no padding, a step is such a pass
of one token a row. A finished row's place goes to the last row, and then to a waiting prompt.

Shapes: N tokens of this pass, R rows of the cache, B rows running now, C tokens a row may hold, T tokens of a text or a
prompt, V the vocabulary's real size.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from toolkit.models.head import logits_of, stack_of
from toolkit.models.vocabulary import Vocabulary
from toolkit.rollout.cache import ATTENTION, RaggedCache, Seq2SeqCache, row_tokens, serving
from toolkit.rollout.sampling import SeededSampling, choose_tokens, uniform_draws


@dataclass
class DecodeStats:
    """What one rank did: passes of the model over prompts and over one token a row, and the most rows at once."""

    prefills: int = 0
    steps: int = 0
    tokens: int = 0
    peak_rows: int = 0
    cache_bytes: int = 0


class Passes:
    """The model's passes over the rows of a cache: what `decode` has to know of a kind of model. All give hidden_BH.
    begins: for each prompt the tokens that its row starts with. attending: the configuration of the layers that attend
    by way of the cache."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[np.ndarray], rows: int, max_new_tokens: int):
        self.model, self.begins, self.device, self.attending = model, prompts, model.device, model.config
        self.room = row_tokens(max((len(begin) for begin in self.begins), default=1) + max_new_tokens)
        self.cache: RaggedCache | Seq2SeqCache = RaggedCache(rows, self.room)

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Inside, the model's layers attend by way of the cache."""
        kept, self.attending._attn_implementation = self.attending._attn_implementation, ATTENTION
        try:
            yield
        finally:
            self.attending._attn_implementation = kept

    def prompt(self, new: list[int], first: int) -> Tensor:
        """After the prompts `new`, which become the rows `first`, `first` + 1, ... of the cache."""
        begins = [self.begins[index] for index in new]
        lengths = [len(begin) for begin in begins]
        row_N = torch.repeat_interleave(torch.arange(len(begins)), torch.tensor(lengths)).to(self.device) + first
        position_N = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        self.cache.start_pass(row_N, position_N, lengths, is_prompt=True)
        ids_N = torch.from_numpy(np.concatenate(begins).astype(np.int64)).to(self.device)
        hidden_NH = _hidden(self.model, self.cache, ids_N, position_N)
        return hidden_NH[torch.tensor(lengths, device=self.device).cumsum(0) - 1]

    def step(self, ids_B: Tensor, position_B: Tensor, lengths: list[int]) -> Tensor:
        """After one more token in each of the rows 0 to B - 1."""
        self.cache.start_pass(torch.arange(len(ids_B), device=self.device), position_B, lengths, is_prompt=False)
        return _hidden(self.model, self.cache, ids_B, position_B)

    def idle(self, is_prompt: bool) -> Tensor:
        """A pass that nobody reads."""
        spare, token = RaggedCache(1, 16), torch.zeros(1, dtype=torch.long, device=self.device)
        spare.start_pass(token, token, [1], is_prompt=True)
        return _hidden(self.model, spare, token, token)


def is_supported(model: PreTrainedModel) -> bool:
    """Whether `decode` knows this model's attention: transformers' interface, full or sliding, no caps, no sinks."""
    config = model.config.get_text_config()
    return (
        getattr(model, "_supports_attention_backend", False)
        and "position_ids" in inspect.signature(stack_of(model).forward).parameters
        and {*(getattr(config, "layer_types", None) or ())} <= {"full_attention", "sliding_attention"}
        and getattr(config, "attn_logit_softcapping", None) is None
        and not any(name.endswith("sinks") for name, _ in model.named_parameters())
    )


class _Texts:
    """What the rows of the cache say, a line for each: the tokens said, their number, the length of prompt and text,
    the next input, the draws that choose tokens, and where a rule asks for it the ids seen."""

    def __init__(self, rows: int, room: int, sampling: SeededSampling, device: torch.device):
        self.sampling, most = sampling, sampling.max_new_tokens
        self.tokens_RT = torch.zeros(rows, most, dtype=torch.long, device=device)
        self.said_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.length_R, self.next_R = torch.zeros_like(self.said_R), torch.zeros_like(self.said_R)
        self.draws_RT = torch.zeros(rows, most, dtype=torch.float64, device=device)
        self.seen_RC = torch.zeros(rows, room if sampling.looks_back else 1, dtype=torch.long, device=device)

    def begin(self, at_B: Tensor, begins: Sequence[np.ndarray], seeds: Sequence[int]) -> None:
        """The rows `at_B` begin anew, each with these ids."""
        draws_BT = np.stack([uniform_draws(seed, self.sampling.max_new_tokens) for seed in seeds])
        self.draws_RT[at_B] = torch.from_numpy(draws_BT).to(at_B.device)
        self.said_R[at_B], self.length_R[at_B] = 0, torch.tensor([len(begin) for begin in begins], device=at_B.device)
        if self.sampling.looks_back:
            for row, begin in zip(at_B.tolist(), begins, strict=True):
                ids = torch.from_numpy(begin.astype(np.int64)).to(at_B.device)
                self.seen_RC[row] = ids[0]  # behind the row's tokens stands its first one, which is there anyway
                self.seen_RC[row, : len(ids)] = ids

    def say(self, at_B: Tensor, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the next token of the rows `at_B`. Returns it, and the row's number of tokens, both int64 [B]."""
        said_B, length_B = self.said_R[at_B], self.length_R[at_B]
        seen_BC = self.seen_RC[at_B] if self.sampling.looks_back else None
        next_B = choose_tokens(logits_BV, self.sampling, self.draws_RT[at_B, said_B], seen_BC, length_B)
        self.tokens_RT[at_B, said_B], self.next_R[at_B] = next_B, next_B
        if self.sampling.looks_back:
            self.seen_RC[at_B, length_B] = next_B
        self.said_R[at_B] += 1
        self.length_R[at_B] += 1
        return next_B, said_B + 1

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy the lines `source` to the lines `target`, both int64 [M]."""
        for lines in (self.tokens_RT, self.said_R, self.length_R, self.next_R, self.draws_RT, self.seen_RC):
            lines[target] = lines[source]


@torch.no_grad()
def decode(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], sampling: SeededSampling, vocabulary: Vocabulary, rows: int,
    anyone_going: Callable[[bool], bool] | None = None, passes_of: type[Passes] = Passes,
) -> tuple[list[np.ndarray], DecodeStats]:  # fmt: skip
    """What `model` says after each prompt (int32 [L], EOS included where it came), order kept.

    rows: running at once, at most. A row that ends is replaced by a waiting prompt, shortest prompts first.
    anyone_going: whether any rank goes on, from whether this one does. With it ranks make passes in step, those that
    are done with one token that nobody reads: for a model whose every pass is a collective.
    """
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))[::-1]
    rows = min(rows, max(1, len(prompts)))
    passes = passes_of(model, prompts, rows, sampling.max_new_tokens)
    texts = _Texts(rows, passes.room, sampling, passes.device)
    found, stats = [np.zeros(0, np.int32)] * len(prompts), DecodeStats()
    eos_ids = torch.tensor(vocabulary.eos_ids, device=passes.device)
    every = torch.arange(rows, device=passes.device)
    running: list[int] = []  # which prompt each row is
    lengths: list[int] = []  # tokens that each row holds, without asking the device
    with passes.attention():
        while anyone_going(bool(waiting or running)) if anyone_going else waiting or running:
            # New prompts come in once a quarter of the rows is free: a pass for each of them would cost more.
            free = rows - len(running)
            fills = bool(waiting) and (not running or 4 * free >= rows)
            # Where the two kinds of passes differ, ranks whose passes are collectives agree on which it is.
            anyone_fills = anyone_going(fills) if anyone_going and vocabulary.layout.steps_differ else fills
            if not (waiting or running) or (anyone_fills and not fills):
                logits_of(model, passes.idle(anyone_fills), None)
                continue
            # One pass of the model: over new prompts, or over the last token of each running row.
            if fills:
                first, new = len(running), [waiting.pop() for _ in range(min(free, len(waiting)))]
                running += new
                begins = [passes.begins[index] for index in new]
                lengths += [len(begin) for begin in begins]
                logits_BV = logits_of(model, passes.prompt(new, first), vocabulary.size)
                at_B = every[first : len(running)]
                texts.begin(at_B, begins, [sampling.seeds[index] for index in new])
                stats.prefills += 1
            else:
                at_B = every[: len(running)]
                lengths = [length + 1 for length in lengths]
                hidden_BH = passes.step(texts.next_R[at_B], texts.length_R[at_B] - 1, lengths)
                logits_BV = logits_of(model, hidden_BH, vocabulary.size)
                stats.steps += 1
            next_B, said_B = texts.say(at_B, logits_BV)
            stats.tokens += len(at_B)
            stats.peak_rows = max(stats.peak_rows, len(running))
            # Texts that end are taken out, and the last rows move into the gaps.
            ended = at_B[torch.isin(next_B, eos_ids) | (said_B >= sampling.max_new_tokens)].tolist()
            if ended:
                tokens, said = texts.tokens_RT[ended].cpu().numpy(), texts.said_R[ended].tolist()
                for row, text, count in zip(ended, tokens, said, strict=True):
                    found[running[row]] = text[:count].astype(np.int32)
                if moves := _close_gaps(ended, running, lengths):
                    source, target = torch.tensor(moves, device=passes.device).unbind(1)
                    passes.cache.move_rows(source, target)
                    texts.move_rows(source, target)
    stats.cache_bytes = passes.cache.bytes
    return found, stats


def _close_gaps(ended: list[int], *per_row: list[int]) -> list[tuple[int, int]]:
    """Take the rows that ended out of each of these lists, where the last rows take their places. Returns these moves,
    as (from, to)."""
    count = len(per_row[0])
    left = count - len(ended)
    target = [row for row in ended if row < left]
    source = sorted({*range(left, count)} - {*ended})
    for values in per_row:
        for last, row in zip(source, target, strict=True):
            values[row] = values[last]
        del values[left:]
    return list(zip(source, target, strict=True))


@torch.no_grad()
def idle_pass(model: PreTrainedModel) -> None:
    """One token that nobody reads, outside of `decode`: for the collectives of the ranks that still generate."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    logits_of(model, stack_of(model)(input_ids=token, use_cache=False).last_hidden_state[:, -1], None)


def _hidden(model: PreTrainedModel, cache: RaggedCache | Seq2SeqCache, ids_N: Tensor, position_N: Tensor) -> Tensor:
    caching = {"use_cache": True, _cache_name(model): cache}
    with serving(cache):
        return stack_of(model)(input_ids=ids_N[None], position_ids=position_N[None], **caching).last_hidden_state[0]


def _cache_name(model: PreTrainedModel) -> str:
    """transformers renames `past_key_values` to `cache`, model by model."""
    return "cache" if "cache" in inspect.signature(stack_of(model).forward).parameters else "past_key_values"


@torch.no_grad()
def plain_decode(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], sampling: SeededSampling, vocabulary: Vocabulary, rows: int,
    anyone_going: Callable[[bool], bool] | None = None,
) -> tuple[list[np.ndarray], DecodeStats]:  # fmt: skip
    """`decode` for any causal model of transformers, and its readable twin: padded to the left, a cache that grows."""
    device, eos_ids = model.device, torch.tensor(vocabulary.eos_ids)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found, stats = [np.zeros(0, np.int32)] * len(prompts), DecodeStats()
    parts = [order[start : start + rows] for start in range(0, len(order), rows)]
    part: list[int] | None = None  # the prompts of the batch at hand
    while anyone_going(bool(parts or part)) if anyone_going else parts or part:
        if part is None and not parts:  # another rank still needs this one in its collectives
            idle_pass(model)
            continue
        # A batch of prompts begins.
        if part is None:
            part, said, cache = parts.pop(0), 0, DynamicCache(config=model.config)
            begins = [prompts[index].tolist() for index in part]
            width = max(map(len, begins))
            ids_BT = torch.tensor([[vocabulary.pad_id] * (width - len(ids)) + ids for ids in begins], device=device)
            mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in begins]).to(device)
            draws = {index: uniform_draws(sampling.seeds[index], sampling.max_new_tokens) for index in part}
            texts: dict[int, list[int]] = {index: [] for index in part}
            running, stats.peak_rows, stats.prefills = list(part), max(stats.peak_rows, len(part)), stats.prefills + 1
        # One pass of the model, over all of the batch's tokens or the last ones.
        new_BT = ids_BT if said == 0 else ids_BT[:, -1:]
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -new_BT.shape[1] :]
        caching = {"use_cache": True, _cache_name(model): cache}
        out = stack_of(model)(input_ids=new_BT, attention_mask=mask_BT, position_ids=positions_BT, **caching)
        logits_BV = logits_of(model, out.last_hidden_state[:, -1], vocabulary.size)
        # Each row's next token. In `seen` padding follows the row's own tokens, and repeats the last of them.
        seen_BT, length_B = torch.where(mask_BT.bool(), ids_BT, ids_BT[:, -1:]), mask_BT.sum(1)
        seen_BT = torch.stack([row.roll(length) for row, length in zip(seen_BT, length_B.tolist(), strict=True)])
        drawn_B = torch.tensor([draws[index][said] for index in running], dtype=torch.float64).to(device)
        next_B = choose_tokens(logits_BV, sampling, drawn_B, seen_BT, length_B).cpu()
        for index, token in zip(running, next_B.tolist(), strict=True):
            texts[index].append(token)
        said, stats.tokens = said + 1, stats.tokens + len(running)
        stats.steps += said > 1
        # The batch ends, or goes on without the rows that have.
        keep = (~torch.isin(next_B, eos_ids)).nonzero().squeeze(1)
        if said == sampling.max_new_tokens or not len(keep):
            for index in part:
                found[index] = np.array(texts[index], np.int32)
            part = None
            continue
        running, next_B, keep = [running[row] for row in keep.tolist()], next_B[keep].to(device), keep.to(device)
        # The states of linear attention and convolutions know no other selection.
        cache.reorder_cache(keep)  # type: ignore[arg-type]  # a LongTensor to torch's own stubs is any int64 tensor
        ids_BT = torch.cat([ids_BT[keep], next_B[:, None]], 1)
        mask_BT = torch.cat([mask_BT[keep], mask_BT.new_ones(len(running), 1)], 1)
    return found, stats
