"""Attention on a CPU by bf16 matrix products, in the place of torch's fused kernel for it.

torch 2.13's CPU kernel of scaled_dot_product_attention takes 2 to 7 times as long for the short rows of a training
step, most of it in its backward pass (`benchmarks/attention.py`). Longer rows, fp32 and GPUs keep torch's, which writes
no scores to memory.

Shapes: B rows, G heads of queries, K heads of keys and values, S queries, T keys, D numbers of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

#: scores of more than this, in bf16, are torch's
MOST_SCORE_BYTES = 32 * 2**20
#: fewer queries than this are a step of generation, which makes one row of scores
LEAST_QUERIES = 16
#: what a score becomes where a query may not look: exp of it is 0, and rows without any key have no NaN
HIDDEN = torch.finfo(torch.bfloat16).min

_is_on = True


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **named: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' `sdpa_attention_forward`, and as it is called: query [B, G, S, D], key and value [B, K, T, D], a
    mask of bools [B, 1, S, T] whose True are seen; returns [B, S, G, D]."""
    if dropout or not _is_taken(query, key, value, attention_mask) or any(v is not None for v in _beside(named)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **named
        )
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_BGSD = _ByProducts.apply(query, key, value, attention_mask, scale)
    return out_BGSD.transpose(1, 2).contiguous(), None


def install() -> None:
    """Let the models of transformers whose attention is "sdpa" take `attention`."""
    AttentionInterface.register("sdpa", attention)


@contextmanager
def as_transformers_does() -> Iterator[None]:
    """Inside, `attention` is transformers' own: what a check compares with."""
    global _is_on
    _is_on = False
    try:
        yield
    finally:
        _is_on = True


def _beside(named: dict[str, Any]) -> list[Any]:
    """Arguments of some families that change scores."""
    return [named.get(name) for name in ("position_bias", "softcap", "s_aux")]


def _is_taken(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    rows, heads, queries, size = query.shape
    return (
        _is_on
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16 == key.dtype == value.dtype
        and queries >= LEAST_QUERIES
        and 2 * rows * heads * queries * key.shape[2] <= MOST_SCORE_BYTES
        and heads % key.shape[1] == 0
        and size == value.shape[-1]
        and (mask is not None or queries == key.shape[2])
        and (mask is None or mask.dtype == torch.bool)
    )


class _ByProducts(torch.autograd.Function):
    """softmax(scale q k^T) v, with scores and probabilities in bf16, as they are multiplied; torch's softmax of bf16
    computes in fp32. The query heads that share a head of keys are rows of one product, so that keys and values are
    never repeated."""

    @staticmethod
    def forward(ctx: Any, q_BGSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        rows, heads, queries, size = q_BGSD.shape
        keys, pairs = k_BKTD.shape[2], rows * k_BKTD.shape[1]
        # Queries take the scale: they are fewer than scores, and of most head sizes it is a power of 2, which is exact.
        q = (q_BGSD * scale).reshape(pairs, -1, size)
        k, v = k_BKTD.reshape(pairs, keys, size), v_BKTD.reshape(pairs, keys, size)
        scores_BGST = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, queries, keys)
        if mask is not None:
            scores_BGST.masked_fill_(~mask, HIDDEN)
        p = scores_BGST.softmax(-1).view(pairs, -1, keys)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.shapes = scale, (q_BGSD.shape, k_BKTD.shape)
        return torch.bmm(p, v).view(q_BGSD.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        of_queries, of_keys = ctx.shapes
        grad = grads[0].reshape(q.shape)
        # Where a mask hides a key its probability is 0, and so is the gradient of its score.
        grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(ctx.scale)
        grad_k, grad_v = torch.bmm(grad_scores.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), grad)
        return grad_q.view(of_queries), grad_k.view(of_keys), grad_v.view(of_keys), None, None
