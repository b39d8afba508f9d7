"""Students of low-rank adapters, on real ranks: against a dense float64 reference, peft, and themselves resumed."""

import json
import shutil
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.models import lora_cases
from tests.run import run_cases
from tests.run.test_loop import assert_close, train_dense, weights
from tests.run.test_resume import assert_equal, flip, outcome, settings
from tests.tiny import tiny_overrides
from toolkit.ranks.signals import EXIT_LATER

pytestmark = pytest.mark.multiprocess
STAGES = {3: "tests/student_sharded.json", 2: "ds_configs/student_zero2.json"}
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"student.lora.rank": 3, "student.lora.alpha": 6, "student.lora.target_modules": TARGETS}


class LowRank(nn.Module):
    def __init__(self, a_RI, b_OR, scale):
        super().__init__()
        self.a_RI, self.b_OR, self.scale = nn.Parameter(a_RI), nn.Parameter(b_OR), scale

    def forward(self, weight_OI):
        return weight_OI + self.scale * self.b_OR @ self.a_RI


@pytest.fixture(scope="module")
def start(tiny, ranks2):
    """A peft folder whose B is not zero, so that A learns from the first step: from a short run."""
    ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name="lora start", optimizer__name="adamw", optimizer__lr=0.05, seed=3, **LORA))  # fmt: skip
    return tiny / "runs" / "lora start" / "student" / "adapter"


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_follow_a_dense_float64_reference(tiny, ranks2, start, stage):
    """And what was exported, merged or as an adapter, answers as the model that was trained, as generation does."""
    name, steps = f"lora dense {stage}", 4
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    prompts = [tokenizer(text)["input_ids"] for text in ("What is a file?", "Return")]
    ids = torch.tensor(prompts[0])[None]
    found = ranks2.run(lora_cases.run_with_last_words, tiny_overrides(
        tiny, name=name, student__ds_config=STAGES[stage], train__steps=steps, train__rows_per_micro_batch=2,
        student__gradient_checkpointing=True, student__lora__adapter=str(start), **LORA), prompts, ids)  # fmt: skip

    student = AutoModelForCausalLM.from_pretrained(tiny / "student", dtype=torch.float64).requires_grad_(False)
    saved = load_file(start / "adapter_model.safetensors")
    layers = {name: part for name, part in student.named_modules() if name.rpartition(".")[2] in TARGETS}
    for layer_name, layer in layers.items():
        a_RI, b_OR = (saved[f"base_model.model.{layer_name}.lora_{part}.weight"].double() for part in "AB")
        assert a_RI.abs().max() > 0.01 and b_OR.abs().max() > 0.05
        parametrize.register_parametrization(layer, "weight", LowRank(a_RI, b_OR, 6 / 3))
    train_dense(tiny, student, steps, "skl")
    exported, base = weights(tiny, name), load_file(tiny / "student" / "model.safetensors")
    assert exported.keys() == base.keys()
    for key in base:
        layer = layers.get(key.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(exported[key], base[key]), key
        else:
            assert (exported[key].double() - layer.weight).abs().max() < 1e-5
            assert (exported[key] - base[key]).abs().max() > 1e-2

    folder = tiny / "runs" / name / "student"
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == saved.keys()
    for layer_name, layer in layers.items():
        low_rank = layer.parametrizations.weight[0]
        for part, wanted in (("A", low_rank.a_RI), ("B", low_rank.b_OR)):
            key = f"base_model.model.{layer_name}.lora_{part}.weight"
            assert (adapter[key].double() - wanted).abs().max() < 1e-5
            assert (adapter[key] - saved[key]).abs().max() > 1e-3  # gradients arrive, in the first layer too
    merged = AutoModelForCausalLM.from_pretrained(folder)
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / "student"), folder / "adapter")
    for wanted in (logits(merged, ids), logits(on_base, ids)):
        for rank in found:
            torch.testing.assert_close(rank["logits"], wanted, atol=1e-5, rtol=0)
    for index, prompt in enumerate(prompts):
        text = merged.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        assert all(rank[mode][index] == text for rank in found for mode in ("always", "never"))
    assert [found[0][mode, "ran"] for mode in ("always", "never")] == [
        "gathered",
        "sharded" if stage == 3 else "gathered",
    ]


