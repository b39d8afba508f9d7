"""What of a model's files does not fit its configuration, in whole loads and under ZeRO-3, is told or refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import FAMILIES, made
from tests.models import load_cases
from toolkit.models.dtypes import dtypes_of
from toolkit.models.fit import quiet, rehearse
from toolkit.models.load import load_model
from toolkit.settings import ModelConfig


@pytest.fixture
def saved(tmp_path):
    """A folder of one family with other weights in it, by a function of those that were there, or other settings."""

    def save(family, change=lambda weights: {}, settings=None, **shape):
        folder = tmp_path / family
        made(family, **shape).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        for name, weight in change(weights).items():
            weights.pop(name, None)
            if weight is not None:
                weights[name] = weight.clone().contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        configure(folder, **(settings or {}))
        return str(folder)

    return save


def configure(folder, **settings):
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def loaded(path, **model):
    """A whole load."""
    return load_model(ModelConfig(path=path, **model), path, None, torch.float32)


def with_layer(number, weights):
    """The weights of the last layer once more, as those of another one."""
    last = max(int(found[1]) for name in weights if (found := re.search(r"\.(\d+)\.", name)))
    return {
        name.replace(f".{last}.", f".{number}.", 1): weight for name, weight in weights.items() if f".{last}." in name
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rehearsal_finds_what_transformers_finds_in_a_whole_load(saved, family):
    """Missing and unexpected names, through conversions of names and merges of experts, and every dtype in bf16."""

    def change(weights):
        some = next(name for name in sorted(weights) if "norm" in name or "ln_" in name)
        return {some: None, "other.weight": torch.zeros(2), **with_layer(7, weights)}

    path = saved(family, change)
    config = AutoConfig.from_pretrained(path)
    shape, found = rehearse(type(made(family)), path, config, torch.bfloat16)
    with quiet():
        whole, wanted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
    assert found == wanted and found["missing_keys"] and "other.weight" in found["unexpected_keys"]
    assert dtypes_of(shape) == dtypes_of(whole)


def test_layers_past_those_of_the_configuration_are_refused_unless_they_were_to_be_left_out(saved, capsys):
    path = saved("llama", settings={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"hold layers\.2, and by config\.json the model has 2 of them .*num_layers=2"):
        loaded(path)
    assert len(loaded(path, num_layers=1).model.layers) == 1
    path = saved("gpt2", lambda weights: with_layer(3, weights))
    with pytest.raises(ValueError, match=r"hold h\.3, and by config\.json the model has 3 of them"):
        loaded(path)
    assert "warning" not in capsys.readouterr().out


def test_files_of_gpt2_have_names_without_a_prefix_and_hold_masks(saved, capsys):
    def change(weights):
        names = {name: name.removeprefix("transformer.") for name in weights}
        assert names["transformer.wte.weight"] == "wte.weight"
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4) for layer in range(3)}
        return dict.fromkeys(names) | {short: weights[name] for name, short in names.items()} | masks

    path = saved("gpt2", change)
    loaded(path)
    assert "warning" not in capsys.readouterr().out
    configure(path, n_layer=2)
    with pytest.raises(ValueError, match=r"hold h\.2, and by config\.json the model has 2 of them"):
        loaded(path)


def test_layers_that_predict_further_tokens_are_left_out_without_a_word(saved, capsys):
    """DeepSeek-V3 and GLM-4.5 have one after their own, with parts that those do not have."""

    def change(weights):
        own = ("eh_proj", "enorm", "shared_head.head")
        return with_layer(3, weights) | {f"model.layers.3.{name}.weight": torch.zeros(2) for name in own}

    for family in ("deepseek_v3", "glm4_moe"):
        loaded(saved(family, change, settings={"num_nextn_predict_layers": 1}))
        assert "warning" not in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"hold layers\.4, and by config\.json the model has 3"):
            loaded(saved(family, lambda weights: change(weights) | with_layer(4, weights)))


def test_other_tensors_are_told_once_by_name(saved, capsys):
    """Biases and norms that the configuration does not ask for: the model would be another one without a word."""

    def change(weights):
        biases = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.zeros(32) for layer in range(3)}
        return biases | {"value_head.weight": torch.zeros(2), "model.rotary_emb.inv_freq": torch.zeros(4)}

    loaded(saved("llama", change))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "hold 4 tensors that the llama model of config.json does not have" in said
    assert said.endswith("left out: model.layers.*.self_attn.q_proj.bias (3 times), value_head.weight")


def test_what_is_missing_or_has_another_shape_is_refused_with_its_name(saved):
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=f"lack 1 parameters of the configuration, the first is {name}; "):
        loaded(saved("llama", lambda weights: {name: None}))
    with pytest.raises(ValueError, match=f"lack 1 parameters .* the first is {name}, and hold k.weight, which it does"):
        loaded(saved("llama", lambda weights: {name: None, "k.weight": weights[name]}))
    shapes = r"6 of them: model.layers.0.self_attn.k_proj.weight is \[16, 32\] in the files and \[8, 32\] by config"
    with pytest.raises(ValueError, match=shapes):
        loaded(saved("llama", settings={"num_key_value_heads": 1}))
    with pytest.raises(ValueError, match=r"could not be loaded: .*(?s:.*)experts"):
        loaded(saved("qwen3_moe", lambda weights: {"model.layers.1.mlp.experts.3.up_proj.weight": None}))


def test_weights_in_shards_and_in_the_older_format_are_looked_at_as_well(saved, tmp_path):
    path = saved("llama")
    for name, kwargs in (("shards", {"max_shard_size": "20KB"}), ("old", {})):
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / name, **kwargs)
        configure(tmp_path / name, num_hidden_layers=2)
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    weights = tmp_path / "old" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "old" / "pytorch_model.bin")
    weights.unlink()
    for name in ("shards", "old"):
        with pytest.raises(ValueError, match=r"hold layers\.2, and by config\.json the model has 2 of them"):
            loaded(f"{tmp_path}/{name}")


def test_what_a_models_own_code_does_not_train_stays_so(saved):
    """transformers replaces it by the file's tensor, which it would train, and weight decay would pull at it."""
    for random in (False, True):
        parameters = loaded(saved("ernie4_5_moe"), random_weights=random).named_parameters()
        frozen = [name.rpartition(".")[2] for name, parameter in parameters if not parameter.requires_grad]
        assert frozen == ["e_score_correction_bias"] * 3


@pytest.mark.multiprocess
def test_a_rank_whose_files_do_not_fit_ends_the_others_as_well(saved, tmp_path, ranks2):
    short = saved("llama", settings={"num_hidden_layers": 2})
    whole = saved("mistral")
    for paths in ([whole, short], [short, whole]):
        said = ranks2.run(load_cases.load_errors, paths)
        assert said[0] == said[1] and "hold layers.2" in said[0]
