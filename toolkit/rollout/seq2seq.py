"""Generation by an encoder-decoder model (T5, mT5): the loop of `decode`, with passes and a cache of its own.

A pass over prompts runs the encoder over them and the decoder over its start id, which puts the cross-attention's keys
and values into the cache; a step runs the decoder over one token a row. Rows differ in how much they have said, so each
has its own relative positions.

Shapes as in `cache`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolkit.batch.token_batch import padded
from toolkit.models.vocabulary import Vocabulary
from toolkit.rollout.cache import Seq2SeqCache, row_tokens, serving
from toolkit.rollout.decode import DecodeStats, Passes, decode
from toolkit.rollout.sampling import SeededSampling


def decode_seq2seq(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], sampling: SeededSampling, vocabulary: Vocabulary, rows: int,
    anyone_going: Callable[[bool], bool] | None = None,
) -> tuple[list[np.ndarray], DecodeStats]:  # fmt: skip
    """`decode` for an encoder-decoder model: its encoder reads the prompts, its decoder says the texts."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # the encoder pads to the longest
    sampling = replace(sampling, seeds=[sampling.seeds[index] for index in order])
    texts, stats = decode(
        model, [prompts[index] for index in order], sampling, vocabulary, rows, anyone_going, _DecoderPasses
    )
    of_prompt = dict(zip(order, texts, strict=True))
    return [of_prompt[index] for index in range(len(order))], stats


class _DecoderPasses(Passes):
    """A prompt's pass runs the encoder and puts the cross-attention's keys into the cache, a step runs the decoder."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[np.ndarray], rows: int, max_new_tokens: int):
        self.begin_id = int(model.config.decoder_start_token_id)
        super().__init__(model, [np.array([self.begin_id])] * len(prompts), rows, max_new_tokens)
        self.prompts, self.stacks = prompts, cast(Any, model)
        self.attending = self.stacks.decoder.config
        self.cache = self.both = Seq2SeqCache(rows, self.room, row_tokens(max(map(len, prompts), default=1)))

    def prompt(self, new: list[int], first: int) -> Tensor:
        """As `Passes.prompt`: the encoder reads the prompts, the decoder its start id."""
        return self._start(self.both, [self.prompts[index] for index in new], first)

    def step(self, ids_B: Tensor, position_B: Tensor, lengths: list[int]) -> Tensor:
        """As `Passes.step`, of the decoder alone."""
        self.both.start_pass(torch.arange(len(ids_B), device=self.device), position_B, lengths, is_prompt=False)
        return self._decoder(self.both, ids_B, None)

    def idle(self, is_prompt: bool) -> Tensor:
        """As `Passes.idle`, through the modules that the other ranks' pass runs through."""
        spare, config = Seq2SeqCache(1, 16, 16), self.stacks.decoder.config
        if is_prompt:
            return self._start(spare, [np.zeros(1, np.int64)], 0)
        # A step finds the cross-attention's keys in the cache: zeros stand for those of a prompt.
        token = torch.zeros(1, dtype=torch.long, device=self.device)
        nothing = torch.zeros(1, config.num_heads, 1, config.d_kv, dtype=self.model.dtype, device=self.device)
        spare.cross.start_prompts(0, token[None] + 1, nothing.dtype)
        for layer in range(config.num_layers):
            spare.cross.update(nothing, nothing, layer)
        spare.start_pass(token, token, [1], is_prompt=False)
        return self._decoder(spare, token, None)

    def _start(self, cache: Seq2SeqCache, prompts: list[np.ndarray], first: int) -> Tensor:
        ids_bS, mask_bS = (block.to(self.device) for block in padded(prompts, pad_id=0, multiple=1))
        encoded_bSH = self.stacks.encoder(input_ids=ids_bS, attention_mask=mask_bS).last_hidden_state
        row_b = torch.arange(first, first + len(prompts), device=self.device)
        cache.start_pass(row_b, torch.zeros_like(row_b), [1] * len(prompts), is_prompt=True)
        cache.cross.start_prompts(first, mask_bS, encoded_bSH.dtype)
        return self._decoder(cache, torch.full_like(row_b, self.begin_id), encoded_bSH)

    def _decoder(self, cache: Seq2SeqCache, ids_N: Tensor, encoded_bSH: Tensor | None) -> Tensor:
        if encoded_bSH is None:  # in the cache already; the layers ask only whether there was any
            encoded_bSH = torch.zeros(1, 1, 1, device=self.device)
        asked = {"input_ids": ids_N[None], "encoder_hidden_states": encoded_bSH, "cache": cache, "use_cache": True}
        with serving(cache):
            return self.stacks.decoder(**asked).last_hidden_state[0]
