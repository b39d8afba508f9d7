"""What has to be made of a model once, and what is loaded from it; sharded loading runs on two ranks."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from tests.models import load_cases
from tests.tiny import make_tokenizer, save_llama
from toolkit.models import load_model, load_tokenizer, shared_vocabulary
from toolkit.models.identity import file_hashes
from toolkit.models.load import base_name
from toolkit.pruning.made import materialize
from toolkit.settings import ModelConfig
from toolkit.settings.ds_files import OWNED, read_ds_config


def layers_of(model):
    found = getattr(model.base_model, "decoder", model.base_model)
    return found, "h" if hasattr(found, "h") else "layers"


def save_family(folder, family):
    if family == "llama":
        return save_llama(folder, make_tokenizer(), seed=5, layers=5)
    torch.manual_seed(5)
    if family == "gpt2":
        config = GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=5, n_head=2, initializer_range=0.2)
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        config = OPTConfig(
            vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=5, num_attention_heads=2, init_std=0.2,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )  # fmt: skip
        OPTForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("in_shards", [False, True])
def test_leaving_layers_out_is_the_model_without_them(tmp_path, family, in_shards):
    path = save_family(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    if in_shards:
        path = str(tmp_path / "shards")
        model.save_pretrained(path, max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    short = materialize(ModelConfig(path=path, drop_layers=(1, 3)), tmp_path / "cache")
    found = AutoModelForCausalLM.from_pretrained(short).eval()
    owner, name = layers_of(model)
    kept = [layer for index, layer in enumerate(getattr(owner, name)) if index not in (1, 3)]
    setattr(owner, name, torch.nn.ModuleList(kept))
    model.config.num_hidden_layers = 3
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(found(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert found.config.num_hidden_layers == 3


def test_leaving_layers_out_is_done_once_and_checked(tmp_path):
    path = save_llama(tmp_path / "model", make_tokenizer(), seed=5, layers=3)
    first = materialize(ModelConfig(path=path, drop_layers=(1,)), tmp_path / "cache")
    made = (tmp_path / "cache" / first / "model.safetensors").stat().st_mtime_ns
    assert materialize(ModelConfig(path=path, drop_layers=(1,)), tmp_path / "cache") == first
    assert (tmp_path / "cache" / first / "model.safetensors").stat().st_mtime_ns == made
    assert load_tokenizer(ModelConfig(path=path), first).get_vocab() == make_tokenizer().get_vocab()
    for wrong in ((3,), (0, 1, 2), (-1,)):
        with pytest.raises(ValueError, match="has layers 0 to 2"):
            materialize(ModelConfig(path=path, drop_layers=wrong), tmp_path / "cache")
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [first.rpartition("/")[2]]  # nothing half-made


def test_folders_that_are_not_models_are_named(tmp_path):
    with pytest.raises(ValueError, match="no model folder at"):
        materialize(ModelConfig(path=f"{tmp_path}/nowhere"), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"no config\.json"):
        materialize(ModelConfig(path=str(tmp_path)), tmp_path / "cache")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weights"):
        materialize(ModelConfig(path=str(tmp_path)), tmp_path / "cache")
    with pytest.raises(ValueError, match="no GGUF file"):
        materialize(ModelConfig(path=f"{tmp_path}/model.gguf"), tmp_path / "cache")
    with pytest.raises(ValueError, match="package no_such is not installed"):
        materialize(ModelConfig(path="package:no_such"), tmp_path / "cache")


def test_tokenizers_have_to_agree(tmp_path):
    ours, theirs = make_tokenizer(), make_tokenizer()
    vocabulary = shared_vocabulary(ours, theirs)
    assert vocabulary.size == len(ours) and vocabulary.eos_ids == (ours.eos_token_id,)
    theirs.add_tokens(["extra"])
    with pytest.raises(ValueError, match=f"{len(theirs)} and {len(ours)} entries; 'extra' is id"):
        shared_vocabulary(theirs, ours)
    with pytest.raises(ValueError, match="no EOS token"):
        make_tokenizer(eos=False).save_pretrained(tmp_path / "no_eos")
        load_tokenizer(ModelConfig(), str(tmp_path / "no_eos"))


@pytest.mark.parametrize("key", OWNED)
def test_a_ds_config_may_not_set_what_the_run_owns(tmp_path, key):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, key: 1}))
    with pytest.raises(ValueError, match=f"'{key}', which belongs to"):
        read_ds_config(str(tmp_path / "ds.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ('{"zero_optimization": {"stage": "auto"}}', '"auto"'), (None, "no DeepSpeed config at")],
)
def test_a_ds_config_that_cannot_be_used(tmp_path, text, message):
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ds_config(str(tmp_path / "ds.json"))


@pytest.mark.multiprocess
def test_weights_are_partitioned_and_whole_when_gathered(tiny, ranks2):
    saved = AutoModelForCausalLM.from_pretrained(tiny / "tied").state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        for local, gathered in ranks2.run(load_cases.loaded, f"{tiny}/tied", dtype):
            assert local == 0  # nothing of a large parameter outside its partition
            for name, tensor in gathered.items():
                assert tensor.dtype == dtype
                torch.testing.assert_close(tensor, saved[name].to(dtype), rtol=0, atol=0)


@pytest.mark.multiprocess
def test_random_weights_are_alike_on_all_ranks(ranks2):
    shape = dict(
        model_type="llama", vocab_size=64, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=128, initializer_range=0.1,
    )  # fmt: skip
    model = ModelConfig(random_weights=True, shape=shape, num_layers=2)
    (_, first), (_, second) = ranks2.run(load_cases.loaded, "", torch.float32, model)
    assert first.keys() == second.keys() and len([name for name in first if "q_proj" in name]) == 2
    for name in first:
        assert torch.equal(first[name], second[name])
        if "proj" in name:
            assert first[name].std().item() == pytest.approx(0.1, rel=0.1)
        if "norm" in name:
            assert (first[name] == 1).all()


def test_a_hub_name_is_fetched_whole_before_it_is_hashed(tmp_path, monkeypatch):
    """A model in the hub's own cache, with safetensors or with older .bin weights beside another format's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, weights in (("new", "model.safetensors"), ("old", "pytorch_model.bin")):
        cached, revision = tmp_path / f"models--someone--{name}", "0" * 40
        folder = cached / "snapshots" / revision
        save_llama(folder, make_tokenizer(), seed=5, layers=2)
        if name == "old":
            torch.save(load_file(folder / "model.safetensors"), folder / weights)
            (folder / "model.safetensors").unlink()
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(revision)
        assert materialize(ModelConfig(path=f"someone/{name}"), tmp_path / "ours") == str(folder)
        assert weights in file_hashes(str(folder))
        dropped = ModelConfig(path=f"someone/{name}", drop_layers=(0,))
        short = materialize(dropped, tmp_path / "ours")
        assert len(AutoModelForCausalLM.from_pretrained(short).model.layers) == 1
        assert base_name(ModelConfig(path=f"someone/{name}"), str(folder)) == f"someone/{name}"
        assert base_name(dropped, short) == short
        # Where it was fetched at another time it is the same; its next version is another one, under the same name.
        for file in folder.iterdir():
            os.utime(file, (1e9, 1e9))
        assert materialize(dropped, tmp_path / "ours") == short
        shutil.copytree(folder, folder.with_name("1" * 40))
        (cached / "refs" / "main").write_text("1" * 40)
        other = materialize(dropped, tmp_path / "ours")
        pinned = dataclasses.replace(dropped, path=f"someone/{name}@{revision}")
        assert materialize(pinned, tmp_path / "ours") == short
        assert materialize(ModelConfig(path=pinned.path), tmp_path / "ours") == str(folder)
        assert other != short and file_hashes(other) == file_hashes(short)
    wanted = "the model someone/missing could not be had from the hub, and there is no folder /.*/someone/missing:"
    with pytest.raises(ValueError, match=wanted):
        materialize(ModelConfig(path="someone/missing"), tmp_path / "ours")


