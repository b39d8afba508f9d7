"""LoRA students: adapters alone are trained, kept and resumed; the export is merged, and peft reads the adapter."""

import json
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import engine_cases
from tests.test_loop import load_tiny
from tests.tiny import tiny_overrides
from toolkit.data import PromptDataset
from toolkit.faults import EXIT_LATER

pytestmark = pytest.mark.multiprocess
RANK, ALPHA, TARGETS = 4, 16.0, ["q_proj", "v_proj", "down_proj"]


def lora(tiny, name, **changes):
    settings = {"student__lora": {"rank": RANK, "alpha": ALPHA, "target_modules": TARGETS}, "train__steps": 4}
    return tiny_overrides(tiny, name=name, **settings | changes)


def student_of(tiny, name):
    return tiny / "runs" / name / "student"


def start_of(tiny, ranks, name):
    """The adapters that a run begins with: exported after steps at a learning rate of nothing."""
    ranks.run(engine_cases.run_tiny, lora(tiny, name, optimizer__lr=1e-30, optimizer__min_lr=0, train__steps=1))
    return load_file(student_of(tiny, name) / "adapter" / "adapter_model.safetensors")


def test_two_ranks_follow_a_dense_float64_reference(tiny, ranks2):
    """W + alpha / rank * B A with A and B alone trained, by plain SGD in float64 on full logits."""
    start = start_of(tiny, ranks2, "lora start")
    assert all(tensor.abs().max() < 1e-20 for name, tensor in start.items() if "lora_B" in name)
    names = {"zero3": "ds_configs/student_cpu.json", "zero2": "ds_configs/student_zero2.json"}
    for name, ds_config in names.items():
        ranks2.run(engine_cases.run_tiny, lora(tiny, f"lora {name}", student__ds_config=ds_config))
    trained = reference(tiny, start)
    for name in names:
        found = load_file(student_of(tiny, f"lora {name}") / "adapter" / "adapter_model.safetensors")
        assert found.keys() == trained.keys() and len(found) == 2 * 2 * len(TARGETS)  # two layers, A and B
        for key, tensor in trained.items():
            assert (found[key].double() - tensor).abs().max() <= 1e-5, key
        moved = max((found[key] - start[key]).abs().max().item() for key in start)
        assert moved > 1e-2


def reference(tiny, start, steps=4, rows=8, lr=0.5, min_lr=1e-7, skew=0.1):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    dataset = PromptDataset(load_tiny(tiny, tokenizer).train, 10)
    teacher = AutoModelForCausalLM.from_pretrained(tiny / "teacher", dtype=torch.float64)
    student = AutoModelForCausalLM.from_pretrained(tiny / "student", dtype=torch.float64).requires_grad_(False)
    base = dict(student.named_parameters())
    adapters = {name: tensor.double().requires_grad_() for name, tensor in start.items()}
    pairs = {
        name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight"): (
            adapters[name], adapters[name.replace("lora_A", "lora_B")]
        ) for name in adapters if "lora_A" in name
    }  # fmt: skip
    for step in range(steps):
        merged = {name: base[name] + ALPHA / RANK * b @ a for name, (a, b) in pairs.items()}
        total, count = 0.0, 0
        for example in dataset.window_examples(step, 0, 1, rows):
            ids = torch.from_numpy(example.tokens).long()[None]
            at = slice(example.prompt_length - 1, len(example.tokens) - 1)
            p = teacher(ids).logits[0, at, : len(tokenizer)].softmax(-1).detach()
            out = torch.func.functional_call(student, merged, (ids,))
            q = out.logits[0, at, : len(tokenizer)].softmax(-1)
            total, count = total + (p * (p / (skew * p + (1 - skew) * q)).log()).sum(), count + at.stop - at.start
        gradients = torch.autograd.grad(total / count, list(adapters.values()))
        rate = min_lr + (lr - min_lr) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        with torch.no_grad():
            for tensor, gradient in zip(adapters.values(), gradients, strict=True):
                tensor -= rate * gradient
    return {name: tensor.detach() for name, tensor in adapters.items()}


