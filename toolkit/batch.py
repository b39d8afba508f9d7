"""Token batches: what one micro-batch of a language model carries, and an optimizer step's window.

Shapes: B rows, T padded length (a multiple of `pad_to_multiple`), S padded length of an encoder's rows, N predicted
(response) tokens of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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

    Raises ValueError if `tokens` is not one-dimensional, holds a negative id, or if `prompt_length` is out of
    range.
    """

    tokens: np.ndarray
    prompt_length: int

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
    encoder_ids_BS, encoder_mask_BS: the prompts, of an encoder-decoder model alone; the T tokens are its decoder's.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    predicts_BT: torch.Tensor
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
        if not examples:
            raise ValueError("a TokenBatch of 0 examples; every rank needs at least one row per micro-batch")
        if pad_id is None or pad_id < 0:
            raise ValueError(
                f"pad_id = {pad_id}; give a token id, the EOS id does where the tokenizer has no pad token"
            )
        if pad_to_multiple < 1:
            raise ValueError(f"pad_to_multiple = {pad_to_multiple}; give 1 or more")
        rows, sources = [e.tokens for e in examples], ()
        if decoder_start_id is not None:
            rows = [np.concatenate([[decoder_start_id], e.response]) for e in examples]
            sources = _padded([e.prompt for e in examples], pad_id, pad_to_multiple)
        input_ids_BT, attention_mask_BT = _padded(rows, pad_id, pad_to_multiple)
        predicts_BT = torch.zeros(input_ids_BT.shape, dtype=torch.bool)
        for b, (example, row) in enumerate(zip(examples, rows, strict=True)):
            predicts_BT[b, len(row) - len(example.response) - 1 : len(row) - 1] = True
        return cls(input_ids_BT, attention_mask_BT, predicts_BT, *sources)

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
        """What the model's forward takes, by its names."""
        if self.encoder_ids_BS is not None:
            return {
                "input_ids": self.encoder_ids_BS, "attention_mask": self.encoder_mask_BS,
                "decoder_input_ids": self.input_ids_BT, "decoder_attention_mask": self.attention_mask_BT,
            }  # fmt: skip
        return {"input_ids": self.input_ids_BT, "attention_mask": self.attention_mask_BT}

    @classmethod
    def concatenate(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """One batch of all rows, order kept, padded to the longest; its targets are theirs, in order."""

        def joined(name: str) -> torch.Tensor | None:  # padded ids are 0: masks say what is real
            parts = [getattr(batch, name) for batch in batches]
            if parts[0] is None:
                return None
            width = max(part.shape[1] for part in parts)
            return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

        return cls(**{field.name: joined(field.name) for field in dataclasses.fields(cls)})

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
    shape = len(rows), -(-max(map(len, rows)) // multiple) * multiple
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def make_window(
    examples: Sequence[Example],
    micro_size: int,
    pad_id: int,
    pad_to_multiple: int = 8,
    decoder_start_id: int | None = None,
) -> list[TokenBatch]:
    """One rank's share of an optimizer step as len(examples) / micro_size micro-batches, order kept.

    Raises ValueError if micro_size < 1, or if it does not divide len(examples).
    """
    if micro_size < 1 or not examples or len(examples) % micro_size:
        raise ValueError(
            f"a window of {len(examples)} examples in micro-batches of {micro_size}; "
            "the window must hold at least one micro-batch and be a multiple of its size"
        )
    return [
        TokenBatch.from_examples(examples[start : start + micro_size], pad_id, pad_to_multiple, decoder_start_id)
        for start in range(0, len(examples), micro_size)
    ]
