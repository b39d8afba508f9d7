"""Token batches: what one micro-batch of a language model carries, and an optimizer step's window.

Shapes: B rows, T padded length (a multiple of `pad_to_multiple`), S padded length of an encoder's rows, N predicted
(response) tokens of a batch. A row holds one text, or several that do not see each other ("packed").
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Example:
    """One prompt and its response as token ids.

    tokens: int32 [L], prompt then response; the response includes its EOS where it has one (a truncated one
    has none).
    prompt_length: number of prompt tokens, 1 <= prompt_length < L, so that at least one response token is
    predicted.
    text_starts: where further texts begin in a block of plain text, ascending, in (0, L). They do not see each other,
    and the first token of each is a prompt of its own.

    Raises ValueError if `tokens` is not one-dimensional, holds a negative id, if `prompt_length` or `text_starts` is
    out of range, or if no token is predicted.
    """

    tokens: np.ndarray
    prompt_length: int
    text_starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens)
        if tokens.ndim != 1:
            raise ValueError(f"Example.tokens has shape {tokens.shape}; give a one-dimensional array of token ids")
        if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"Example.tokens has dtype {tokens.dtype}; give integer token ids")
        if tokens.size and tokens.min() < 0:
            raise ValueError(
                f"Example.tokens holds the id {tokens.min()}; ids are 0 or more, masks are not kept in them"
            )
        if not 1 <= self.prompt_length < len(tokens):
            raise ValueError(
                f"Example.prompt_length = {self.prompt_length} with {len(tokens)} tokens; "
                "an example needs at least one prompt token and one response token"
            )
        bounds = (0, *self.text_starts, len(tokens))
        if self.text_starts and (self.prompt_length > 1 or any(a >= b for a, b in itertools.pairwise(bounds))):
            raise ValueError(
                f"Example.text_starts = {self.text_starts} with {len(tokens)} tokens and prompt_length = "
                f"{self.prompt_length}; starts ascend between the ends, and plain text has a prompt of 1 token"
            )
        if len(tokens) == len(self.text_starts) + 1:
            raise ValueError("an Example of texts of 1 token each; nothing in it is predicted")
        object.__setattr__(self, "tokens", tokens.astype(np.int32, copy=False))

    @property
    def prompt(self) -> np.ndarray:
        """int32 [prompt_length], what a model is given to continue."""
        return self.tokens[: self.prompt_length]

    @property
    def response(self) -> np.ndarray:
        """int32 [L - prompt_length], at least one token."""
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """One micro-batch, padded on the right.

    input_ids_BT: int64. attention_mask_BT: int64, 1 on real tokens; it comes from lengths, so pad == eos is
    harmless. predicts_BT: bool, True at t iff token t + 1 is a response token of the same row. This is the
    one place in the project that shifts labels: logits at predicts_BT[b, t] are held against input_ids_BT[b,
    t + 1].
    position_ids_BT: int64, only where a row holds several texts: 0, 1, ... in each of them, and in the padding.
    transformers makes the block-diagonal mask of it, or flash attention its sequence bounds.
    encoder_ids_BS, encoder_mask_BS: the prompts, of an encoder-decoder model alone; the T tokens are its decoder's.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    predicts_BT: torch.Tensor
    position_ids_BT: torch.Tensor | None = None
    encoder_ids_BS: torch.Tensor | None = None
    encoder_mask_BS: torch.Tensor | None = None

    @classmethod
    def from_examples(
        cls, examples: Sequence[Example], pad_id: int, pad_to_multiple: int = 8, decoder_start_id: int | None = None
    ) -> TokenBatch:
        """Pads `examples` (order kept) to the longest of them, rounded up to `pad_to_multiple`.

        decoder_start_id: of an encoder-decoder model. Its encoder reads the prompt, its decoder this id and the
        response, all of which is predicted. None: prompt and response are one row.

        Raises ValueError for no examples, for a pad id that is not an id, and for pad_to_multiple < 1.
        """
        if decoder_start_id is None or not examples:
            return cls.from_rows([[example] for example in examples], pad_id, pad_to_multiple)
        rows = [[Example(np.concatenate([[decoder_start_id], e.response]), 1)] for e in examples]
        decoder = cls.from_rows(rows, pad_id, pad_to_multiple)
        encoder_ids_BS, encoder_mask_BS = _padded([e.prompt for e in examples], pad_id, pad_to_multiple)
        return dataclasses.replace(decoder, encoder_ids_BS=encoder_ids_BS, encoder_mask_BS=encoder_mask_BS)

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[Example]], pad_id: int, pad_to_multiple: int = 8) -> TokenBatch:
        """As `from_examples`, with one or more examples in a row, one after the other, that do not see each other."""
        if not rows or not all(rows):
            raise ValueError("a TokenBatch of 0 examples; every rank needs at least one row per micro-batch")
        if pad_id is None or pad_id < 0:
            raise ValueError(
                f"pad_id = {pad_id}; give a token id, the EOS id does where the tokenizer has no pad token"
            )
        if pad_to_multiple < 1:
            raise ValueError(f"pad_to_multiple = {pad_to_multiple}; give 1 or more")
        longest = max(sum(len(e.tokens) for e in row) for row in rows)
        shape = len(rows), _round_up(longest, pad_to_multiple)
        input_ids_BT = np.full(shape, pad_id, dtype=np.int64)
        attention_mask_BT = np.zeros(shape, dtype=np.int64)
        predicts_BT = np.zeros(shape, dtype=bool)
        position_ids_BT = np.zeros(shape, dtype=np.int64)
        for b, row in enumerate(rows):
            end = 0
            for example in row:
                start, end = end, end + len(example.tokens)
                input_ids_BT[b, start:end] = example.tokens
                predicts_BT[b, start + example.prompt_length - 1 : end - 1] = True
                bounds = (start, *(start + offset for offset in example.text_starts), end)
                for first, after in itertools.pairwise(bounds):
                    position_ids_BT[b, first:after] = np.arange(after - first)
                    predicts_BT[b, after - 1] = False
            attention_mask_BT[b, :end] = 1
            position_ids_BT[b, end:] = np.arange(shape[1] - end)
        is_packed = any(len(row) > 1 or row[0].text_starts for row in rows)
        arrays = [input_ids_BT, attention_mask_BT, predicts_BT] + [position_ids_BT] * is_packed
        return cls(*map(torch.from_numpy, arrays))

    @cached_property
    def num_targets(self) -> int:
        """Number of predicted tokens N, the denominator's share of this batch."""
        return int(self.predicts_BT.sum())

    @cached_property
    def num_tokens(self) -> int:
        """Number of real tokens, prompts included, padding not."""
        masks = (self.attention_mask_BT, self.encoder_mask_BS)
        return sum(int(mask.sum()) for mask in masks if mask is not None)

    @property
    def targets_N(self) -> torch.Tensor:
        """int64 [N], ids of the predicted tokens in the order of hidden_BTH[predicts_BT]."""
        return self.input_ids_BT[:, 1:][self.predicts_BT[:, :-1]]

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward takes, by its names. With position ids there is no mask: transformers would take
        it at its word, and texts in one row would see each other."""
        if self.position_ids_BT is not None:
            return {"input_ids": self.input_ids_BT, "position_ids": self.position_ids_BT}
        if self.encoder_ids_BS is not None:
            return {
                "input_ids": self.encoder_ids_BS, "attention_mask": self.encoder_mask_BS,
                "decoder_input_ids": self.input_ids_BT, "decoder_attention_mask": self.attention_mask_BT,
            }  # fmt: skip
        return {"input_ids": self.input_ids_BT, "attention_mask": self.attention_mask_BT}

    @classmethod
    def concatenate(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """One batch of all rows, order kept, padded to the longest; its targets are theirs, in order."""

        if any(batch.position_ids_BT is not None for batch in batches):
            batches = [batch._with_positions() for batch in batches]

        def joined(name: str) -> torch.Tensor | None:  # padded ids are 0: masks say what is real
            parts = [getattr(batch, name) for batch in batches]
            if parts[0] is None:
                return None
            width = max(part.shape[1] for part in parts)
            return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

        return cls(**{field.name: joined(field.name) for field in dataclasses.fields(cls)})

    def _with_positions(self) -> TokenBatch:
        if self.position_ids_BT is not None:
            return self
        positions_T = torch.arange(self.input_ids_BT.shape[1], device=self.input_ids_BT.device)
        return dataclasses.replace(self, position_ids_BT=positions_T.expand_as(self.input_ids_BT))

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        there = {name: None if t is None else t.to(device, non_blocking=True) for name, t in fields.items()}
        moved = TokenBatch(**there)
        # Counted where the data still is: counting on a GPU would wait for it, once for each micro-batch.
        vars(moved).update(num_targets=self.num_targets, num_tokens=self.num_tokens)
        return moved


def _padded(rows: Sequence[np.ndarray], pad_id: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), int64, of `rows` beside each other, padded on the right to a multiple of `multiple`."""
    shape = len(rows), _round_up(max(map(len, rows)), multiple)
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


