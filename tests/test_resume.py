"""A run that was stopped goes on as if it had not been: weights and metrics bit for bit, on real ranks."""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from tests import engine_cases
from tests.tiny import tiny_overrides
from toolkit.checkpoint import Checkpoint, load_rng_state, rng_state, sole_use
from toolkit.faults import EXIT_LATER
from toolkit.rollout.replay import _unpack

pytestmark = pytest.mark.multiprocess
#: of a metrics record, what is measured and not computed
MEASURED = {"seconds", "tokens_per_s", "peak_rss_gib", "peak_device_gib"}
#: every source, a replay buffer that overflows, AdamW with clipping, validations that move phi
FULL = {
    "schedule.policy": "adaptive", "schedule.phi_initial": 0.6, "schedule.epsilon": 0, "train.steps": 9,
    "rollout.capacity": 20, "optimizer.name": "adamw", "optimizer.lr": 0.01, "optimizer.max_grad_norm": 1.0,
    "validation.every_steps": 3, "validation.rouge_rows": 2, "checkpoint.every_steps": 2, "resume": "auto",
}  # fmt: skip


def settings(tiny, name, **changes):
    return tiny_overrides(tiny, name=name, **(FULL | changes))


def outcome(tiny, name):
    """What two runs must agree on: every exported tensor, every computed metric, the summary's own."""
    folder = tiny / "runs" / name
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("steps", "tokens", "validation", "rouge_l", "source_counts", "phi_final", "phi_history", "skipped_steps")
    return (
        (folder / "student" / "model.safetensors").read_bytes(),
        [{key: value for key, value in record.items() if key not in MEASURED} for record in records],
        {key: summary[key] for key in kept},
    )


def assert_equal(found, wanted):
    assert found[1] == wanted[1]
    assert found[2] == wanted[2]
    assert found[0] == wanted[0], "the weights differ"


