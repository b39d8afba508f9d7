"""Packed weights against the layers that they stand in for."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from toolkit.rollout.packed import packed_weights, packs

LLAMA = LlamaConfig(
    vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=80, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
}


def make(name, dtype=torch.float32):
    torch.manual_seed(5)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # biases too, which start as zeros
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 40)])
def test_packed_layers_say_what_the_plain_ones_say(name, shape):
    model, ids = make(name), torch.randint(0, 96, shape)
    wanted = model(ids).logits
    with packed_weights(model):
        called = {module for module in model.modules() if "forward" in vars(module)}
        found = model(ids).logits
    assert packs(model) and len(called) == {"llama": 2 * 7 + 1, "gpt2": 2 * 4 + 1}[name]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(ids).logits, wanted)


@torch.no_grad()
def test_packed_bf16_is_as_near_to_fp32_as_plain_bf16():
    exact, half, ids = make("llama"), make("llama", torch.bfloat16), torch.randint(0, 96, (2, 20))
    exact.load_state_dict(half.state_dict())
    wanted = exact(ids).logits
    plain = (half(ids).logits.float() - wanted).norm()
    with packed_weights(half):
        packed = (half(ids).logits.float() - wanted).norm()
    assert 0 < packed < 1.2 * plain


@torch.no_grad()
def test_each_call_packs_the_weights_of_its_time_and_a_failure_leaves_nothing():
    model, ids = make("llama"), torch.randint(0, 96, (1, 5))
    with packed_weights(model):
        before = model(ids).logits
    model.lm_head.weight.mul_(2)
    with pytest.raises(MemoryError, match="made to fail"), packed_weights(model):
        after = model(ids).logits
        raise MemoryError("made to fail")
    torch.testing.assert_close(after, model(ids).logits, atol=1e-4, rtol=1e-5)
    assert (after - before).abs().max() > 0.1
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_dtype_that_the_cpu_does_not_multiply_is_left_alone():
    model = make("llama", torch.float64)
    with packed_weights(model):
        assert not packs(model) and not any("forward" in vars(module) for module in model.modules())
