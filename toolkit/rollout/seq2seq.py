"""Generation by an encoder-decoder model (T5, mT5): the loop of `decode`, with passes and a cache of its own.

A pass over prompts runs the encoder over them and the decoder over its start id, which puts the cross-attention's keys
and values into the cache; a step runs the decoder over one token a row. Rows differ in how much they have said, so each
has its own relative positions.

Shapes as in `decode`: N tokens of this pass, R rows of the cache, B rows running, K heads, D head size; b new prompts,
S tokens of the longest of them, P places for a row's prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache, EncoderDecoderCache, PreTrainedModel

from toolkit.models.vocabulary import Vocabulary
from toolkit.rollout.decode import DecodeStats, Passes, RaggedCache, _attention, decode, row_tokens
from toolkit.rollout.sampling import SeededSampling

ATTENTION = "ragged_decoder_rows"  # the name under which a decoder's layers find `_attend`


def decode_seq2seq(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], sampling: SeededSampling, vocabulary: Vocabulary, rows: int,
    anyone_going: Callable[[bool], bool] | None = None,
) -> tuple[list[np.ndarray], DecodeStats]:  # fmt: skip
    """`decode` for an encoder-decoder model: its encoder reads the prompts, its decoder says the texts."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # the encoder pads to the longest
    sampling = replace(sampling, seeds=[sampling.seeds[index] for index in order])
    prompts = [prompts[index] for index in order]
    texts, stats = decode(model, prompts, sampling, vocabulary, rows, anyone_going, _DecoderPasses)
    found: list[Any] = [None] * len(order)
    for index, text in zip(order, texts, strict=True):
        found[index] = text
    return found, stats


class CrossRows(Cache):
    """Keys and values of the R rows' prompts, [R, K, P, D] a layer, and `hidden_R11P`, 0 where a prompt has a token and
    minus infinity behind it."""

    def __init__(self, rows: int, tokens: int):
        self.layers: list[_CrossLayer] = []
        self.rows, self.tokens = rows, tokens

    def start_prompts(self, first: int, mask_bS: Tensor, dtype: torch.dtype) -> None:
        """The next pass brings the prompts of the rows `first`, `first` + 1, ..."""
        if not hasattr(self, "hidden_R11P"):
            self.hidden_R11P = torch.zeros(self.rows, 1, 1, self.tokens, dtype=dtype, device=mask_bS.device)
        self.first, self.last, self.width = first, first + len(mask_bS), mask_bS.shape[1]
        new = self.hidden_R11P[first : self.last]
        new.fill_(-torch.inf)[:, 0, 0, : self.width].masked_fill_(mask_bS.bool(), 0)

    def update(self, key_bKSD: Tensor, value_bKSD: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Write what the new prompts gave; the same comes back, for attention in this pass."""
        if layer_idx == len(self.layers):
            self.layers.append(_CrossLayer(self, key_bKSD))
        layer = self.layers[layer_idx]
        for store, new in ((layer.keys_RKPD, key_bKSD), (layer.values_RKPD, value_bKSD)):
            store[self.first : self.last, :, : self.width] = new
            store[self.first : self.last, :, self.width :] = 0
        return key_bKSD, value_bKSD

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy what the rows `source` hold to the rows `target`, both int64 [M]."""
        for layer in self.layers:
            for store in (layer.keys_RKPD, layer.values_RKPD):
                store[target] = store[source]
        self.hidden_R11P[target] = self.hidden_R11P[source]


class _CrossLayer:
    def __init__(self, cache: CrossRows, like_bKSD: Tensor):
        shape = cache.rows, like_bKSD.shape[1], cache.tokens, like_bKSD.shape[3]
        self.keys_RKPD, self.values_RKPD = like_bKSD.new_zeros(shape), like_bKSD.new_zeros(shape)
        self.running = cache.rows

    @property
    def keys(self) -> Tensor:
        return self.keys_RKPD[: self.running]

    @property
    def values(self) -> Tensor:
        return self.values_RKPD[: self.running]


class Seq2SeqCache(EncoderDecoderCache):
    """What `decode` needs of a cache, for both attentions of a decoder."""

    def __init__(self, rows: int, tokens: int, prompt_tokens: int):
        super().__init__(RaggedCache(rows, tokens), CrossRows(rows, prompt_tokens))

    def start_pass(self, row_N: Tensor, position_N: Tensor, lengths: Sequence[int], is_prompt: bool) -> None:
        """As `RaggedCache.start_pass`, for the decoder's own tokens."""
        self.self_attention_cache.start_pass(row_N, position_N, lengths, is_prompt)
        cross = self.cross_attention_cache
        for layer in cross.layers:
            layer.running = len(lengths)
        self.is_updated = {} if is_prompt else dict.fromkeys(range(len(cross.layers)), True)

    def attend(self, module: Any, query_1KND: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1, N, K, D]; each of the N tokens is a row of its own."""
        own, cross = self.self_attention_cache, self.cross_attention_cache
        if not module.is_causal:
            at = slice(cross.first, cross.last) if own.is_prompt else slice(len(own.lengths))
            bias = cross.hidden_R11P[at, ..., : key.shape[2]]
        elif own.is_prompt:  # a start id sees itself alone
            return value.transpose(1, 2)
        else:
            bias = self._position_bias(module)
        out_NK1D = F.scaled_dot_product_attention(
            query_1KND[0].transpose(0, 1)[:, :, None], key, value, bias, scale=scale
        )
        return out_NK1D[None, :, :, 0]

    def _position_bias(self, module: Any) -> Tensor:
        """[B, K, 1, width], minus infinity behind a row's token. The first layer has the table, the others use what it
        made."""
        own = self.self_attention_cache
        if module.has_relative_attention_bias:
            at_B1, seen = own.position_N[:, None], torch.arange(own.width, device=own.position_N.device)
            bucket_BT = module._relative_position_bucket(
                seen - at_B1, bidirectional=False, num_buckets=module.relative_attention_num_buckets,
                max_distance=module.relative_attention_max_distance,
            )  # fmt: skip
            bias_BTK = module.relative_attention_bias(bucket_BT).masked_fill((seen > at_B1)[..., None], -torch.inf)
            own.made["bias"] = bias_BTK.transpose(1, 2)[:, :, None]
        return own.made["bias"]

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """As `RaggedCache.move_rows`, in both caches."""
        self.self_attention_cache.move_rows(source, target)
        self.cross_attention_cache.move_rows(source, target)

    @property
    def bytes(self) -> int:
        """What keys and values of both attentions take."""
        cross = [store for layer in self.cross_attention_cache.layers for store in (layer.keys_RKPD, layer.values_RKPD)]
        return self.self_attention_cache.bytes + sum(store.numel() * store.element_size() for store in cross)


_cache: Seq2SeqCache | None = None  # of the pass that runs now


def _attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    assert _cache is not None, "ragged attention outside of a decode loop"
    return _cache.attend(module, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, _attend)


class _DecoderPasses(Passes):
    """A prompt's pass runs the encoder and puts the cross-attention's keys into the cache, a step runs the decoder."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[np.ndarray], rows: int, max_new_tokens: int):
        start = np.array([model.config.decoder_start_token_id])
        super().__init__(model, [start] * len(prompts), rows, max_new_tokens)
        self.prompts = prompts
        self.cache = Seq2SeqCache(rows, self.room, row_tokens(max(map(len, prompts), default=1)))

    def attention(self) -> Any:
        return _attention(self.model.decoder.config, ATTENTION)

    def prompt(self, new: list[int], first: int) -> Tensor:
        return self._start(self.cache, [self.prompts[index] for index in new], first)

    def step(self, ids_B: Tensor, position_B: Tensor, lengths: list[int]) -> Tensor:
        self.cache.start_pass(torch.arange(len(ids_B), device=self.device), position_B, lengths, is_prompt=False)
        return self._decoder(self.cache, ids_B, None)

    def idle(self, is_prompt: bool) -> Tensor:
        spare, config = Seq2SeqCache(1, 16, 16), self.model.decoder.config
        if is_prompt:
            return self._start(spare, [np.zeros(1, np.int64)], 0)
        token, cross = torch.zeros(1, dtype=torch.long, device=self.device), spare.cross_attention_cache
        nothing = torch.zeros(1, config.num_heads, 1, config.d_kv, dtype=self.model.dtype, device=self.device)
        cross.start_prompts(0, token[None] + 1, nothing.dtype)
        for layer in range(config.num_layers):
            cross.update(nothing, nothing, layer)
        spare.start_pass(token, token, [1], is_prompt=False)
        return self._decoder(spare, token, None)

    def _start(self, cache: Seq2SeqCache, prompts: list[np.ndarray], first: int) -> Tensor:
        width = max(map(len, prompts))
        ids_bS = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_bS = torch.zeros_like(ids_bS)
        for b, prompt in enumerate(prompts):
            ids_bS[b, : len(prompt)], mask_bS[b, : len(prompt)] = torch.tensor(np.asarray(prompt, np.int64)), 1
        ids_bS, mask_bS = ids_bS.to(self.device), mask_bS.to(self.device)
        encoded_bSH = self.model.encoder(input_ids=ids_bS, attention_mask=mask_bS).last_hidden_state
        row_b = torch.arange(first, first + len(prompts), device=self.device)
        cache.start_pass(row_b, torch.zeros_like(row_b), [1] * len(prompts), is_prompt=True)
        cache.cross_attention_cache.start_prompts(first, mask_bS, encoded_bSH.dtype)
        ids_b = torch.full_like(row_b, self.model.config.decoder_start_token_id)
        return self._decoder(cache, ids_b, encoded_bSH)

    def _decoder(self, cache: Seq2SeqCache, ids_N: Tensor, encoded_bSH: Tensor | None) -> Tensor:
        global _cache
        if encoded_bSH is None:  # in the cache already; the layers ask only whether there was any
            encoded_bSH = torch.zeros(1, 1, 1, device=self.device)
        _cache = cache
        try:
            return self.model.decoder(
                input_ids=ids_N[None], encoder_hidden_states=encoded_bSH, cache=cache, use_cache=True
            ).last_hidden_state[0]
        finally:
            _cache = None
