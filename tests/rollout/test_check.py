"""Families in the decode loops, each held by the check itself against passes over whole texts."""

import pytest
import torch
import transformers as tf

from toolkit.models import whole_student
from toolkit.models.vocabulary import Vocabulary
from toolkit.rollout import decode
from toolkit.rollout.check import check_generation
from toolkit.rollout.local import GatheredRollout

VOCABULARY = Vocabulary(90, (2,), 2)
SIZES = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
SHAPE = dict(**SIZES, num_key_value_heads=2, intermediate_size=48)
GPT = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
MAMBA = dict(mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=5)),
    # The rest takes the loop with padding: soft caps, sinks, ALiBi, convolutions, recurrence.
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SHAPE, head_dim=8, query_pre_attn_scalar=8)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(
        **SHAPE, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=1)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)),
    "lfm2": lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])),
    "qwen3_next": lambda: tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(
        **SHAPE, **LINEAR, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=0)),
    "granite_hybrid": lambda: tf.GraniteMoeHybridForCausalLM(tf.GraniteMoeHybridConfig(
        **SHAPE, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=48,
        mamba_n_heads=8)),
    "falcon_h1": lambda: tf.FalconH1ForCausalLM(tf.FalconH1Config(
        **SHAPE, **MAMBA, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)),
}  # fmt: skip
REFUSED = {
    "recurrent_gemma": lambda: tf.RecurrentGemmaForCausalLM(tf.RecurrentGemmaConfig(
        **SHAPE, lru_width=32, attention_window_size=16)),
    # its window lies in a mask that the loop does not ask for
    "phimoe": lambda: tf.PhimoeForCausalLM(tf.PhimoeConfig(**SHAPE, sliding_window=5, num_local_experts=2)),
}  # fmt: skip


def checked(make):
    torch.manual_seed(5)
    check_generation("student", GatheredRollout(whole_student(make().eval(), VOCABULARY).engine, VOCABULARY))


@pytest.mark.parametrize("name", MODELS)
def test_text_is_what_whole_passes_say(name):
    checked(MODELS[name])


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_the_loops_do_not_fit_is_refused(name):
    with pytest.raises(ValueError, match=r"cannot be made to speak by the decode loops here: .*schedule\.policy=off"):
        checked(REFUSED[name])


def test_a_loop_that_is_wrong_is_found(monkeypatch):
    """One place off, as a cache that is mixed up would be."""
    attend = decode.RaggedCache._mask

    def off_by_one(self, kind, dtype):
        self.made.clear()
        self.position_N = self.position_N - 1
        found = attend(self, kind, dtype)
        self.position_N = self.position_N + 1
        return found

    monkeypatch.setattr(decode.RaggedCache, "_mask", off_by_one)
    with pytest.raises(ValueError, match="token by token it says other text than in one pass"):
        checked(MODELS["llama"])
