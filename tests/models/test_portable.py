"""Model folders that this project writes, as others read them: an older transformers, another user."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.models.read_by_transformers4 import TEXT, found_in
from tests.tiny import make_tokenizer, save_sentencepiece, save_t5
from toolkit.models import load_model, load_tokenizer
from toolkit.models.export import export_student, rehearse_export
from toolkit.models.lora import add_adapters
from toolkit.models.portable import make_portable, with_former_names
from toolkit.pruning.made import materialize
from toolkit.run.stages import _write_random
from toolkit.settings import LoraConfig, ModelConfig

#: with the packages that it needs in other versions than the project
TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
BASE = {"rope_theta": 50000.0, "rope_type": "default"}
YARN = BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 3.5]}
LONGROPE = BASE | {"rope_type": "longrope", "original_max_position_embeddings": 64} | FACTORS
LAYERS = ["sliding_attention", "full_attention"]
BY_LAYER = {
    "sliding_attention": {"rope_theta": 3000.0, "rope_type": "default"},
    "full_attention": BASE | {"rope_type": "linear", "factor": 8.0},
}
SCALED = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}
SMALL = dict(
    vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
MAMBA = dict(
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, shared_intermediate_size=32, position_embedding_type="rope"
)  # fmt: skip
#: name -> shape of a tiny model, and what its config.json has beside rope_parameters. It is what transformers 4.57
#: wrote of the same model.
FAMILIES = {
    "llama": (dict(rope_parameters=BASE), {"rope_theta": 50000.0}),
    "qwen3": (dict(rope_parameters=YARN, head_dim=8), {"rope_theta": 50000.0, "rope_scaling": SCALED}),
    "olmo2": (
        dict(rope_parameters=BASE | {"rope_type": "linear", "factor": 2.0}),
        {"rope_theta": 50000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "phi3": (
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=64),
        {
            "rope_theta": 50000.0, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope"} | FACTORS,
        },
    ),
    "mistral": (
        dict(rope_parameters=LONGROPE),
        {
            "rope_theta": 50000.0, "original_max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 64} | FACTORS,
        },
    ),
    "glm4": (
        dict(rope_parameters=BASE | {"partial_rotary_factor": 0.5}, head_dim=8),
        {"rope_theta": 50000.0, "partial_rotary_factor": 0.5},
    ),
    "gpt_neox": (
        dict(rope_parameters=BASE | {"partial_rotary_factor": 0.5}),
        {"rotary_emb_base": 50000.0, "rotary_pct": 0.5},
    ),
    "gemma3_text": (
        dict(rope_parameters=BY_LAYER, layer_types=LAYERS, sliding_window=16, head_dim=8, query_pre_attn_scalar=8),
        {
            "rope_theta": 50000.0, "rope_local_base_freq": 3000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gpt_oss": (  # both versions scale its positions by default
        dict(rope_parameters=BASE, layer_types=LAYERS, sliding_window=16, head_dim=8, **EXPERTS),
        {"rope_theta": 50000.0, "rope_scaling": {"rope_type": "default"}},
    ),
    "modernbert-decoder": (
        dict(rope_parameters=dict.fromkeys(LAYERS, BASE), layer_types=LAYERS, cls_token_id=0, sep_token_id=1),
        {"global_rope_theta": 50000.0, "local_rope_theta": 50000.0},
    ),
    "qwen3_moe": (
        dict(rope_parameters=BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
        {"rope_theta": 50000.0, "num_experts": 4},
    ),
    "granitemoehybrid": (
        dict(rope_parameters=BASE, layer_types=["mamba", "attention"], **EXPERTS, **MAMBA),
        {"rope_theta": 50000.0, "layer_types": ["mamba", "attention"], "time_step_limit": [0.0, float("inf")]},
    ),
}  # fmt: skip
ROPE_NAMES = {
    "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
    "global_rope_theta", "local_rope_theta",
}  # fmt: skip


def save_family(folder, name):
    """As transformers 5 writes it."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **copy.deepcopy(SMALL | FAMILIES[name][0])))
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_names_rotary_positions_as_older_versions_do_too(tmp_path, family):
    folder = save_family(tmp_path / family, family)
    before = AutoConfig.from_pretrained(folder).to_dict()
    make_portable(folder)
    written, wanted = config_of(folder), FAMILIES[family][1]
    assert {name: written.get(name) for name in wanted} == wanted
    assert written.keys() & ROPE_NAMES == wanted.keys() & ROPE_NAMES
    read = AutoConfig.from_pretrained(folder).to_dict()
    assert read["rope_parameters"].items() >= before["rope_parameters"].items()
    assert {name: read[name] for name in before} == before | {"rope_parameters": read["rope_parameters"]}
    first = (folder / "config.json").read_bytes()
    make_portable(folder)
    assert (folder / "config.json").read_bytes() == first