@pytest.mark.parametrize(
    ("precision", "ds_config"),
    [
        ("fp32", "student_cpu"), ("bf16", "student_cpu"), ("fp32", "student_zero2"), ("bf16", "student_zero2"),
        ("fp32", "zero1"), ("bf16", "zero1"),
    ],
)  # fmt: skip
def test_a_stopped_run_ends_bitwise_like_one_that_was_not(tiny, ranks2, precision, ds_config):
    (tiny / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    folder = tiny if ds_config == "zero1" else "ds_configs"
    changes = {"precision": precision, "student.ds_config": f"{folder}/{ds_config}.json"}
    name = f"whole {precision} {ds_config}"
    ranks2.run(engine_cases.run_tiny, settings(tiny, name, **changes))
    records = outcome(tiny, name)[1]
    assert {record["source"] for record in records} == {"dataset", "replay", "generate"}
    stopped = settings(tiny, name + " stopped", **changes)
    for stop_after, number in ((5, signal.SIGUSR1), (6, signal.SIGINT)):
        for code, *_ in ranks2.run(engine_cases.run_until, stopped, stop_after, number, ranks=(1,)):
            assert code == EXIT_LATER
    assert "goes on from" in ranks2.run(engine_cases.run_saying, stopped)[0][1]
    assert_equal(outcome(tiny, name + " stopped"), outcome(tiny, name))


def test_a_stopped_run_with_a_token_budget_ends_bitwise_like_one_that_was_not(tiny, ranks2):
    changes = {"train.micro_tokens": 104, "data.packing": True}
    ranks2.run(engine_cases.run_tiny, settings(tiny, "budget", **changes))
    assert len({record["micro_batches"] for record in outcome(tiny, "budget")[1]}) > 1
    stopped = settings(tiny, "budget stopped", **changes)
    for code, *_ in ranks2.run(engine_cases.run_until, stopped, 5, signal.SIGUSR1, ranks=(1,)):
        assert code == EXIT_LATER
    assert "goes on from" in ranks2.run(engine_cases.run_saying, stopped)[0][1]
    assert_equal(outcome(tiny, "budget stopped"), outcome(tiny, "budget"))


def test_a_run_stopped_between_two_windows_of_text_knows_how_many_are_left(tiny, ranks2):
    changes = {"rollout.windows": 2, "schedule.phi_initial": 0.9}
    ranks2.run(engine_cases.run_tiny, settings(tiny, "windows whole", **changes))
    sources = [record["source"] for record in outcome(tiny, "windows whole")[1]]
    stop_after = sources.index("generate") + 1
    stopped = settings(tiny, "windows stopped", **changes)
    for code, *_ in ranks2.run(engine_cases.run_until, stopped, stop_after, signal.SIGUSR1):
        assert code == EXIT_LATER
    ranks2.run(engine_cases.run_saying, stopped)
    assert_equal(outcome(tiny, "windows stopped"), outcome(tiny, "windows whole"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stopped_run_with_plain_text_ends_bitwise_like_one_that_was_not(tiny, ranks1, ranks2, streaming):
    changes = {
        "text.source": f"{tiny}/rows.jsonl", "text.field": "response", "text.max_length": 24,
        "text.streaming": streaming, "data.packing": True, "schedule.policy": "off", "validation.rouge_rows": 0,
    }  # fmt: skip
    if streaming:  # the rows of distillation too; both streams are read more than once
        changes |= {
            "data.kind": "text", "data.streaming": True, "data.source": f"{tiny}/rows.jsonl", "data.max_length": 40,
            "data.text_field": "prompt", "data.validation_source": None, "data.validation_fraction": 0.2,
        }  # fmt: skip
    name = f"text {streaming}"
    ranks2.run(engine_cases.run_tiny, settings(tiny, name, **changes))
    stopped = settings(tiny, name + " stopped", **changes)
    for code, *_ in ranks2.run(engine_cases.run_until, stopped, 5, signal.SIGUSR1, ranks=(1,)):
        assert code == EXIT_LATER
    if streaming:
        code, _, said = ranks1.run(engine_cases.run_saying, [*stopped, "train.micro_rows=4"])[0]
        assert code == 2 and "the checkpoint is of 2 ranks, this run of 1" in said
    assert "goes on from" in ranks2.run(engine_cases.run_saying, stopped)[0][1]
    assert_equal(outcome(tiny, name + " stopped"), outcome(tiny, name))


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_and_another_stage_follow(tiny, ranks1, ranks2, first, then):
    """Text is generated and kept, but not drawn from the buffer: what a rank draws is its own."""
    pools = {1: ranks1, 2: ranks2}
    changes = {"schedule.policy": "mixed", "rollout.train_on_fresh": True, "rollout.capacity": 100}
    ranks2.run(engine_cases.run_tiny, settings(tiny, "at once", **changes))
    name = f"from {first} to {then}"
    for code, *_ in pools[first].run(
        engine_cases.run_until, settings(tiny, name, **changes), 5, signal.SIGUSR1, ranks=(0,)
    ):
        assert code == EXIT_LATER
    before = replayed(tiny, name)
    other = settings(tiny, name, **changes, **{"student.ds_config": "ds_configs/student_zero2.json"})
    said = pools[then].run(engine_cases.run_saying, other)[0]
    assert said[0] == 0 and "changed since then: student.ds_config" in said[1], said
    found, wanted = outcome(tiny, name), outcome(tiny, "at once")
    assert_close(load(found[0]), load(wanted[0]), 1e-5)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert ours["source"] == theirs["source"] and ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    after = replayed(tiny, name)
    assert before
    assert sorted(after) == sorted(replayed(tiny, "at once"))  # none lost, none doubled


def replayed(tiny, name):
    """(step, tokens) of every entry of the newest checkpoint's buffer, over its ranks."""
    folder = max((tiny / "runs" / name / "checkpoints").glob("step-????????"))
    entries = []
    for file in sorted(folder.glob("rank-*")):
        state = {key[7:]: value.numpy() for key, value in load_file(file).items() if key.startswith("replay/")}
        entries += [(entry.step, entry.example.tokens.tobytes()) for entry in _unpack(state)]
    return entries


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    assert max((found[name] - wanted[name]).abs().max().item() for name in found) <= tolerance


@pytest.fixture
def stopped(tiny, ranks2, tmp_path):
    """A folder with two checkpoints, of steps 2 and 4, and the settings of its run."""
    changes = {"output_dir": str(tmp_path), "train.steps": 6}
    overrides = settings(tiny, "stopped", **changes)
    assert ranks2.run(engine_cases.run_until, overrides, 4, signal.SIGTERM)[0][0] == EXIT_LATER
    folder = tmp_path / "stopped" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
    return folder, overrides


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


DAMAGES = {
    "a bit": lambda folder: flip(folder / "rank-00001.safetensors"),
    "cut off": lambda folder: os.truncate(folder / "rank-00000.safetensors", 1000),
    "a missing file": lambda folder: (folder / "rank-00001.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "state": lambda folder: (folder / "state.json").write_text("{"),
    "pickled code": lambda folder: (folder / "rank-00000.safetensors").write_bytes(
        pickle.dumps(Evil(folder.parent / "was run"))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(stopped, ranks2, damage):
    folder, overrides = stopped
    DAMAGES[damage](folder / "step-00000004")
    code, out, _ = ranks2.run(engine_cases.run_saying, overrides)[0]
    assert code == 0 and "an older checkpoint is used" in out and "goes on from" in out
    assert "step-00000004" in out.split("an older checkpoint is used")[0]
    assert not (folder / "was run").exists()
    assert [json.loads(line)["step"] for line in (folder.parent / "metrics.jsonl").open()] == [1, 2, 3, 4, 5, 6]


def test_no_wrong_bit_in_a_manifest_is_overlooked(stopped):
    """Nothing else says what the manifest has to be. Its step is only told, and spaces are spaces."""
    folder = stopped[0] / "step-00000004"
    content = (folder / "manifest.json").read_bytes()
    meant = json.loads(content)
    for at in range(len(content)):
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        (folder / "manifest.json").write_bytes(flipped)
        try:
            Checkpoint(folder).check()
        except ValueError as error:
            assert str(folder) in str(error)
        else:
            found = json.loads(flipped)
            assert (found["format"], found["files"]) == (meant["format"], meant["files"]), flipped


def test_ranks_that_see_different_folders_agree_on_one_checkpoint(stopped, ranks2, tmp_path):
    """A network file system may show a new folder late."""
    behind = tmp_path / "behind"
    shutil.copytree(stopped[0], behind)
    shutil.rmtree(behind / "step-00000004")
    for folders in ((stopped[0], behind), (behind, stopped[0])):
        assert ranks2.run(engine_cases.newest_checkpoint, folders, timeout_s=60) == ["step-00000002"] * 2


@pytest.fixture
def other_job(tmp_path):
    """Another process that uses the run folder `tmp_path / NAME`: started by a call, ends by .kill()."""
    started = []

    def start(name, ends_after_s=60):
        script = (
            "import sys, time\nfrom pathlib import Path\nfrom toolkit.checkpoint import sole_use\n"
            f"with sole_use(Path({str(tmp_path / name)!r})):\n"
            f"    print('held', flush=True)\n    time.sleep({ends_after_s})"
        )
        started.append(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_job_in_the_same_folder_is_refused_until_the_first_has_ended(other_job, tmp_path):
    job = other_job("run")
    refused = pytest.raises(ValueError, match=rf"in use by another job \(process {job.pid} on .*name=\.\.\.")
    with refused, sole_use(tmp_path / "run", wait_s=0.1):
        pytest.fail("two jobs in one folder")
    job.kill()  # and it leaves nothing behind that would have to be cleared away
    job.wait()
    with sole_use(tmp_path / "run", wait_s=0.1):
        assert f"process {os.getpid()} " in (tmp_path / "run" / "lock").read_text()


def test_a_run_waits_for_a_job_that_is_ending(tiny, ranks2, other_job, tmp_path):
    other_job("waits", ends_after_s=2)
    code, out, _ = ranks2.run(
        engine_cases.run_saying, settings(tiny, "waits", output_dir=str(tmp_path), train__steps=1)
    )[0]  # fmt: skip
    assert code == 0 and "waiting for its end" in out


def test_where_every_checkpoint_is_damaged_nothing_is_started_over(stopped, ranks2):
    folder, overrides = stopped
    for name in ("step-00000002", "step-00000004"):
        flip(folder / name / "state.json")
    code, _, said = ranks2.run(engine_cases.run_saying, overrides)[0]
    assert code == 2 and "resume=never" in said and "step-00000002" in said and "step-00000004" in said
    assert ranks2.run(engine_cases.run_saying, [*overrides, "resume=never"])[0][0] == 0


def test_a_checkpoint_that_fits_its_manifest_runs_no_code(stopped, ranks2):
    """Someone who can write the files can write the manifest too."""
    folder, overrides = stopped
    for name in ("step-00000002", "step-00000004"):
        file = folder / name / "rank-00000.safetensors"
        file.write_bytes(pickle.dumps(Evil(folder / "was run")))
        manifest = json.loads((folder / name / "manifest.json").read_text())
        manifest["files"][file.name] = {
            "bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()
        }  # fmt: skip
        (folder / name / "manifest.json").write_text(json.dumps(manifest))
    code, _, said = ranks2.run(engine_cases.run_saying, overrides)[0]
    assert code == 2 and "is not a safetensors file" in said
    assert not (folder / "was run").exists()


@pytest.mark.parametrize(("change", "message"), [
    ("loss.alpha=0.2", "loss.alpha was 0.1, is 0.2"),
    ("train.steps=7", "train.steps was 6, is 7"),
    ("precision=bf16", "precision was float32, is bfloat16"),
    ("data.max_rows=20", "data.max_rows was None, is 20"),
])  # fmt: skip
def test_a_change_that_makes_another_run_is_refused_and_shown(stopped, ranks2, change, message):
    code, _, said = ranks2.run(engine_cases.run_saying, [*stopped[1], change])[0]
    assert code == 2 and message in said and "resume=never" in said


def test_other_data_or_another_teacher_behind_the_same_name_is_refused(stopped, tiny, ranks2, tmp_path):
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    same = [*stopped[1], f"teacher.path={tmp_path}/teacher"]
    flip(tmp_path / "teacher" / "model.safetensors")
    code, _, said = ranks2.run(engine_cases.run_saying, same)[0]
    assert code == 2 and "the teacher's model.safetensors had SHA-256" in said
    rows = (tiny / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("What", "Which", 1))
    code, _, said = ranks2.run(engine_cases.run_saying, [*stopped[1], f"data.source={tmp_path}/rows.jsonl"])[0]
    assert code == 2 and "the tokens of" in said


def test_what_may_change_is_shown_and_a_finished_run_stays(stopped, ranks2):
    _, overrides = stopped
    code, out, _ = ranks2.run(engine_cases.run_saying, [*overrides, "train.micro_rows=1", "checkpoint.keep=1"])[0]
    assert code == 0 and "changed since then: train.micro_rows was 4, is 1" in out
    code, out, _ = ranks2.run(engine_cases.run_saying, overrides)[0]
    assert code == 0 and "this run is finished" in out and "step 6/6" not in out


def test_a_full_disk_fails_the_save_and_not_the_run(tiny, ranks2, tmp_path):
    overrides = settings(tiny, "full", output_dir=str(tmp_path))
    code, out, _ = ranks2.run(engine_cases.run_with_failing_writes, overrides, steps=(4, 6, 8, 9))[0]
    assert code == 0 and "no checkpoint of step 4" in out and "File too large" in out
    folder = tmp_path / "full" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]  # whole, and nothing half-written beside it
    overrides = [*overrides, "resume=never", "checkpoint.on_failure=stop"]
    for code, *_ in ranks2.run(engine_cases.run_with_failing_writes, overrides, steps=(4,)):
        assert code == 2
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


def test_a_folder_that_takes_no_files_fails_the_save_and_not_the_run(tiny, ranks2, tmp_path):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "checkpoints").write_text("")  # permissions do not stop root, a file in the way does
    code, out, _ = ranks2.run(engine_cases.run_saying, settings(tiny, "blocked", output_dir=str(tmp_path)))[0]
    assert code == 0 and "no checkpoint of step 2" in out


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_a_data_file_that_is_a_pickle_runs_no_code(tiny, ranks2, tmp_path, suffix):
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes(pickle.dumps(Evil(tmp_path / "was run")))
    code, *_ = ranks2.run(engine_cases.run_saying, tiny_overrides(tiny, data__source=str(file)))[0]
    assert code == 2 and not (tmp_path / "was run").exists()


def test_pickled_weights_that_run_code_do_not(tiny, ranks2, tmp_path):
    shutil.copytree(tiny / "teacher", tmp_path / "evil")
    (tmp_path / "evil" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil(tmp_path / "was run")}, tmp_path / "evil" / "pytorch_model.bin")
    code, *_ = ranks2.run(engine_cases.run_saying, tiny_overrides(tiny, teacher__path=f"{tmp_path}/evil"))[0]
    assert code == 2 and not (tmp_path / "was run").exists()


def test_all_generators_come_back():
    load_rng_state(before := rng_state())
    random.gauss(0, 1)
    mid = rng_state()
    wanted = [random.gauss(0, 1), random.random(), np.random.normal(), float(torch.rand(()))]
    load_rng_state(mid)
    assert [random.gauss(0, 1), random.random(), np.random.normal(), float(torch.rand(()))] == wanted
    load_rng_state(before)
