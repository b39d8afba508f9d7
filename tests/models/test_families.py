"""Families whose code does something of its own are loaded, trained and exported as transformers has them."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.families import made
from tests.models import load_cases
from tests.run import run_cases
from tests.tiny import ds_file, make_tokenizer, save_rows, tiny_overrides

pytestmark = pytest.mark.multiprocess
#: with routers, correction biases or buffers that are fp32 beside bf16 weights; the last with one that is bf16 always
OTHER_DTYPES = ("deepseek_v3", "ernie4_5_moe", "hunyuan_v1_moe", "nemotron_h", "lfm2_moe", "recurrent_gemma")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Settings of a short run of a family's teacher and student, each made from its own seed once."""

    def settings(family, **changes):
        folder = tmp_path_factory.getbasetemp() / family
        if not folder.is_dir():
            folder.mkdir()
            tokenizer = make_tokenizer()
            for seed, role in enumerate(("teacher", "student")):
                made(family, seed, vocab_size=len(tokenizer)).save_pretrained(folder / role)
                tokenizer.save_pretrained(folder / role)
            save_rows(folder / "rows.jsonl")
        quiet = {"train.steps": 2, "validation.samples": 0, "validation.scored_rows": 0}
        return folder, tiny_overrides(folder, **(quiet | changes))

    return settings


@pytest.mark.parametrize(
    ("family", "precision"),
    [("llama4_text", "fp32"), *((family, "bf16") for family in ("llama4_text", "mamba", "mamba2", "falcon_mamba"))],
)
def test_stacks_that_go_by_another_name_or_end_in_fp32_are_trained(runs, ranks1, family, precision):
    folder, settings = runs(family, precision=precision)
    found = ranks1.run(run_cases.run_tiny, settings)[0]["validation"]
    assert found["final"]["kl_nats"] < found["initial"]["kl_nats"] - 0.05
    student = AutoModelForCausalLM.from_pretrained(folder / "runs" / "tiny" / "student")
    assert type(student) is type(made(family))


def test_under_zero3_every_tensor_has_the_dtype_and_the_value_that_transformers_gives_it(runs, ranks2):
    folders = [str(runs(family)[0] / "teacher") for family in OTHER_DTYPES]
    for dtype in (torch.bfloat16, torch.float32):
        for found in ranks2.run(load_cases.all_tensors, folders, dtype):
            for folder in folders:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
                wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
                assert found[folder].keys() == wanted.keys()
                for name, tensor in wanted.items():
                    assert found[folder][name].dtype == tensor.dtype, name
                    assert torch.equal(found[folder][name], tensor), name
                assert len({tensor.dtype for tensor in wanted.values()} - {torch.int64}) == 1 + (
                    dtype == torch.bfloat16 or "recurrent" in folder
                )


@pytest.mark.parametrize("stage", [0, 3])
def test_a_teacher_in_bf16_answers_as_transformers_does(runs, ranks1, tmp_path, stage):
    """Its router's fp32 weights decide which experts a token goes to."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    folder, settings = runs("deepseek_v3", precision="bf16", teacher__ds_config=f"{tmp_path}/ds.json")
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    found = ranks1.run(load_cases.teacher_hidden, settings, ids)[0]
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(found, teacher.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1))


@pytest.mark.parametrize("sharding", ["student_sharded", "student_zero2"])
def test_fp32_weights_that_are_trained_are_told_and_those_that_are_not_stay(runs, ranks2, sharding):
    folder, settings = runs(
        "ernie4_5_moe", precision="bf16", name=sharding, student__ds_config=ds_file(sharding),
        optimizer__name="adamw", optimizer__lr=0.01, optimizer__weight_decay=0.1,
    )  # fmt: skip
    said = [out + err for _, out, err in ranks2.run(run_cases.run_saying, settings)]
    (told,) = [line for line in "".join(said).splitlines() if "in fp32" in line]
    assert "transformers keeps model.layers.*.mlp.gate.weight (3 times) of the student, a ernie4_5_moe model" in told
    assert re.search(r"rounding moves them by 0\.1\d% at most$", told) and told in said[0]
    start, end = (load_file(folder / path / "model.safetensors") for path in ("student", f"runs/{sharding}/student"))
    assert {name.rpartition(".")[2] for name, tensor in end.items() if tensor.dtype == torch.float32} == {
        "e_score_correction_bias"
    }
    for name, tensor in end.items():
        is_frozen = name.endswith("e_score_correction_bias")
        assert torch.equal(tensor, start[name]) if is_frozen else not torch.equal(tensor, start[name].to(tensor.dtype))


@pytest.mark.parametrize(
    ("sharding", "adapted"), [("student_sharded", "q_proj"), ("student_zero2", "q_proj"), ("student_sharded", "wg")]
)
def test_under_adapters_fp32_weights_stay_and_are_exported_so(runs, ranks1, sharding, adapted):
    folder, settings = runs(
        "hunyuan_v1_moe", precision="bf16", name="lora", student__ds_config=ds_file(sharding),
        student__lora__rank=2, student__lora__target_modules=[adapted],
    )  # fmt: skip
    (_, out, err) = ranks1.run(run_cases.run_saying, settings)[0]
    assert "in fp32" not in out + err
    start, end = (load_file(folder / path / "model.safetensors") for path in ("student", "runs/lora/student"))
    kept = {name for name, tensor in end.items() if tensor.dtype == torch.float32}
    assert kept == {f"model.layers.{layer}.mlp.gate.wg.weight" for layer in range(3)}
    assert all(torch.equal(end[name], start[name]) == (adapted != "wg") for name in kept)


def test_adapters_of_experts_are_refused(runs, ranks1):
    _, settings = runs("hunyuan_v1_moe", student__lora__rank=2)
    code, said = ranks1.run(run_cases.run_expecting_exit, settings)[0]
    assert code == 2 and "reaches model.layers.0.mlp.experts of this hunyuan_v1_moe model" in said
