"""benchmarks/gpu_check.sh without a GPU: every part at tiny size, parts that fail or hang, and what they compute."""

import json
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gpu_check, gpu_trace
from benchmarks.gpu_check import Part
from toolkit.divergences.kernels.backends import has_triton

ROOT = Path(__file__).resolve().parent.parent


# Running parts


@pytest.mark.multiprocess
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_every_part_runs_at_tiny_size_on_a_cpu(tmp_path):
    command = [ROOT / "benchmarks" / "gpu_check.sh", "--device", "cpu", "--tiny", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    by_name = {part["part"]: part for part in found["parts"]}
    assert list(by_name) == [part.name for part in gpu_check.parts("cpu", True)]
    assert found["heading"]["command"] == "benchmarks/gpu_check.sh --device cpu --tiny --out out"

    numbers = {name: part["numbers"] for name, part in by_name.items()}
    assert numbers["machine"]["versions"]["torch"] == torch.__version__
    for layout in ("resident", "sharded"):
        steps = numbers[f"steps-{layout}"]
        assert steps["64 tokens"]["row"]["tokens/s"] > 0 and len(steps["64 tokens"]["later"]) >= 1
        phases = steps["profile of the later step of 64 tokens"]["phases"]
        assert list(phases) == ["teacher", "student", "forward and loss", "backward", "optimizer", "step"]
        halves_ms = phases["forward and loss"]["wall_ms"] + phases["backward"]["wall_ms"]
        assert 0.5 * phases["student"]["wall_ms"] < halves_ms < phases["student"]["wall_ms"]
        assert (tmp_path / "out" / f"steps-{layout}-64-tokens.trace.json.gz").stat().st_size > 0
        samples = [*steps["profile of the first step of 32 tokens"]["samples"]]
        assert {phase for phase, _, _ in samples} & {"teacher", "student"}
        assert f"Whole steps, both models {layout}" in done.stdout
    # Only ZeRO-3 has hooks around modules.
    calls = {
        layout: {row[0] for row in numbers[f"steps-{layout}"]["profile of the later step of 64 tokens"]["operations"]}
        for layout in ("resident", "sharded")
    }
    assert any("PreBackward" in call for call in calls["sharded"])
    assert not any("PreBackward" in call for call in calls["resident"])

    paths = {(line["model"], line["path"]): line for line in numbers["generation"]["paths"]}
    assert paths["student", "full batch"]["same_texts"] == 1 and paths["student", "full batch"]["tokens_per_s"] > 0
    assert paths["student", "CUDA graph"]["failure"] == "needs a GPU"
    errors = numbers["rows"]["errors at (8, 320, 16, 24)"]
    for at in range(2):
        today, bf16, once = (errors[name][at]["ours"] for name in ("today", "bf16 logits", "one read"))
        np.testing.assert_allclose(once, today, rtol=0.05)
        assert bf16[1] > 2 * today[1]  # rounded logits are seen in the gradient: the table can tell
        np.testing.assert_allclose(errors["bf16 logits, one read"][at]["ours"], bf16, rtol=0.05)
    assert numbers["loss"]["shapes"][0]["times_ms"]["skl"]["ours"]
    assert "2 of 2 tests ran: 2 skipped." in done.stdout


def script(name, text, limit_s=20.0):
    return Part(name, name.capitalize(), limit_s, ["-c", text, ""])


WRITES = "import json, sys; json.dump({'x': 1}, open(sys.argv[1], 'w')); print('| a table |', flush=True)"
CHILD = "import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_parts_that_fail_or_hang_are_told_and_the_others_run(tmp_path):
    chosen = [
        script("fails", WRITES + "; raise RuntimeError('no such kernel')"),
        script("hangs", f"{CHILD} print(c.pid, file=sys.stderr, flush=True); {WRITES}; time.sleep(60)", limit_s=2.0),
        script("works", WRITES),
    ]
    started_s = time.monotonic()
    found = gpu_check.run_all(chosen, tmp_path, 60.0, {}, {"date": "today", "command": "this", "installed": []})
    assert time.monotonic() - started_s < 30
    assert [part["status"] for part in found] == ["failed", "stopped", "ok"]
    assert [part["numbers"] for part in found] == [{"x": 1}] * 3  # what they had written stays
    assert "RuntimeError: no such kernel" in "".join(found[0]["log"])
    # Processes that a part has started go with it.
    child = int(found[1]["log"][0])
    ends_s = time.monotonic() + 10
    while is_running(child) and time.monotonic() < ends_s:
        time.sleep(0.05)
    assert not is_running(child)

    text = (tmp_path / "gpu_check.md").read_text()
    assert text.count("| a table |") == 3 and "**failed with exit code 1**" in text
    assert "stopped at its limit of 2 s; what it had by then is here" in text
    assert json.loads((tmp_path / "gpu_check.json").read_text())["parts"] == found


def test_the_time_of_the_whole_is_kept(tmp_path):
    chosen = [script("slow", "import time; time.sleep(60)", limit_s=0.9), script("late", WRITES)]
    found = gpu_check.run_all(chosen, tmp_path, 1.0, {}, {"date": "", "command": "", "installed": []})
    assert [part["status"] for part in found] == ["stopped", "skipped"]
    assert "skipped, as the time of the whole was up" in (tmp_path / "gpu_check.md").read_text()


def test_limits_of_all_parts_are_within_eight_minutes():
    assert sum(part.limit_s for part in gpu_check.parts("cuda", False)) <= 8 * 60


def test_only_what_is_missing_is_installed(tmp_path, monkeypatch):
    wheel = tmp_path / "wheels" / "not_here_at_all-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("not_here_at_all.py", "x = 1\n")
        about = "not_here_at_all-1.0.dist-info"
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: not-here-at-all\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("# a comment\ntorch==0.0.1\nnot-here-at-all==1.0\n")
    monkeypatch.setattr(gpu_check, "REQUIREMENTS", wanted)
    assert gpu_check.install_missing(wheel.parent, tmp_path / "target") == ["not-here-at-all==1.0"]
    assert (tmp_path / "target" / "not_here_at_all.py").is_file() and not (tmp_path / "target" / "torch").exists()
    wheel.unlink()
    with pytest.raises(SystemExit, match=r"1 packages are missing.*--wheels"):
        gpu_check.install_missing(wheel.parent, tmp_path / "target")


def test_tests_are_counted_also_where_they_were_stopped():
    lines = ["collected 102 items / 100 deselected / 2 selected", "", "tests/a.py::test_x[1 and 2] PASSED [ 50%]"]
    assert gpu_check.counted_tests("\n".join(lines)) == "1 of 2 tests ran: 1 passed."
    lines.append("tests/a.py::test_y FAILED [100%]")
    said = gpu_check.counted_tests("\n".join(lines))
    assert said == "2 of 2 tests ran: 1 passed, 1 failed.\n- failed: `tests/a.py::test_y`"


# What the parts compute


def event(category, name, start, end, thread=1, **args):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": args}


def test_a_trace_tells_where_the_time_goes():
    """1 ms of teacher with a wait for the allocator, 2 ms of student with Python, a copy and launches in between."""
    events = [
        event("user_annotation", "phase teacher", 0, 1000),
        event("cpu_op", "aten::mm", 0, 700), event("cuda_runtime", "cudaMalloc", 100, 500),
        event("cuda_runtime", "cudaLaunchKernel", 500, 520), event("kernel", "gemm", 520, 900, thread=7),
        event("cuda_runtime", "cudaDeviceSynchronize", 700, 920),
        event("user_annotation", "phase student", 1000, 3000),
        event("kernel", "gemm", 1100, 1400, thread=7), event("kernel", "at::native::add", 1300, 1500, thread=8),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 1600, 1700, thread=7, bytes=3 * 2**20),
        event("cpu_op", "aten::add", 1000, 1050), event("cpu_op", "aten::add", 2900, 2950, thread=2),
        event("user_annotation", "something else", 0, 9000), {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    found = gpu_trace.phases(events)
    assert set(found) == {"teacher", "student", "step"}
    teacher, student, step = found["teacher"], found["student"], found["step"]
    assert (teacher.wall_ms, teacher.busy_ms) == pytest.approx((1.0, 0.38))
    expected = {
        "allocator": 0.4, "synchronisation": 0.02, "launches": 0.02, "torch's operators": 0.1, "copies": 0.0,
        "loading kernels": 0.0, "Python and other code": 0.08,
    }  # fmt: skip
    assert teacher.idle_ms == pytest.approx(expected)
    assert teacher.calls == {
        "allocator": 1, "synchronisation": 1, "copies": 0, "launches": 1, "loading kernels": 0
    }  # fmt: skip
    assert (student.wall_ms, student.busy_ms, student.kernels) == pytest.approx((2.0, 0.5, 2))
    assert student.copied_mib == {"HtoD": 3.0}
    assert student.idle_ms["torch's operators"] == pytest.approx(0.1)
    assert student.idle_ms["Python and other code"] == pytest.approx(1.4)
    for phase in found.values():
        assert phase.busy_ms + sum(phase.idle_ms.values()) == pytest.approx(phase.wall_ms)
    assert step.wall_ms == pytest.approx(3.0) and step.kernels == 3

    assert gpu_trace.top_kernels(events, 2) == [("gemm", 2, pytest.approx(0.68)), ("add", 1, pytest.approx(0.2))]
    operations = {name: (count, ms) for name, count, ms in gpu_trace.top_operations(events, 9)}
    assert operations["aten::mm"] == (1, pytest.approx(0.28))  # without the calls inside of it
    assert operations["aten::add"] == (2, pytest.approx(0.1))


def test_intervals():
    a, b = [(0, 4), (6, 9)], [(1, 2), (3, 7), (8, 8.5)]
    assert gpu_trace.merged([(3, 5), (0, 2), (1, 3), (7, 7)]) == [(0, 5)]
    assert gpu_trace.common(a, b) == [(1, 2), (3, 4), (6, 7), (8, 8.5)]
    assert gpu_trace.without(a, b) == [(0, 1), (2, 3), (7, 8), (8.5, 9)]
    assert gpu_trace.without(a, []) == a and gpu_trace.without(a, a) == []


def test_flops_are_those_that_torch_counts():
    from benchmarks.gpu_steps import Size, forward_flops

    shape = dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=64,
    )  # fmt: skip
    size = Size(rows=2, rows_per_micro_batch=2, row_tokens=16, budget_s=0.0)
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager"))
    ids_BT = torch.zeros(2, 16, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden_BTH = model.model(ids_BT).last_hidden_state
        model.lm_head(hidden_BTH[:, 8:])
    above_the_diagonal = 2 * 3 * 32 * 16 * size.tokens  # eager attention computes both halves of the matrix
    assert counter.get_total_flops() == forward_flops(shape, size) + above_the_diagonal


def test_peaks_are_found_by_the_name_of_the_card():
    from benchmarks.gpu_common import peak_tflops

    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA H20", "other")
    assert [peak_tflops(name) for name in names] == [989, 756, 989, 312, 148, None]


def test_passes_over_the_full_batch_give_the_same_texts():
    """Rows end at different times, others take their places, and the width grows in between."""
    from benchmarks.gpu_generation import FullBatchPasses
    from toolkit.models import Vocabulary
    from toolkit.rollout.decode import decode
    from toolkit.rollout.sampling import SeededSampling

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=40, initializer_range=0.3, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 40, length).astype(np.int32) for length in (3, 120, 7, 30, 110, 5, 60)]
    sampling = SeededSampling(24, seeds=range(len(prompts)))
    vocabulary = Vocabulary(40, (5, 9, 11), 5)
    texts, stats = decode(model, prompts, sampling, vocabulary, 3)
    found, of_full = decode(model, prompts, sampling, vocabulary, 3, passes_of=FullBatchPasses)
    assert len({len(text) for text in texts}) > 2 and stats.prefills > 1
    for text, expected in zip(found, texts, strict=True):
        np.testing.assert_array_equal(text, expected)
    assert of_full.tokens == stats.tokens