def test_positions_that_older_versions_have_no_names_for_stay_as_they_are(tmp_path):
    """OLMo 3 had one base for all of its layers."""
    config = AutoConfig.for_model("olmo3", **SMALL, layer_types=LAYERS, rope_parameters=copy.deepcopy(BY_LAYER))
    config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    make_portable(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_code_that_comes_with_a_model_finds_the_names_that_it_reads():
    """transformers 5 keeps rope_theta of such a configuration, and writes rope_scaling as rope_parameters."""
    ropes = {"rope_theta": 500000.0, "rope_type": "linear", "type": "linear", "factor": 4.0}
    config = {"model_type": "own", "rope_theta": 500000.0, "rope_parameters": ropes, "part": {"rope_parameters": None}}
    scaling = {"rope_type": "linear", "type": "linear", "factor": 4.0}
    assert with_former_names(config) == config | {"rope_scaling": scaling}


def tokenizers(folder):
    """Each of another kind, as transformers 5 loads it."""
    plain = make_tokenizer()
    plain.add_special_tokens({"additional_special_tokens": ["<extra>", "<|user|>"]})
    found = {"plain": plain, "with bos and eos": make_tokenizer(bos=True)}
    model_file = Path(save_sentencepiece(folder, "tokenizer.model"))
    for bos, eos in ((True, False), (False, False), (True, True)):  # LLaMA, Yi, embedding models
        name = f"llama, bos {bos}, eos {eos}"
        (folder / name).mkdir()
        (folder / name / model_file.name).write_bytes(model_file.read_bytes())
        settings = {
            "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "add_bos_token": bos, "add_eos_token": eos,
        }  # fmt: skip
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        found[name] = load_tokenizer(ModelConfig(), str(folder / name))
    return found


def test_a_tokenizer_is_read_as_before(tmp_path):
    """By this version. What an older one reads is tried below."""
    for name, tokenizer in tokenizers(tmp_path).items():
        folder = tmp_path / "saved" / name
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        before = AutoTokenizer.from_pretrained(folder)
        make_portable(folder)
        after = AutoTokenizer.from_pretrained(folder)
        written = json.loads((folder / "tokenizer_config.json").read_text())
        assert "TokenizersBackend" not in written.values() and "extra_special_tokens" not in written
        for text in (TEXT, "", "a <extra> b"):
            assert after(text) == before(text) == tokenizer(text), name
        assert after.all_special_tokens == before.all_special_tokens == tokenizer.all_special_tokens


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder from each place that writes one, under a umask of its own."""
    folder = tmp_path_factory.mktemp("written")
    umask = os.umask(0o027)
    try:
        for name in FAMILIES:
            make_portable(save_family(folder / name, name))
        for name, tokenizer in tokenizers(folder).items():
            export(folder / f"exported with {name}", "llama", tokenizer)
        export(folder / "exported with adapters", "llama", make_tokenizer(), LoraConfig(rank=2))
        for name, how in (("t5", {}), ("t5 1.1", {"own_head": True}), ("mt5", {"kind": "mt5", "own_head": True})):
            path = save_t5(folder / f"of {name}", make_tokenizer(), seed=3, **how)
            loaded = load_model(ModelConfig(path=path), path, None, torch.float32)
            export_student(SimpleNamespace(model=loaded), make_tokenizer(), folder / f"exported {name}")
        teacher = save_family(folder / "teacher", "gemma3_text")
        cut = materialize(ModelConfig(path=str(teacher), drop_layers=(0,)), folder / "cache")
        Path(cut).rename(folder / "cut")
        shape = {"model_type": "llama"} | SMALL | {"rope_parameters": dict(BASE)}
        random = ModelConfig(random_weights=True, shape=shape, tokenizer=str(folder / "llama"))
        _write_random(random, 1, folder / "random")
    finally:
        os.umask(umask)
    others = {folder / "teacher", folder / "cache", *folder.glob("of *"), *folder.glob("llama,*")}
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and path not in others]


def export(folder, family, tokenizer, lora=None):
    model = AutoModelForCausalLM.from_pretrained(save_family(folder.with_name(f"of {folder.name}"), family))
    if lora:
        add_adapters(model, lora, "", seed=1)
    student = SimpleNamespace(model=model)
    assert rehearse_export(student, tokenizer, folder) == []
    assert not list(folder.parent.glob("*.unfinished"))
    export_student(student, tokenizer, folder)


def test_other_users_may_read_what_the_umask_lets_them(written):
    for folder in written:
        modes = {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}
        assert modes == {0o640}, folder
        assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_dir()} <= {0o750}
    assert any(file.name == "adapter_model.safetensors" for folder in written for file in folder.rglob("*"))


@pytest.mark.multiprocess
@pytest.mark.other_versions
def test_an_older_transformers_reads_the_same_models(written, tmp_path):
    """Logits, ends and tokens of every folder. The older version goes beside the packages of this environment."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-cache-dir", "--no-compile"]
    install += ["--retries", "1", "--target", str(tmp_path / "older"), *TRANSFORMERS_4]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip cannot install {TRANSFORMERS_4[0]}: {done.stderr.strip().splitlines()[-1]}")
    (tmp_path / "folders.json").write_text(json.dumps([str(folder) for folder in written]))
    program = Path(__file__).with_name("read_by_transformers4.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path / "folders.json", tmp_path / "found.pt"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "older"), "HF_HOME": str(tmp_path)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "found.pt")
    for folder in written:
        ours, other = found_in(str(folder)), theirs[str(folder)]
        torch.testing.assert_close(other.pop("logits"), ours.pop("logits"), atol=1e-4, rtol=1e-4, msg=str(folder))
        assert other == ours, folder