def test_gpt2_with_every_linear_layer(tiny, ranks2, tmp_path):
    """Its weights are transposed (Conv1D), its head is tied, and it has dropout of its own. In bf16, with AdamW."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name="lora gpt2", output_dir=str(tmp_path), student__path=f"{tmp_path}/gpt2", precision="bf16",
        train__steps=12, optimizer__name="adamw", optimizer__lr=0.02, student__lora__rank=4,
        student__lora__dropout=0.1))[0]  # fmt: skip
    assert summary["validation"]["final"]["kl_nats"] < 0.9 * summary["validation"]["initial"]["kl_nats"]
    folder = tmp_path / "lora gpt2" / "student"
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"c_attn", "c_proj", "c_fc"} and len(adapter) == 16
    ids = torch.tensor(tokenizer("What is a file?")["input_ids"])[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", dtype=torch.bfloat16).float()
    before = logits(base, ids)
    on_base = logits(PeftModel.from_pretrained(base, folder / "adapter"), ids)
    merged = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    assert (on_base - before).abs().max() > 0.3
    assert (on_base - merged).abs().max() < 0.1 * (on_base - before).abs().max()  # merged weights are rounded to bf16


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 3), ("fp32", 2)])
def test_a_stopped_run_ends_bitwise_like_one_that_was_not(tiny, ranks2, precision, stage):
    """With dropout, whose masks have to go on, and recomputation, which has to draw them twice."""
    changes = {
        "precision": precision, "student.ds_config": STAGES[stage], "student.lora.dropout": 0.1, "train.steps": 6,
        "student.gradient_checkpointing": True, "schedule.phi_initial": 0.9, "rollout.capacity": 16, **LORA,
    }  # fmt: skip
    name = f"lora whole {precision} {stage}"
    ranks2.run(run_cases.run_tiny, settings(tiny, name, **changes))
    stopped = settings(tiny, name + " stopped", **changes)
    for code, *_ in ranks2.run(run_cases.run_until, stopped, 3, signal.SIGUSR1, ranks=(1,)):
        assert code == EXIT_LATER
    assert "goes on from" in ranks2.run(run_cases.run_saying, stopped)[0][1]
    assert_equal(outcome(tiny, name + " stopped"), outcome(tiny, name))
    adapters = [
        (tiny / "runs" / run / "student" / "adapter" / "adapter_model.safetensors").read_bytes()
        for run in (name, name + " stopped")
    ]
    assert adapters[0] == adapters[1]


@pytest.fixture
def stopped(tiny, ranks2, tmp_path):
    """Settings of a run on a base of its own, stopped after step 3."""
    shutil.copytree(tiny / "student", tmp_path / "base")
    changes = {
        "schedule.policy": "mixed", "rollout.train_on_fresh": True, "train.steps": 6, "output_dir": str(tmp_path),
        "student.path": f"{tmp_path}/base", **LORA,
    }  # fmt: skip
    for code, *_ in ranks2.run(run_cases.run_until, settings(tiny, "lora", **changes), 3, signal.SIGUSR1, ranks=(0,)):
        assert code == EXIT_LATER
    return tmp_path, changes


def test_one_rank_goes_on_from_two_and_a_checkpoint_holds_adapters_alone(tiny, ranks1, ranks2, stopped):
    folder, changes = stopped
    checkpoint = max((folder / "lora" / "checkpoints").glob("step-????????"))
    held = [load_file(file) for file in sorted(checkpoint.glob("rank-*"))]
    names = {key.partition("/")[2].rpartition("@")[0] for rank in held for key in rank if "@" in key}
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    elements = {kind: sum(t.numel() for r in held for k, t in r.items() if k.startswith(f"{kind}/")) for kind in kinds}
    # q 32 -> 32, v 32 -> 16, down 64 -> 32, in two layers
    assert elements == dict.fromkeys(kinds, 2 * 3 * (32 + 32 + 32 + 16 + 64 + 32))
    other = settings(tiny, "lora", **changes, **{"student.ds_config": STAGES[2]})
    said = ranks1.run(run_cases.run_saying, other)[0]
    assert said[0] == 0 and "goes on from" in said[1], said
    ranks2.run(run_cases.run_tiny, settings(tiny, "lora at once", **changes | {"output_dir": f"{tiny}/runs"}))
    found = load((folder / "lora" / "student" / "model.safetensors").read_bytes())
    assert_close(found, load(outcome(tiny, "lora at once")[0]), 1e-5)


def test_another_base_is_refused(tiny, ranks2, stopped):
    folder, changes = stopped
    flip(folder / "base" / "model.safetensors")
    code, _, said = ranks2.run(run_cases.run_saying, settings(tiny, "lora", **changes))[0]
    assert code == 2 and "the student's before training: model.safetensors had SHA-256" in said
    flip(folder / "base" / "model.safetensors")
    code, _, said = ranks2.run(run_cases.run_saying, settings(tiny, "lora", **changes | {"student.lora.alpha": 7}))[0]
    assert code == 2 and "student.lora.alpha was 6.0, is 7.0" in said
    (folder / "base").rename(folder / "elsewhere")
    changes = changes | {"student.path": f"{folder}/elsewhere"}
    assert ranks2.run(run_cases.run_saying, settings(tiny, "lora", **changes))[0][0] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_have_no_master_copy_no_state_and_no_gradient(tiny, ranks1, ranks2, stage):
    overrides = tiny_overrides(
        tiny, precision="bf16", student__ds_config=STAGES[stage], optimizer__name="adamw", loss__divergence="none",
        loss__cross_entropy_weight=1, **LORA,
    )  # fmt: skip
    alone = None
    for ranks, world in ((ranks1, 1), (ranks2, 2)):
        found = ranks.run(lora_cases.held_after_a_step, overrides)
        for held in found:
            assert held["dtypes"] == {torch.bfloat16} and held["master_dtypes"] == {torch.float32}
            assert held["frozen_with_gradient"] == [] and held["frozen"] > 20 * held["trained"] / world
            padding = 64  # at most, of every adapter matrix to a multiple of the ranks, and of a group
            for kind, copies in (("masters", 1), ("states", 2)) + ((("gradients", 1),) if stage == 3 else ()):
                assert held["trained"] / world * copies <= held[kind] <= (held["trained"] / world + padding) * copies
            shares = world if stage == 3 else 1
            assert held["frozen"] / shares <= held["frozen_here"] <= held["frozen"] / shares + padding
        for name, tensor in found[0]["start"].items():  # A as random as peft's, B zero; alike everywhere
            bound = tensor.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
            if "lora_A" in name:
                assert bound * 0.8 < tensor.abs().max() <= bound * 1.01 and len(tensor.unique()) > 20
            else:
                assert not tensor.any()
            assert torch.equal(tensor, found[-1]["start"][name])
            assert alone is None or torch.equal(tensor, alone["start"][name])
        alone = found[0]
    assert found[0]["drawn"] != found[1]["drawn"]  # ranks drop different elements


@pytest.mark.parametrize(("changes", "message"), [
    ({"student.lora.target_modules": ["q_porj"]}, "did you mean 'q_proj'"),
    ({"student.lora.target_modules": ["q_proj", "lm_head"]}, "student.lora.target_modules = 'lm_head' is not one of"),
    ({"student.lora.adapter": "nowhere"}, "no adapter at nowhere: "),
    ({"student.lora.adapter": "START", "student.lora.rank": 2}, "r: 3 there, 2 by student.lora"),
    ({"student.lora.adapter": "START", "student.lora.alpha": 12}, "lora_alpha: 6.0 there, 12.0 by student.lora"),
    ({"student.lora.adapter": {"use_rslora": True}}, "use_rslora: True there, False by student.lora"),
    ({"student.lora.adapter": {"alpha_pattern": {"q_proj": 8}}}, "alpha_pattern: {'q_proj': 8} there, {} by"),
    ({"student.lora.adapter": {"init_lora_weights": "pissa"}}, "init_lora_weights: 'pissa' there, True by"),
    ({"student.lora.adapter": None}, "adapter_config.json"),
    ({"student.lora.adapter": "START", "student.lora.target_modules": ["q_proj"]},
     "target_modules: down_proj, q_proj, v_proj there, q_proj by student.lora"),
    ({"teacher.lora.rank": 4}, "teacher.lora.rank = 4, but only the student is trained"),
])  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(tiny, ranks2, start, tmp_path, changes, message):
    changes = {name: str(start) if value == "START" else value for name, value in changes.items()}
    if not isinstance(other := changes.get("student.lora.adapter", ""), str):  # these settings, or none at all
        changes["student.lora.adapter"] = str(shutil.copytree(start, tmp_path / "adapter"))
        file = tmp_path / "adapter" / "adapter_config.json"
        file.unlink() if other is None else file.write_text(json.dumps(json.loads(file.read_text()) | other))
    overrides = tiny_overrides(tiny, name="lora refused", **{**LORA, **changes})
    for rank, (code, said) in enumerate(ranks2.run(run_cases.run_expecting_exit, overrides)):
        assert code == 2 and (message in said or rank == 1), said


def test_the_adapters_settings_are_those_of_the_run(start):
    saved = json.loads((start / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["task_type"]) == (3, 6, "CAUSAL_LM")
    assert sorted(saved["target_modules"]) == sorted(TARGETS)
