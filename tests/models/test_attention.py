"""Attention by products: the numbers of transformers' own, and where it stands aside."""

from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from toolkit.models import attention as by_products

ROWS, QUERIES, SIZE = 3, 40, 16


class Layer(nn.Module):
    """What transformers' function reads of a layer."""

    def __init__(self, groups, is_causal=True):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


def inputs(heads, kv_heads, keys=QUERIES, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, heads, QUERIES, SIZE), (ROWS, kv_heads, keys, SIZE), (ROWS, kv_heads, keys, SIZE)]
    # As models have them: views of [rows, tokens, heads, size].
    made = [torch.randn(shape, generator=generator).transpose(1, 2).contiguous().transpose(1, 2) for shape in shapes]
    return [tensor.to(torch.bfloat16).to(dtype).requires_grad_() for tensor in made]


def texts_of_a_row():
    """True where a query sees a key: texts of 1, 15 and 24 tokens in a row, and in the last row padding that sees
    itself alone."""
    text = torch.tensor([0] + [1] * 15 + [2] * 24)
    mask = (text[:, None] == text) & torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril()
    masks = mask.repeat(ROWS, 1, 1, 1)
    masks[-1, :, 20:] = torch.eye(QUERIES, dtype=torch.bool)[20:]
    return masks


def outcome(attention, layer, tensors, mask, **named):
    out, _ = attention(layer, *tensors, mask, **named)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    (out.float() * weights).sum().backward()
    return [out.detach().float(), *(tensor.grad.float() for tensor in tensors)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", ["causal", "packed", "all", "an encoder"])
def test_values_and_gradients_are_those_of_transformers(heads, kv_heads, masked):
    layer = Layer(heads // kv_heads, is_causal=masked == "causal")
    mask = texts_of_a_row() if masked == "packed" else None
    if masked == "an encoder":
        mask = torch.ones(ROWS, 1, 1, QUERIES, dtype=torch.bool).index_fill(3, torch.arange(30, QUERIES), False)
    named = {} if masked == "causal" else {"scaling": 0.3}
    exact = outcome(sdpa_attention_forward, layer, inputs(heads, kv_heads, dtype=torch.float32), mask, **named)
    theirs = outcome(sdpa_attention_forward, layer, inputs(heads, kv_heads), mask, **named)
    with mock.patch.object(by_products, "sdpa_attention_forward", side_effect=AssertionError("stands aside")):
        ours = outcome(by_products.attention, layer, inputs(heads, kv_heads), mask, **named)
    for wanted, found, other in zip(exact, ours, theirs, strict=True):
        error, theirs_error = ((x - wanted).norm() / wanted.norm() for x in (found, other))
        # Scores are rounded to bf16, as by transformers' eager attention, where torch's kernel keeps them in fp32.
        assert error <= 1.5 * theirs_error + 0.002 and error < 0.01


def test_rows_that_see_nothing_give_no_nan():
    mask = texts_of_a_row()
    mask[0, :, 5] = False
    found = outcome(by_products.attention, Layer(1), inputs(2, 2), mask)
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": torch.float32}, {}), ({}, {"dropout": 0.5}), ({"keys": 64}, {"is_causal": True}),
        ({}, {"position_bias": torch.zeros(1, 2, QUERIES, QUERIES)}),
    ],
)  # fmt: skip
def test_it_stands_aside_where_torch_has_the_better_or_only_way(change, named):
    with mock.patch.object(by_products._ByProducts, "apply", side_effect=AssertionError("taken")):
        by_products.attention(Layer(1), *inputs(2, 2, **change), None, **named)
        one_query = [tensor[:, :, :1].detach() for tensor in inputs(2, 2)]
        by_products.attention(Layer(1), *one_query, None)
        with mock.patch.object(by_products, "MOST_SCORE_BYTES", 2 * ROWS * 2 * QUERIES * QUERIES - 1):
            by_products.attention(Layer(1), *inputs(2, 2), None)
        with by_products.as_transformers_does():
            by_products.attention(Layer(1), *inputs(2, 2), None)


def test_models_of_transformers_take_it_once_it_is_installed():
    before = AttentionInterface._global_mapping["sdpa"]
    try:
        by_products.install()
        assert AttentionInterface()["sdpa"] is by_products.attention
    finally:
        AttentionInterface.register("sdpa", before)