Rows = list[list[Example]]  # of one micro-batch: the examples that lie in each row
InRows = Callable[[Sequence[Example]], Rows]


def make_window(
    examples: Sequence[Example],
    micro_size: int,
    pad_id: int,
    pad_to_multiple: int = 8,
    pack_to: int | None = None,
    decoder_start_id: int | None = None,
    micro_tokens: int | None = None,
    agree: Callable[[int], int] = lambda count: count,
) -> list[TokenBatch]:
    """One rank's share of an optimizer step as len(examples) / micro_size micro-batches.

    The step's loss is a sum over all of them, so which example lies in which is free. They are sorted by length,
    longest first: little padding, and what does not fit into memory is seen at once. With `pack_to`, each micro-batch
    gets about as many tokens as the others, laid into the rows, of at most `pack_to` tokens, that need the least
    padding; no row is longer than `pack_to` but for an example that is.

    micro_tokens: in place of micro_size, as few micro-batches as hold at most so many tokens each, padding included,
    but for one example that has more by itself. All ranks have to take as many: `agree` is told this rank's number
    and returns that of the rank which needs most, and this rank splits its micro-batches up to it.

    Raises ValueError for no examples, if micro_size < 1, or if it does not divide len(examples).
    """
    if not examples or (micro_tokens is None and (micro_size < 1 or len(examples) % micro_size)):
        raise ValueError(
            f"a window of {len(examples)} examples in micro-batches of {micro_size}; "
            "the window must hold at least one micro-batch and be a multiple of its size"
        )

    def in_rows(part: Sequence[Example]) -> Rows:
        return [[one] for one in part] if pack_to is None else _least_padding(part, pack_to, pad_to_multiple)

    def area(rows: Rows) -> int:
        """Tokens of the micro-batch, padding included."""
        if decoder_start_id is None:
            return len(rows) * _round_up(max(sum(map(_length, row)) for row in rows), pad_to_multiple)
        prompt = _round_up(max(one.prompt_length for one, *_ in rows), pad_to_multiple)
        return len(rows) * (prompt + _round_up(max(len(one.response) for one, *_ in rows) + 1, pad_to_multiple))

    ordered = sorted(examples, key=_length, reverse=True)
    if micro_tokens is not None:
        fill = _fill_sorted if pack_to is None else _fill_evenly
        parts = fill(ordered, in_rows, lambda rows: area(rows) <= micro_tokens)
        parts = _split_up(parts, agree(len(parts)), area)
    elif pack_to is not None:
        parts = [in_rows(part) for part in _even_parts(ordered, len(ordered) // micro_size)]
    else:
        parts = [in_rows(ordered[start : start + micro_size]) for start in range(0, len(ordered), micro_size)]
    if decoder_start_id is None:
        return [TokenBatch.from_rows(rows, pad_id, pad_to_multiple) for rows in parts]
    flat = [[one for row in rows for one in row] for rows in parts]
    return [TokenBatch.from_examples(part, pad_id, pad_to_multiple, decoder_start_id) for part in flat]


def _fill_sorted(ordered: list[Example], in_rows: InRows, fits: Callable[[Rows], bool]) -> list[Rows]:
    """Micro-batches one after the other, each as full as it may be."""
    parts: list[Rows] = []
    for rows in map(in_rows, ([one] for one in ordered)):
        if parts and fits(parts[-1] + rows):
            parts[-1] += rows
        else:
            parts.append(rows)
    return parts


def _fill_evenly(ordered: list[Example], in_rows: InRows, fits: Callable[[Rows], bool]) -> list[Rows]:
    """The smallest number of micro-batches of about as many tokens; what does not fit by itself is alone."""
    alone = [in_rows([one]) for one in ordered]
    large = [rows for rows in alone if not fits(rows)]
    rest = [one for one, rows in zip(ordered, alone, strict=True) if fits(rows)]
    for count in range(1, len(rest)):
        parts = [in_rows(part) for part in _even_parts(rest, count)]
        if all(map(fits, parts)):
            return large + parts
    return large + [in_rows([one]) for one in rest]


def _split_up(parts: list[Rows], count: int, area: Callable[[Rows], int]) -> list[Rows]:
    """`parts` with the largest halved until there are `count`: by rows, a single row by its examples. No half is
    larger than the whole, so what held still holds."""
    parts = list(parts)
    while len(parts) < count:
        index = max((i for i, rows in enumerate(parts) if sum(map(len, rows)) > 1), key=lambda i: area(parts[i]))
        rows = parts[index]
        if len(rows) > 1:
            halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        else:
            (row,) = rows
            halves = [[row[: len(row) // 2]], [row[len(row) // 2 :]]]
        parts[index : index + 1] = halves
    return parts


def _even_parts(examples: Sequence[Example], count: int) -> list[list[Example]]:
    """`count` parts, none empty where there are as many examples, of about as many tokens: each example, longest first,
    goes to the part that has least (Graham's longest-processing-time rule, 1969)."""
    parts: list[list[Example]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]  # (tokens, part)
    for example in sorted(examples, key=_length, reverse=True):
        tokens, index = heap[0]
        parts[index].append(example)
        heapq.heapreplace(heap, (tokens + _length(example), index))
    return parts


def _least_padding(examples: Sequence[Example], pack_to: int, pad_to_multiple: int) -> Rows:
    """The examples in the number of rows that makes rows x padded length smallest; more and shorter rows on a tie."""
    found, least = None, 0
    limit = max(pack_to, max(map(_length, examples)))
    for count in range(len(examples), 0, -1):
        rows = _even_parts(examples, count)
        longest = max(sum(map(_length, row)) for row in rows)
        if longest > limit:
            break
        area = count * _round_up(longest, pad_to_multiple)
        if found is None or area < least:
            found, least = rows, area
    return found


def _length(example: Example) -> int:
    return len(example.tokens)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