class Operators(TorchDispatchMode):
    """The names of all operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_pass_that_a_graph_captures_asks_the_host_for_nothing():
    """Neither a number of the device nor a tensor of the host's numbers, as the pass over prompts does."""
    from benchmarks.gpu_generation import FullBatchPasses

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=40,
    )  # fmt: skip
    passes = FullBatchPasses(LlamaForCausalLM(config).eval(), [np.array([3, 4, 5], np.int32)] * 2, 2, 8)
    of_host = {"_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "unique_dim", "_unique2"}
    with torch.no_grad(), passes.attention():
        with Operators() as of_prompts:
            passes.prompt([0, 1], 0)
        with Operators() as of_steps:
            passes.whole_step(11)
    assert of_prompts.names & of_host and "index_copy_" in of_steps.names
    assert not of_steps.names & of_host


def test_what_is_known_of_a_version_of_transformers_is_said():
    from benchmarks.gpu_machine import about_transformers

    assert "tested with" in about_transformers("5.24.0", "5.24.0")
    assert "Refused with a message: sentencepiece" in about_transformers("5.17.0", "5.24.0")
    assert "never tried" in about_transformers("5.9.1", "5.24.0") and "None here" in about_transformers(None, "5.24.0")


@pytest.mark.skipif(not has_triton() or torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("name", ["skl", "srkl", "fkl", "jsd", "abkd"])
def test_programs_that_share_a_row_agree_with_one(name):
    """The interpreter runs one program after the other, so none may wait: without waiting, the first run leaves each
    program's numbers, the second the sums that follow from all of them, and the third the gradient."""
    from benchmarks.gpu_one_read import exchange_room, launch
    from toolkit.divergences import Divergence, Head, Objective
    from toolkit.divergences.kernels import rows, rows_torch
    from toolkit.divergences.kernels.rows import CODES, Passes, RowTask

    n, columns, generator = 5, 300, torch.Generator().manual_seed(1)
    student_nB, teacher_nB = (3 * torch.randn(n, columns, generator=generator) for _ in range(2))
    head = Head(torch.zeros(columns, 1))
    task = RowTask(
        code=CODES[name], objective=Objective(Divergence(name)), student=head, teacher=head,
        alpha_n=torch.linspace(0.1, 0.5, n), weights_n=torch.linspace(0.5, 2.0, n), targets_n=None, threshold_n=None,
        first_column=0,
    )  # fmt: skip
    whole = Passes.STATISTICS | Passes.SUMS | Passes.GRADIENT
    expected, state = torch.empty(n, columns), rows.new_state(n, torch.float32, student_nB.device)
    kernel = rows_torch.TorchRows(n, columns, 2**20, torch.float32, student_nB.device)
    kernel(
        task, state, student_nB=student_nB.clone(), teacher_nB=teacher_nB.clone(), out_nB=expected, passes=whole
    )  # fmt: skip

    found, own = torch.zeros(n, columns), rows.new_state(n, torch.float32, student_nB.device)
    numbers, arrived = exchange_room(n, 3, student_nB.device)
    for _ in range(3):
        launch(
            task, own, student_nB, teacher_nB, found, numbers=numbers, arrived=arrived, block=128, warps=4, groups=2,
            spins=0,
        )  # fmt: skip
    assert arrived.tolist() == [[9, 9]] * n  # three programs, three times
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows.divergence_values(task.code, own), rows.divergence_values(task.code, state))
