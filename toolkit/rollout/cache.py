"""Caches of keys and values for the decode loops, allocated once, and the way from transformers' attention to them.

Shapes: N tokens of this pass, R rows of the cache, B rows running now, C tokens a row may hold, G query heads to each
of the K key heads, D head size; b new prompts, S tokens of the longest of them, P places for an encoder's row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, EncoderDecoderCache, PreTrainedModel

from toolkit.batch import round_up

ATTENTION = "ragged_rows"  # the name under which transformers' models find `_attend`


def row_tokens(longest: int) -> int:
    """Places that a row of `longest` tokens takes: a multiple of 16, as GPU attention wants its masks."""
    return round_up(longest, 16)


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Keys and values of one token in all layers, in the model's dtype; an encoder's token costs its decoder the
    same as one of its own. 0 for a model without attention."""
    config = model.config.get_text_config()
    count = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    layers = list(getattr(config, "per_layer_config", ()))  # Gemma 4's have heads of several sizes
    layers = layers if len(layers) == count else [config] * count
    numbers = 0
    for layer in layers:
        if heads := getattr(layer, "num_attention_heads", None):
            size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
            numbers += 2 * size * (getattr(layer, "num_key_value_heads", None) or heads)
    return numbers * next(model.parameters()).element_size()


class RaggedCache(Cache):
    """Keys and values of R rows, [R, K, C, D] a layer, allocated at first use. Each row fills its own front."""

    def __init__(self, rows: int, tokens: int):
        self.layers, self.rows, self.tokens = [], rows, tokens
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}  # (keys, values) by layer

    def start_pass(self, row_N: Tensor, position_N: Tensor, lengths: Sequence[int], is_prompt: bool) -> None:
        """Say what the next pass holds: for each token its row and position; for each row its tokens after the pass.

        A pass over prompts starts its rows anew; any other is one token for each of the rows 0 to B - 1.
        """
        self.row_N, self.position_N, self.lengths, self.is_prompt = row_N, position_N, lengths, is_prompt
        self.width = max(lengths) if is_prompt else min(self.tokens, row_tokens(max(lengths)))
        self.made: dict[object, Tensor] = {}  # indices and masks that all layers of this pass share

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values, [1, K, N, D]. Returns what attention reads: all that the running rows
        hold, or in a pass over prompts the new ones alone."""
        pair = key_states, value_states
        if layer_idx not in self.stored:
            # Zeros: an unwritten place is masked, but a NaN in it would not be.
            keys, values = (new.new_zeros(self.rows, new.shape[1], self.tokens, new.shape[3]) for new in pair)
            self.stored[layer_idx] = keys, values
        for store, new in zip(self.stored[layer_idx], pair, strict=True):
            places = self._places(new.shape[1])
            store.view(-1, new.shape[3]).index_copy_(0, places, new[0].reshape(-1, new.shape[3]))
        if self.is_prompt:
            return pair
        keys, values = (store[: len(self.lengths), :, : self.width] for store in self.stored[layer_idx])
        return keys, values

    def attend(
        self, module: nn.Module, query_1HND: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Causal attention of each row to itself alone, [1, N, H, D]; `window`: the last tokens that are seen."""
        if self.is_prompt:
            return self._attend_prompts(query_1HND, key, value, scale, window)
        rows, key_heads = key.shape[:2]
        # The query heads of one key head take the place of tokens: keys are not repeated.
        query_BKGD = query_1HND.transpose(1, 2).reshape(rows, key_heads, -1, query_1HND.shape[3])
        mask = self._mask(("step", window), query_1HND.dtype)
        out_BKGD = F.scaled_dot_product_attention(query_BKGD, key, value, mask, scale=scale)
        return out_BKGD.reshape(1, rows, query_1HND.shape[1], -1)

    def _attend_prompts(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        count, width, at_N = len(self.lengths), self.width, self._padded_places()

        def padded(new_1hND: Tensor) -> Tensor:
            whole = new_1hND.new_zeros(count * width, new_1hND.shape[1], new_1hND.shape[3])
            return whole.index_copy_(0, at_N, new_1hND[0].transpose(0, 1)).unflatten(0, (count, width)).transpose(1, 2)

        query, key, value = padded(query), padded(key), padded(value)
        mask = None if window is None or window >= width else self._mask(("prompt", window), query.dtype)
        # Padding is to the right, where causal attention never looks.
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).flatten(0, 1)[at_N][None]

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy what the rows `source` hold to the rows `target`, both int64 [M]."""
        for pair in self.stored.values():
            for store in pair:
                store[target, :, : self.width] = store[source, :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: transformers asks it for positions and masks, and both are given here."""
        return 0

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return sum(store.nbytes for pair in self.stored.values() for store in pair)

    def _places(self, heads: int) -> Tensor:
        """Index of each new (head, token) among all R x K x C places."""
        # Layers with as many heads write to the same places in a pass.
        if ("places", heads) not in self.made:
            head_K = torch.arange(heads, device=self.row_N.device)
            first_KN = (self.row_N * heads)[None, :] + head_K[:, None]
            self.made["places", heads] = (first_KN * self.tokens + self.position_N).flatten()
        return self.made["places", heads]

    def _padded_places(self) -> Tensor:
        """Index of each new token among the places of prompts that are padded to the longest, [N]."""
        if "padded" not in self.made:
            lengths = torch.tensor(self.lengths, device=self.row_N.device)
            row_N = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
            self.made["padded"] = row_N * self.width + self.position_N
        return self.made["padded"]

    def _mask(self, kind: tuple[str, int | None], dtype: torch.dtype) -> Tensor:
        """Minus infinity where a token must not look: behind its own place, and before its window."""
        if kind not in self.made:
            name, window = kind
            seen = torch.arange(self.width, device=self.row_N.device)
            at = seen[None, None, :, None] if name == "prompt" else self.position_N[:, None, None, None]
            hidden = seen > at
            if window is not None:
                hidden |= seen <= at - window
            self.made[kind] = torch.zeros(hidden.shape, dtype=dtype, device=seen.device).masked_fill(hidden, -torch.inf)
        return self.made[kind]


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


_cache: RaggedCache | Seq2SeqCache | None = None  # of the pass that runs now: `_attend` has no other way to it


@contextmanager
def serving(cache: RaggedCache | Seq2SeqCache) -> Iterator[None]:
    """Inside, layers that attend by `ATTENTION` attend to `cache`."""
    global _cache
    _cache = cache
    try:
        yield
    finally:
        _cache = None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    assert _cache is not None, "ragged attention outside of a decode loop"
    return _cache.attend(module, query, key, value, scaling, sliding_window), None


AttentionInterface.register(ATTENTION, _attend)  # and no mask under this name: models then make none