def test_the_export_is_merged_and_peft_reads_the_adapter(tiny, ranks2):
    ranks2.run(engine_cases.run_tiny, lora(tiny, "lora export", student__gradient_checkpointing=True))
    folder = student_of(tiny, "lora export")
    ids = torch.arange(5, 60)[None]
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(tiny / "student", dtype=torch.float32).eval()
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
    assert (merged(ids).logits - before).abs().max() > 1e-2
    frozen = load_file(tiny / "student" / "model.safetensors")
    out = load_file(folder / "model.safetensors")
    changed = {name for name, tensor in out.items() if not torch.equal(tensor, frozen[name])}
    assert changed and {name.split(".")[-2] for name in changed} == set(TARGETS)


def test_generation_sees_the_adapters(tiny, ranks2):
    """What the run's student answers at its end is what its merged export answers."""
    name = "lora answers"
    settings = lora(tiny, name, validation__rouge_rows=6, optimizer__lr=2.0)
    summary = ranks2.run(engine_cases.run_tiny, settings)[0]
    again = tiny_overrides(
        tiny, name="lora answers again", student__path=str(student_of(tiny, name)), validation__rouge_rows=6,
        train__steps=1, optimizer__lr=1e-30, optimizer__min_lr=0,
    )  # fmt: skip
    merged = ranks2.run(engine_cases.run_tiny, again)[0]
    assert merged["rouge_l"]["initial"] == pytest.approx(summary["rouge_l"]["final"])
    assert merged["validation"]["initial"]["kl_nats"] == pytest.approx(
        summary["validation"]["final"]["kl_nats"], abs=1e-5
    )
    assert abs(summary["validation"]["final"]["kl_nats"] - summary["validation"]["initial"]["kl_nats"]) > 1e-3


def test_a_checkpoint_holds_adapters_alone_and_a_resume_is_exact(tiny, ranks2):
    changes = {"student__lora": {"rank": RANK, "alpha": ALPHA, "dropout": 0.2}, "resume": "auto",
               "optimizer__name": "adamw", "optimizer__lr": 0.01, "checkpoint__every_steps": 2}  # fmt: skip
    ranks2.run(engine_cases.run_tiny, lora(tiny, "lora whole", **changes))
    stopped = lora(tiny, "lora stopped", **changes)
    for code, *_ in ranks2.run(engine_cases.run_until, stopped, 2, signal.SIGUSR1):
        assert code == EXIT_LATER
    newest = max((tiny / "runs" / "lora stopped" / "checkpoints").glob("step-*"))
    held = sum(file.stat().st_size for file in newest.glob("rank-*"))
    all_bytes = (tiny / "student" / "model.safetensors").stat().st_size
    assert held < 3 * all_bytes  # fp32 weights and two moments of every parameter would be three times the model
    other = [text.replace('/student"', '/tied"') if text.startswith("student.path") else text for text in stopped]
    code, _, said = ranks2.run(engine_cases.run_saying, other)[0]
    assert code == 2 and "the frozen student's" in said
    ranks2.run(engine_cases.run_saying, stopped)
    whole, again = (load_file(student_of(tiny, name) / "model.safetensors") for name in ("lora whole", "lora stopped"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    losses = [
        [json.loads(line)["loss"] for line in (tiny / "runs" / name / "metrics.jsonl").open()]
        for name in ("lora whole", "lora stopped")
    ]
    assert losses[0] == losses[1]


def test_wrong_targets_are_told(tiny, ranks2):
    settings = lora(tiny, "lora wrong", student__lora={"rank": 2, "target_modules": ["q_prj"]})
    code, said = ranks2.run(engine_cases.run_expecting_exit, settings)[0]
    assert code == 2 and "did you mean 'q_proj'" in said
