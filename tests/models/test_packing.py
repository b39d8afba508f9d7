"""Texts packed into one row give the loss and the gradients that they give apart."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tests.families import KEEPS_TEXTS_APART, LEAKS, made
from tests.run import run_cases
from tests.tiny import make_tokenizer, tiny_overrides
from toolkit.batch import Example, make_window
from toolkit.models import Vocabulary, check_packing, whole_student
from toolkit.models.engines import response_hidden
from toolkit.models.packing import measure
from toolkit.teachers.live import whole_teacher

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, initializer_range=0.2)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4, initializer_range=0.2)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4, initializer_range=0.2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            initializer_range=0.2,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            dropout=0,
            init_std=0.2,
        )
    ),
}


def examples():
    rng = np.random.default_rng(5)
    drawn = [Example(rng.integers(3, 64, n), int(rng.integers(1, n))) for n in (31, 17, 12, 9, 9, 6, 4, 3)]
    # the same text twice: a model that looked back would find the answer
    return [*drawn, Example(drawn[2].tokens, 1), Example(rng.integers(3, 64, 20), 1, text_starts=(7, 8, 15))]


def loss_and_gradients(model, window):
    """Mean cross entropy of all response tokens, and each parameter's gradient."""
    model.zero_grad()
    total = sum(
        torch.nn.functional.cross_entropy(
            model.get_output_embeddings()(response_hidden(model, batch)), batch.targets_N, reduction="sum"
        )
        for batch in window
    )
    loss = total / sum(batch.num_targets for batch in window)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found, wanted):
    assert found[1].keys() == wanted[1].keys()
    worst = max((found[1][name] - wanted[1][name]).abs().max().item() for name in wanted[1])
    return abs(found[0] - wanted[0]), worst


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_sorted_and_one_by_one_are_the_same(name, attention):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    bounds = [(e, (0, *e.text_starts, len(e.tokens))) for e in examples()]
    parts = [Example(e.tokens[a:b], e.prompt_length) for e, at in bounds for a, b in pairwise(at) if b - a > 1]
    alone = loss_and_gradients(model, make_window(parts, 1, pad_id=0))
    for window in (
        make_window(examples(), 10, pad_id=0, pack_to=40),
        make_window(examples(), 5, pad_id=0, pack_to=64),
        make_window(examples(), 5, pad_id=0),
    ):
        loss, gradients = difference(loss_and_gradients(model, window), alone)
        assert loss < 1e-5 and gradients < 1e-5, (loss, gradients)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_in_the_single_row_that_flash_attention_needs_it_is_the_same(name, monkeypatch):
    """The inputs as they are made for it, here with another attention."""
    torch.manual_seed(0)
    model, window = MODELS[name](), make_window(examples(), 5, pad_id=0, pack_to=64)
    wanted, base, shapes = loss_and_gradients(model, window), model.base_model, []
    forward = base.forward

    def run(input_ids, position_ids, **options):
        shapes.append(tuple(input_ids.shape))
        base.config._attn_implementation = "sdpa"
        try:
            return forward(input_ids=input_ids, position_ids=position_ids, **options)
        finally:
            base.config._attn_implementation = "flash_attention_2"

    monkeypatch.setattr(base, "forward", run)
    monkeypatch.setattr(base.config, "_attn_implementation_internal", "flash_attention_2")
    found = loss_and_gradients(model, window)
    assert shapes == [(1, batch.input_ids_BT.numel()) for batch in window] and len(window[0].input_ids_BT) > 1
    assert max(difference(found, wanted)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_positions_that_start_over_it_is_not_the_same(name):
    torch.manual_seed(0)
    model, (batch,) = MODELS[name](), make_window(examples(), 10, pad_id=0, pack_to=64)
    right = loss_and_gradients(model, [batch])
    positions_BT = torch.arange(batch.input_ids_BT.shape[1]).expand_as(batch.input_ids_BT)
    object.__setattr__(batch, "position_ids_BT", positions_BT)
    assert difference(loss_and_gradients(model, [batch]), right)[1] > 1e-3


VOCABULARY = Vocabulary(96, (1,), 0)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", LEAKS)
def test_a_family_whose_texts_see_each_other_is_refused_as_student_and_as_teacher(family, dtype):
    leaks = made(family).to(dtype)
    refusal = f", an? {leaks.config.model_type} model, does not keep several texts in one row apart"
    with pytest.raises(ValueError, match="the student" + refusal):
        check_packing("student", whole_student(leaks, VOCABULARY).engine, VOCABULARY)
    with pytest.raises(ValueError, match="the teacher" + refusal):
        check_packing("teacher", whole_teacher(leaks, VOCABULARY).engine, VOCABULARY)


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1", "jamba"])
def test_a_leak_is_seen_where_the_layers_hardly_matter_yet(family):
    """Weights as small as these families begin with, at a width at which they do little to the embeddings."""
    model = made(family, hidden_size=64, intermediate_size=96, initializer_range=0.02).to(torch.bfloat16)
    student = whole_student(model, VOCABULARY)
    with pytest.raises(ValueError, match="does not keep several texts"):
        check_packing("student", student.engine, VOCABULARY)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", KEEPS_TEXTS_APART)
def test_a_family_that_keeps_texts_apart_is_packed(family, dtype):
    model = made(family).to(dtype)
    for role, built in (("teacher", whole_teacher(model, VOCABULARY)), ("student", whole_student(model, VOCABULARY))):
        check_packing(role, built.engine, VOCABULARY)


def test_rounding_that_sends_tokens_to_other_experts_is_no_leak():
    """As on a GPU, where other groups of tokens are multiplied by other kernels: here each product is rounded anew."""
    draw = torch.Generator().manual_seed(0)
    model = made("qwen3_moe", num_hidden_layers=12, num_experts=32).to(torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(
            lambda module, inputs, out: (out * (1 + 2**-9 * torch.randn(out.shape, generator=draw))).to(out.dtype)
        )
    student = whole_student(model, VOCABULARY)
    assert measure(student.engine, VOCABULARY).by_neighbours > 2e-3
    check_packing("student", student.engine, VOCABULARY)


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_that_count_on_are_refused(dtype):
    model = made("gpt2").to(dtype)
    model.transformer.wpe.register_forward_pre_hook(
        lambda module, inputs: torch.arange(inputs[0].shape[1]).expand_as(inputs[0])
    )
    with pytest.raises(ValueError, match="does not keep several texts"):
        check_packing("student", whole_student(model, VOCABULARY).engine, VOCABULARY)


@pytest.mark.multiprocess
def test_a_model_that_does_not_keep_texts_apart_is_refused(tiny, ranks1, tmp_path):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    for settings in (
        {"data.packing": True},
        {"text.source": f"{tiny}/rows.jsonl", "text.field": "response", "text.max_length": 32},
    ):
        code, said = ranks1.run(
            run_cases.run_expecting_exit,
            tiny_overrides(tiny, student__path=f"{tmp_path}/bloom", output_dir=f"{tmp_path}", **settings),
        )[0]
        assert code == 2 and "the student, a bloom model, does not keep several texts in one row apart" in said
