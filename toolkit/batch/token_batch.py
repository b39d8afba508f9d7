"""What one micro-batch of a language model carries.

Shapes: B rows, T padded length (a multiple of `pad_to_multiple`), S padded length of an encoder's rows, N predicted
(response) tokens of a batch. A row holds one text, or several that do not see each other ("packed").
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Example:
    """One prompt and its response as token ids.

    tokens: int32 [L], prompt then response; the response includes its EOS where it has one (a truncated one has none).
    prompt_length: number of prompt tokens, 1 <= prompt_length < L. text_starts: where further texts begin in a block of
    plain text, ascending, in (0, L). They do not see each other, and the first token of each is a prompt of its own.

    Raises ValueError if `tokens` is not one-dimensional, holds a negative id, if `prompt_length` or `text_starts` is
    out of range, or if no token is predicted.
    """

    tokens: np.ndarray
    prompt_length: int
    text_starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # One line of ids, of which at least one is predicted.
        tokens = np.asarray(self.tokens)
        if tokens.ndim != 1:
            raise ValueError(f"Example.tokens has shape {tokens.shape}; give a one-dimensional array of token ids")
        if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"Example.tokens has dtype {tokens.dtype}; give integer token ids")
        if tokens.size and tokens.min() < 0:
            raise ValueError(f"Example.tokens holds the id {tokens.min()}; ids are 0 or more, and masks lie elsewhere")
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


#: of one micro-batch: the examples that lie in each row
Rows = list[list[Example]]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """One micro-batch, padded on the right.

    input_ids_BT: int64. attention_mask_BT: int64, 1 on real tokens; it comes from lengths, so pad == eos is harmless.
    predicts_BT: bool, True at t iff token t + 1 is a response token of the same row. This is the one place in the
    project that shifts labels: logits at predicts_BT[b, t] are held against input_ids_BT[b, t + 1]. position_ids_BT:
    int64, only where a row holds several texts: 0, 1, ... in each of them, and in the padding. transformers makes the
    block-diagonal mask of it, or flash attention its sequence bounds.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    predicts_BT: torch.Tensor
    position_ids_BT: torch.Tensor | None = None

    @classmethod
    def from_examples(cls, examples: Sequence[Example], pad_id: int, pad_to_multiple: int = 8) -> TokenBatch:
        """Each example in a row, prompt and response, order kept: `RowLayout.batch` of a model without an encoder."""
        return cls.from_rows([[example] for example in examples], pad_id, pad_to_multiple)

    @classmethod
    def from_rows(cls, rows: Rows, pad_id: int, pad_to_multiple: int = 8) -> TokenBatch:
        """Rows of one or more examples, one after the other, that do not see each other; padded to the longest row,
        rounded up to `pad_to_multiple`. Raises ValueError for no examples, for a pad id that is not an id, and for
        pad_to_multiple < 1."""
        if not rows or not all(rows):
            raise ValueError("a TokenBatch of 0 examples; every rank needs at least one row per micro-batch")
        if pad_id is None or pad_id < 0:
            raise ValueError(f"pad_id = {pad_id}; give a token id: EOS will do for a tokenizer without a pad token")
        if pad_to_multiple < 1:
            raise ValueError(f"pad_to_multiple = {pad_to_multiple}; give 1 or more")
        # Blocks of padding, into which the examples of each row are written one behind the other.
        longest = max(sum(len(e.tokens) for e in row) for row in rows)
        shape = len(rows), round_up(longest, pad_to_multiple)
        input_ids_BT, predicts_BT = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=bool)
        attention_mask_BT, position_ids_BT = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for b, row in enumerate(rows):
            end = 0
            for example in row:
                start, end = end, end + len(example.tokens)
                input_ids_BT[b, start:end] = example.tokens
                predicts_BT[b, start + example.prompt_length - 1 : end - 1] = True
                # Positions start over in each text, and no text's last token predicts the next one's first.
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
        return int(self.attention_mask_BT.sum())

    @property
    def targets_N(self) -> torch.Tensor:
        """int64 [N], ids of the predicted tokens in the order of hidden_BTH[predicts_BT]."""
        return self.input_ids_BT[:, 1:][self.predicts_BT[:, :-1]]

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward takes, by its names. With position ids there is no mask: transformers would take
        it at its word, and texts in one row would see each other."""
        if self.position_ids_BT is not None:
            return {"input_ids": self.input_ids_BT, "position_ids": self.position_ids_BT}
        return {"input_ids": self.input_ids_BT, "attention_mask": self.attention_mask_BT}

    @staticmethod
    def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
        """One batch of all rows, order kept, padded to the longest; its targets are theirs, in order. The batches are
        of one layout."""
        if any(batch.position_ids_BT is not None for batch in batches):
            batches = [batch._with_positions() for batch in batches]
        joined: dict[str, Any] = {}
        for field in dataclasses.fields(batches[0]):
            parts = [part for batch in batches if (part := getattr(batch, field.name)) is not None]
            # Padded ids are 0 here: masks say what is real.
            width = max((part.shape[1] for part in parts), default=0)
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
            joined[field.name] = torch.cat(parts) if parts else None
        return type(batches[0])(**joined)

    def _with_positions(self) -> TokenBatch:
        if self.position_ids_BT is not None:
            return self
        positions_T = torch.arange(self.input_ids_BT.shape[1], device=self.input_ids_BT.device)
        return dataclasses.replace(self, position_ids_BT=positions_T.expand_as(self.input_ids_BT))

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`."""
        blocks = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        there = {name: block.to(device, non_blocking=True) for name, block in blocks.items() if block is not None}
        moved = dataclasses.replace(self, **there)
        # Counted where the data still is: counting on a GPU would wait for it, once for each micro-batch.
        vars(moved).update(num_targets=self.num_targets, num_tokens=self.num_tokens)
        return moved


def padded(rows: Sequence[np.ndarray], pad_id: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), int64, of `rows` beside each other, padded on the right to a multiple of `multiple`."""
    shape = len(rows), round_up(max(map(len, rows)), multiple)
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple
