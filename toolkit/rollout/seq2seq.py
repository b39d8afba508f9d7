"""Generation by an encoder-decoder model (T5, mT5): the loop of `decode`, with passes and a cache of its own.

A pass over prompts runs the encoder over them and the decoder over its start id, which puts the cross-attention's keys
and values into the cache; a step runs the decoder over one token a row. Rows differ in how much they have said, so each
has its own relative positions.

Shapes as in `decode`: N tokens of this pass, R rows of the cache, B rows running, K heads, D head size; b new prompts,
S tokens of the longest of them, P places for a row's prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from toolkit.batch.token_batch import padded
from toolkit.models.vocabulary import Vocabulary
from toolkit.rollout.decode import DecodeStats, Passes, RaggedCache, decode, row_tokens, serving
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


class CrossRows(Cache):
    """Keys and values of the R rows' prompts, [R, K, P, D] a layer, and `hidden_R11P`, 0 where a prompt has a token and
    minus infinity behind it."""

    def __init__(self, rows: int, tokens: int):
        self.layers: list[Any] = []  # of _CrossLayer: a decoder's layers read `keys` and `values` there
        self.rows, self.tokens = rows, tokens

    def start_prompts(self, first: int, mask_bS: Tensor, dtype: torch.dtype) -> None:
        """The next pass brings the prompts of the rows `first`, `first` + 1, ..."""
        if not hasattr(self, "hidden_R11P"):
            self.hidden_R11P = torch.zeros(self.rows, 1, 1, self.tokens, dtype=dtype, device=mask_bS.device)
        self.first, self.last, self.width = first, first + len(mask_bS), mask_bS.shape[1]
        new = self.hidden_R11P[first : self.last]
        new.fill_(-torch.inf)[:, 0, 0, : self.width].masked_fill_(mask_bS.bool(), 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write what the new prompts gave, [b, K, S, D]; the same comes back, for attention in this pass."""
        if layer_idx == len(self.layers):
            self.layers.append(_CrossLayer(self, key_states))
        for store, new in zip(self.layers[layer_idx].stores_RKPD, (key_states, value_states), strict=True):
            store[self.first : self.last, :, : self.width] = new
            store[self.first : self.last, :, self.width :] = 0
        return key_states, value_states

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy what the rows `source` hold to the rows `target`, both int64 [M]."""
        for layer in self.layers:
            for store in layer.stores_RKPD:
                store[target] = store[source]
        self.hidden_R11P[target] = self.hidden_R11P[source]


class _CrossLayer:
    """Keys and values of one layer; attention reads those of the rows that run."""

    def __init__(self, cache: CrossRows, like_bKSD: Tensor):
        shape = cache.rows, like_bKSD.shape[1], cache.tokens, like_bKSD.shape[3]
        self.stores_RKPD = like_bKSD.new_zeros(shape), like_bKSD.new_zeros(shape)
        self.running = cache.rows

    keys = property(lambda self: self.stores_RKPD[0][: self.running])
    values = property(lambda self: self.stores_RKPD[1][: self.running])


class Seq2SeqCache(EncoderDecoderCache):
    """What `decode` needs of a cache, for both attentions of a decoder."""

    def __init__(self, rows: int, tokens: int, prompt_tokens: int):
        self.own, self.cross = RaggedCache(rows, tokens), CrossRows(rows, prompt_tokens)
        super().__init__(self.own, self.cross)

    def start_pass(self, row_N: Tensor, position_N: Tensor, lengths: Sequence[int], is_prompt: bool) -> None:
        """As `RaggedCache.start_pass`, for the decoder's own tokens."""
        self.own.start_pass(row_N, position_N, lengths, is_prompt)
        for layer in self.cross.layers:
            layer.running = len(lengths)
        self.is_updated = {} if is_prompt else dict.fromkeys(range(len(self.cross.layers)), True)

    def attend(
        self, module: Any, query_1KND: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """[1, N, K, D]; each of the N tokens is a row of its own, and no layer has a window."""
        own, cross = self.own, self.cross
        if not module.is_causal:
            at = slice(cross.first, cross.last) if own.is_prompt else slice(len(own.lengths))
            bias = cross.hidden_R11P[at, ..., : key.shape[2]]
        elif own.is_prompt:  # a start id sees itself alone
            return value.transpose(1, 2)
        else:
            bias = self._position_bias(module)
        query_NK1D = query_1KND[0].transpose(0, 1)[:, :, None]
        return F.scaled_dot_product_attention(query_NK1D, key, value, bias, scale=scale)[None, :, :, 0]

    def _position_bias(self, module: Any) -> Tensor:
        """[B, K, 1, width], minus infinity behind a row's token. The first layer has the table, the others use what it
        made."""
        own = self.own
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
        self.own.move_rows(source, target)
        self.cross.move_rows(source, target)

    @property
    def bytes(self) -> int:
        """What keys and values of both attentions take."""
        return self.own.bytes + sum(store.nbytes for layer in self.cross.layers for store in layer.stores_RKPD)


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
