"""How a model reads a prompt and its response: in one row, or each in a row and by a stack of its own.

What follows from that is asked of a `RowLayout`, and nobody else asks whether a model has an encoder. What takes more
than tokens stands in tables by the layout's type: passes of a model (`HIDDEN_STATES` in models) and loops of generation
(`LOOPS` in rollout). Files of models, and layers that are taken out of them, are about stacks and not about rows, and
so outside of it. Shapes as in `token_batch`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from toolkit.batch.token_batch import Example, Rows, TokenBatch, padded, round_up

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class RowLayout(ABC):
    """What is asked about the rows of a model. Layouts are values: two of one kind with the same ids are equal."""

    #: what a cache of tokens is known by
    name: ClassVar[str]
    #: what PEFT calls the task of such a model
    task_type: ClassVar[str]
    #: how many tokens of its own the layout puts behind every prompt
    prompt_ending: ClassVar[int]
    #: whether a pass over prompts runs other modules than a step of one token a row
    steps_differ: ClassVar[bool]

    def batch(self, examples: Sequence[Example], pad_id: int, pad_to_multiple: int = 8) -> TokenBatch:
        """`examples` beside each other, order kept. Raises ValueError as `TokenBatch.from_rows` does."""
        return self.batch_of_rows([[example] for example in examples], pad_id, pad_to_multiple)

    @abstractmethod
    def batch_of_rows(self, rows: Rows, pad_id: int, pad_to_multiple: int = 8) -> TokenBatch:
        """As `batch`, with the examples of each row behind each other, where the layout has room for several."""

    @abstractmethod
    def area(self, rows: Rows, pad_to_multiple: int) -> int:
        """Tokens of the batch that `batch_of_rows` makes, padding included."""

    @abstractmethod
    def end_prompt(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """A whole prompt as the model was trained to read its end."""

    @abstractmethod
    def cut_prompt(self, ids: list[int], longest: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """`longest` tokens of a prompt that has more."""

    @abstractmethod
    def check_use(self, *, packing: bool = False, cache: bool = False) -> None:
        """Raises ValueError for what rows of this layout are not made for: several texts in one row (`packing`), and
        stored answers of a teacher (`cache`)."""


@dataclass(frozen=True)
class DecoderOnly(RowLayout):
    """Prompt and response behind each other in one row. LLaMA, GPT-2."""

    name = "decoder_only"
    task_type = "CAUSAL_LM"
    prompt_ending = 0
    steps_differ = False

    def __str__(self) -> str:
        return "has no encoder"

    def batch_of_rows(self, rows: Rows, pad_id: int, pad_to_multiple: int = 8) -> TokenBatch:
        """`TokenBatch.from_rows`."""
        return TokenBatch.from_rows(rows, pad_id, pad_to_multiple)

    def area(self, rows: Rows, pad_to_multiple: int) -> int:
        """Rows times their padded length."""
        return len(rows) * round_up(max(sum(len(one.tokens) for one in row) for row in rows), pad_to_multiple)

    def end_prompt(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """As it is: the response goes on behind it."""
        return ids

    def cut_prompt(self, ids: list[int], longest: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The last ones, where the template's marker stands, behind its BOS where it begins with one."""
        head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
        return head + ids[len(ids) - (longest - len(head)) :]

    def check_use(self, *, packing: bool = False, cache: bool = False) -> None:
        """Everything may be asked of such rows."""


#: the layout where none is named
DECODER_ONLY = DecoderOnly()


@dataclass(frozen=True)
class EncoderDecoder(RowLayout):
    """The encoder reads the prompt, the decoder `start_id` and the response, all of which it predicts. T5, mT5."""

    name = "encoder_decoder"
    task_type = "SEQ_2_SEQ_LM"
    prompt_ending = 1  # EOS
    # The encoder runs over prompts alone, and so do the cross-attention's projections of what it made.
    steps_differ = True

    start_id: int

    def __str__(self) -> str:
        return f"starts its decoder with id {self.start_id}"

    def batch_of_rows(self, rows: Rows, pad_id: int, pad_to_multiple: int = 8) -> TokenBatch:
        """Two padded blocks, of the encoder's tokens and of the decoder's. Each row holds one example."""
        # The decoder's row is its start id, as a prompt, and the response.
        examples = [example for (example,) in rows]
        said = [[Example(np.concatenate([[self.start_id], example.response]), 1)] for example in examples]
        decoder = TokenBatch.from_rows(said, pad_id, pad_to_multiple)
        encoder_ids_BS, encoder_mask_BS = padded([example.prompt for example in examples], pad_id, pad_to_multiple)
        return EncoderDecoderBatch(
            decoder.input_ids_BT, decoder.attention_mask_BT, decoder.predicts_BT,
            encoder_ids_BS=encoder_ids_BS, encoder_mask_BS=encoder_mask_BS,
        )  # fmt: skip

    def area(self, rows: Rows, pad_to_multiple: int) -> int:
        """Rows times the padded lengths of both stacks."""
        prompt = round_up(max(one.prompt_length for (one,) in rows), pad_to_multiple)
        return len(rows) * (prompt + round_up(max(len(one.response) for (one,) in rows) + 1, pad_to_multiple))

    def end_prompt(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """With EOS, as T5's encoder was trained."""
        return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]

    def cut_prompt(self, ids: list[int], longest: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The first ones and EOS: an encoder reads the prompt as a whole, and no template's marker ends it."""
        return [*ids[: longest - 1], tokenizer.eos_token_id]

    def check_use(self, *, packing: bool = False, cache: bool = False) -> None:
        """Neither packing nor a cache: both know texts by the tokens of one row."""
        if packing:
            raise ValueError(
                "an encoder-decoder student reads prompt and response apart: data.packing, text.source and data.kind = "
                '"text" are for models without an encoder; set them to false, "" and "instructions"'
            )
        if cache:
            raise ValueError(
                f"teacher.cache with an encoder-decoder model (its decoder starts with id {self.start_id}): "
                'answers are kept for models without an encoder only; set teacher.cache to ""'
            )


def layout_of(config: PretrainedConfig) -> RowLayout:
    """The layout of rows of the model that `config` describes, as `load_model` completes it."""
    return EncoderDecoder(config.decoder_start_token_id) if config.is_encoder_decoder else DECODER_ONLY


@dataclass(frozen=True, eq=False, kw_only=True)
class EncoderDecoderBatch(TokenBatch):
    """encoder_ids_BS, encoder_mask_BS: int64, the prompts; the T tokens of each row are the decoder's."""

    encoder_ids_BS: torch.Tensor
    encoder_mask_BS: torch.Tensor

    @cached_property
    def num_tokens(self) -> int:
        """Number of real tokens of both stacks, padding not."""
        return int(self.attention_mask_BT.sum()) + int(self.encoder_mask_BS.sum())

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward takes, by its names."""
        return {
            "input_ids": self.encoder_ids_BS, "attention_mask": self.encoder_mask_BS,
            "decoder_input_ids": self.input_ids_BT, "decoder_attention_mask": self.attention_mask_BT,
        }  # fmt: skip