def test_a_model_is_known_by_what_is_loaded_of_it(tiny, tmp_path):
    folder = shutil.copytree(tiny / "student", tmp_path / "model")
    before = file_hashes(str(folder))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= before.keys()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "all_results.json", "pruning.json", "notes.txt"):
        (folder / name).write_text("{}")
    assert file_hashes(str(folder)) == before
    (folder / "modeling_own.py").write_text("")
    assert file_hashes(str(folder)) != before


def test_weights_in_shards_are_those_of_the_index(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny / "student")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 1
    (tmp_path / "model-00009-of-00009.safetensors").write_text("")
    found = file_hashes(str(tmp_path)).keys()
    assert {name for name in found if "safetensors" in name} == shards | {"model.safetensors.index.json"}
    # transformers reads a single file, where there is one, and not what the index names.
    shutil.copy(tiny / "teacher" / "model.safetensors", tmp_path)
    shutil.copy(tiny / "teacher" / "config.json", tmp_path)
    wanted, loaded = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny / "teacher", tmp_path))
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    found = file_hashes(str(tmp_path)).keys()
    assert {name for name in found if "safetensors" in name} == {"model.safetensors"}


@pytest.mark.parametrize(("shape", "told"), [
    ({"hiden_size": 8}, "did you mean 'hidden_size'"), ({"hidden_size": "x"}, "hidden_size"),
    ({"hidden_size": 30, "num_attention_heads": 4}, "30"), ({"model_type": "lama"}, "lama"),
])  # fmt: skip
def test_a_shape_that_is_no_model_is_refused(shape, told):
    model = ModelConfig(random_weights=True, shape={"model_type": "llama", "num_hidden_layers": 1} | shape)
    with pytest.raises(ValueError) as error:
        load_model(model, "", {"train_micro_batch_size_per_gpu": 1}, torch.float32)
    assert told in str(error.value)
