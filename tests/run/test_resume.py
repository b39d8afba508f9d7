"""A run that was stopped goes on as if it had not been: weights and metrics bit for bit, on real ranks."""

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load, load_file

from tests.run import loop_cases, resume_cases, run_cases
from tests.settings.test_former_names import under_former_names
from tests.tiny import HELD, ds_file, tiny_overrides
from toolkit.ranks.signals import EXIT_LATER
from toolkit.rollout.replay import _unpack
from toolkit.run.checkpoint import Checkpoint, compare
from toolkit.run.random_state import load_rng_state, rng_state
from toolkit.settings import RunConfig
from toolkit.storage.lock import sole_use

pytestmark = pytest.mark.multiprocess
#: of a metrics record, what is measured and not computed
MEASURED = {"seconds", "tokens_per_s", "peak_rss_gib", "peak_device_gib"}
#: every source, a replay buffer that overflows, AdamW with clipping, validations that move phi
FULL = {
    "schedule.policy": "adaptive", "schedule.phi_initial": 0.6, "schedule.epsilon": 0, "train.steps": 9,
    "rollout.capacity": 20, "optimizer.name": "adamw", "optimizer.lr": 0.01, "optimizer.max_grad_norm": 1.0,
    "validation.every_steps": 3, "validation.scored_rows": 2, "checkpoint.every_steps": 2, "resume": "auto",
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
        ("fp32", "student_sharded"), ("bf16", "student_sharded"), ("fp32", "student_zero2"), ("bf16", "student_zero2"),
        ("fp32", "zero1"), ("bf16", "zero1"), ("fp32", "resident"), ("bf16", "resident"),
    ],
)  # fmt: skip
def test_a_stopped_run_ends_bitwise_like_one_that_was_not(tiny, ranks2, precision, ds_config):
    (tiny / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    if ds_config == "resident":
        changes = {"precision": precision, **HELD["resident"]}
    else:
        file = f"{tiny}/zero1.json" if ds_config == "zero1" else ds_file(ds_config)
        changes = {"precision": precision, "student.ds_config": file}
    name = f"whole {precision} {ds_config}"
    ranks2.run(run_cases.run_tiny, settings(tiny, name, **changes))
    records = outcome(tiny, name)[1]
    assert {record["source"] for record in records} == {"dataset", "replay", "generate"}
    stopped = settings(tiny, name + " stopped", **changes)
    for stop_after, number in ((5, signal.SIGUSR1), (6, signal.SIGINT)):
        for code, *_ in ranks2.run(run_cases.run_until, stopped, stop_after, number, ranks=(1,)):
            assert code == EXIT_LATER
    assert "goes on from" in ranks2.run(run_cases.run_saying, stopped)[0][1]
    assert_equal(outcome(tiny, name + " stopped"), outcome(tiny, name))


def test_a_stopped_run_with_a_token_budget_ends_bitwise_like_one_that_was_not(tiny, ranks2):
    changes = {"train.tokens_per_micro_batch": 104, "data.packing": True}
    ranks2.run(run_cases.run_tiny, settings(tiny, "budget", **changes))
    assert len({record["micro_batches"] for record in outcome(tiny, "budget")[1]}) > 1
    stopped = settings(tiny, "budget stopped", **changes)
    for code, *_ in ranks2.run(run_cases.run_until, stopped, 5, signal.SIGUSR1, ranks=(1,)):
        assert code == EXIT_LATER
    assert "goes on from" in ranks2.run(run_cases.run_saying, stopped)[0][1]
    assert_equal(outcome(tiny, "budget stopped"), outcome(tiny, "budget"))


def test_a_run_stopped_between_two_windows_of_text_knows_how_many_are_left(tiny, ranks2):
    changes = {"rollout.windows": 2, "schedule.phi_initial": 0.9}
    ranks2.run(run_cases.run_tiny, settings(tiny, "windows whole", **changes))
    sources = [record["source"] for record in outcome(tiny, "windows whole")[1]]
    stop_after = sources.index("generate") + 1
    stopped = settings(tiny, "windows stopped", **changes)
    for code, *_ in ranks2.run(run_cases.run_until, stopped, stop_after, signal.SIGUSR1):
        assert code == EXIT_LATER
    ranks2.run(run_cases.run_saying, stopped)
    assert_equal(outcome(tiny, "windows stopped"), outcome(tiny, "windows whole"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stopped_run_with_plain_text_ends_bitwise_like_one_that_was_not(tiny, ranks1, ranks2, streaming):
    changes = {
        "text.source": f"{tiny}/rows.jsonl", "text.field": "response", "text.max_length": 24,
        "text.streaming": streaming, "data.packing": True, "schedule.policy": "off", "validation.scored_rows": 0,
    }  # fmt: skip
    if streaming:  # the rows of distillation too; both streams are read more than once
        changes |= {
            "data.kind": "text", "data.streaming": True, "data.source": f"{tiny}/rows.jsonl", "data.max_length": 40,
            "data.text_field": "prompt", "data.validation_source": None, "data.validation_fraction": 0.2,
        }  # fmt: skip
    name = f"text {streaming}"
    ranks2.run(run_cases.run_tiny, settings(tiny, name, **changes))
    stopped = settings(tiny, name + " stopped", **changes)
    for code, *_ in ranks2.run(run_cases.run_until, stopped, 5, signal.SIGUSR1, ranks=(1,)):
        assert code == EXIT_LATER
    if streaming:
        code, _, said = ranks1.run(run_cases.run_saying, [*stopped, "train.rows_per_micro_batch=4"])[0]
        assert code == 2 and "is a stream of 2 ranks in the checkpoint, and of 1 in this run" in said
    assert "goes on from" in ranks2.run(run_cases.run_saying, stopped)[0][1]
    assert_equal(outcome(tiny, name + " stopped"), outcome(tiny, name))


@pytest.mark.parametrize(("first", "then", "held"), [(2, 1, "zero2"), (1, 2, "resident")])
def test_another_number_of_ranks_and_another_stage_follow(tiny, ranks1, ranks2, first, then, held):
    """Text is generated and kept, but not drawn from the buffer: what a rank draws is its own."""
    pools = {1: ranks1, 2: ranks2}
    # Adam turns the rounding of a gradient near zero into a share of the learning rate: 1e-5 needs a small one.
    changes = {
        "schedule.policy": "mixed", "rollout.train_on_fresh": True, "rollout.capacity": 100, "optimizer.lr": 1e-3,
    }  # fmt: skip
    ranks2.run(run_cases.run_tiny, settings(tiny, "at once", **changes))
    name = f"from {first} to {then}"
    for code, *_ in pools[first].run(
        run_cases.run_until, settings(tiny, name, **changes), 5, signal.SIGUSR1, ranks=(0,)
    ):
        assert code == EXIT_LATER
    before = replayed(tiny, name)
    other = settings(tiny, name, **changes, **HELD[held])
    said = pools[then].run(run_cases.run_saying, other)[0]
    assert said[0] == 0 and f"changed since then: {next(iter(HELD[held]))}" in said[1], said
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
    assert ranks2.run(run_cases.run_until, overrides, 4, signal.SIGTERM)[0][0] == EXIT_LATER
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
    code, out, _ = ranks2.run(run_cases.run_saying, overrides)[0]
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
        assert ranks2.run(resume_cases.newest_checkpoint, folders) == ["step-00000002"] * 2


def test_an_older_checkpoint_learned_student_text_with_the_data_s_weight():
    """Its config has no loss.student_text_cross_entropy_weight: a run that had it in effect does not go on without."""
    parts = {"precision": "fp32", "data_sha256": "0", "teacher_sha256": {}, "base_sha256": {}}

    def changed(policy, **loss):
        config = RunConfig().with_settings({"schedule.policy": policy, "loss.cross_entropy_weight": 1.0})
        before = config.to_dict()
        del before["loss"]["student_text_cross_entropy_weight"]
        now = config.with_settings({f"loss.{name}": value for name, value in loss.items()})
        return compare({"config": before, "identity": parts}, now, parts)

    assert changed("off") == changed("adaptive", student_text_cross_entropy_weight=1.0) == []
    with pytest.raises(ValueError, match=r"loss.student_text_cross_entropy_weight was 1\.0, is 0\.0"):
        changed("adaptive")


@pytest.fixture
def other_job(tmp_path):
    """Another process that uses the run folder `tmp_path / NAME`: started by a call, ends by .kill()."""
    started = []

    def start(name, lock="lock"):
        script = (
            "import sys, time\nfrom pathlib import Path\nfrom toolkit.storage.lock import sole_use\n"
            f"with sole_use(Path({str(tmp_path / name)!r}), name={lock!r}):\n"
            "    print('held', flush=True)\n    time.sleep(600)"
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
    job, told = other_job("waits"), tmp_path / "told"
    with ends_once_it_is_waited_for(job, told):
        overrides = settings(tiny, "waits", output_dir=str(tmp_path), train__steps=1)
        assert ranks2.run(resume_cases.run_telling, overrides, told) == [0, 0]
    assert "waiting for its end" in told.read_text()


@contextlib.contextmanager
def ends_once_it_is_waited_for(job, told):
    """Kills `job` as soon as `told`, what a run says, has it that the job's end is waited for."""
    done = threading.Event()

    def watch():
        while not done.wait(0.05):
            if told.is_file() and "waiting for its end" in told.read_text():
                job.kill()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_where_every_checkpoint_is_damaged_nothing_is_started_over(stopped, ranks2):
    folder, overrides = stopped
    for name in ("step-00000002", "step-00000004"):
        flip(folder / name / "state.json")
    code, _, said = ranks2.run(run_cases.run_saying, overrides)[0]
    assert code == 2 and "resume=never" in said and "step-00000002" in said and "step-00000004" in said
    assert ranks2.run(run_cases.run_saying, [*overrides, "resume=never"])[0][0] == 0


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
    code, _, said = ranks2.run(run_cases.run_saying, overrides)[0]
    assert code == 2 and "is not a safetensors file" in said
    assert not (folder / "was run").exists()


@pytest.mark.parametrize(("change", "message"), [
    ("loss.alpha=0.2", "loss.alpha was 0.1, is 0.2"),
    ("train.steps=7", "train.steps was 6, is 7"),
    ("precision=bf16", "precision was float32, is bfloat16"),
    ("data.max_rows=20", "data.max_rows was None, is 20"),
])  # fmt: skip
def test_a_change_that_makes_another_run_is_refused_and_shown(stopped, ranks2, change, message):
    code, _, said = ranks2.run(run_cases.run_saying, [*stopped[1], change])[0]
    assert code == 2 and message in said and "resume=never" in said


def test_where_an_alpha_depends_on_the_micro_batch_its_size_may_not_change():
    parts = {"precision": "float32", "data_sha256": "x", "teacher_sha256": {}, "base_sha256": {}}
    for per_sequence in (False, True):
        config = RunConfig().with_overrides([f"loss.alpha_per_sequence={per_sequence}"])
        saved = {"config": config.to_dict(), "identity": parts}
        expected = pytest.raises(ValueError, match=r"train\.rows_per_micro_batch was 4, is 2")
        with expected if per_sequence else contextlib.nullcontext():
            assert compare(saved, config.with_overrides(["train.rows_per_micro_batch=2"]), parts) == [
                "train.rows_per_micro_batch was 4, is 2"
            ]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_buffer_that_was_dealt_out_again_is_drawn_from(tiny, ranks1, ranks2, first, then):
    pools = {1: ranks1, 2: ranks2}
    name = f"drawn from {first} to {then}"
    overrides = settings(tiny, name, schedule__phi_initial=1.0, train__steps=10, validation__every_steps=10)
    for code, *_ in pools[first].run(run_cases.run_until, overrides, 5, signal.SIGUSR1, ranks=(0,)):
        assert code == EXIT_LATER
    before = set(replayed(tiny, name))
    found = pools[then].run(loop_cases.run_recording_sources, overrides)
    assert len(before) == 20  # full: capacity
    for seen in found:
        assert len(seen) == 5 and "replay" in {source for source, _ in seen}
    records = outcome(tiny, name)[1]
    drawn = [record for record in records[5:] if record["source"] == "replay"]
    assert drawn and all(record["staleness_steps"] > 0 and record["loss"] > 0 for record in drawn)
    assert before & set(replayed(tiny, name))  # and some of the dealt entries are still there


def test_other_data_or_another_teacher_behind_the_same_name_is_refused(stopped, tiny, ranks2, tmp_path):
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    same = [*stopped[1], f"teacher.path={tmp_path}/teacher"]
    flip(tmp_path / "teacher" / "model.safetensors")
    code, _, said = ranks2.run(run_cases.run_saying, same)[0]
    assert code == 2 and "the teacher's model.safetensors had SHA-256" in said
    rows = (tiny / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("What", "Which", 1))
    code, _, said = ranks2.run(run_cases.run_saying, [*stopped[1], f"data.source={tmp_path}/rows.jsonl"])[0]
    assert code == 2 and "the tokens of" in said


def test_what_may_change_is_shown_and_a_finished_run_stays_under_former_names_too(stopped, ranks2):
    """The config of a checkpoint, and that of a finished run, are those of a version before settings were renamed."""
    folder, overrides = stopped
    for state_file in folder.glob("step-*/state.json"):
        state = json.loads(state_file.read_text())
        state_file.write_text(json.dumps(state | {"config": under_former_names(state["config"])}))
        manifest = json.loads(state_file.with_name("manifest.json").read_text())
        digest = hashlib.sha256(state_file.read_bytes()).hexdigest()
        manifest["files"]["state.json"] = {"bytes": state_file.stat().st_size, "sha256": digest}
        state_file.with_name("manifest.json").write_text(json.dumps(manifest))
    given = [*overrides, "train.rows_per_micro_batch=1", "checkpoint.keep=1"]
    code, out, _ = ranks2.run(run_cases.run_saying, given)[0]
    assert code == 0 and "changed since then: train.rows_per_micro_batch was 4, is 1" in out
    config = folder.parent / "config.yaml"
    config.write_text(yaml.safe_dump(under_former_names(yaml.safe_load(config.read_text()))))
    shutil.rmtree(folder)
    code, out, _ = ranks2.run(run_cases.run_saying, overrides)[0]
    assert code == 0 and "this run is finished" in out and "step 6/6" not in out


def test_a_full_disk_fails_the_save_and_not_the_run(tiny, ranks2, tmp_path):
    overrides = settings(tiny, "full", output_dir=str(tmp_path))
    code, out, _ = ranks2.run(resume_cases.run_with_failing_writes, overrides, steps=(4, 6, 8, 9))[0]
    assert code == 0 and "no checkpoint of step 4" in out and "File too large" in out
    folder = tmp_path / "full" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]  # whole, and nothing half-written beside it
    overrides = [*overrides, "resume=never", "checkpoint.on_failure=stop"]
    for code, *_ in ranks2.run(resume_cases.run_with_failing_writes, overrides, steps=(4,)):
        assert code == 2
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(("failing", "code"), [((4,), 2), ((4, 6), EXIT_LATER)])
def test_a_stop_of_which_nothing_is_kept_is_not_to_be_repeated(tiny, ranks2, tmp_path, failing, code):
    """Exit code 75 has SLURM requeue a job. One that can save nothing would be requeued for ever."""
    stop, every = (4, 0) if code == 2 else (6, 2)  # no save but that of the stop, or a good one before it
    overrides = settings(tiny, "kept", output_dir=str(tmp_path), checkpoint__every_steps=every)
    found = ranks2.run(resume_cases.run_until_with_failing_writes, overrides, stop, signal.SIGUSR1, failing)
    assert [ended for ended, *_ in found] == [code, code]
    folder = tmp_path / "kept" / "checkpoints"
    assert [path.name for path in folder.glob("*")] == ([] if code == 2 else ["step-00000002"])
    if code == 2:
        assert "what was done since the start is lost" in found[0][2] and "File too large" in found[0][2]
    else:
        assert "goes on from" in ranks2.run(run_cases.run_saying, overrides)[0][1]


def test_a_full_disk_fails_the_best_export_and_not_the_run(tiny, ranks2, tmp_path):
    changes = {"output_dir": str(tmp_path), "validation.best": "ce", "train.steps": 3}
    code, out, _ = ranks2.run(resume_cases.run_with_failing_exports, settings(tiny, "best", **changes), ["best"])[0]
    assert code == 0 and "the student could not be written to" in out and "File too large" in out
    assert not list((tmp_path / "best").glob("best*")) and (tmp_path / "best" / "student").is_dir()
    assert json.loads((tmp_path / "best" / "summary.json").read_text())["best"] is None
    stops = settings(tiny, "best", **changes | {"checkpoint.on_failure": "stop", "resume": "never"})
    for code, *_ in ranks2.run(resume_cases.run_with_failing_exports, stops, ["best"]):
        assert code == 2


def test_a_folder_that_takes_no_files_fails_the_save_and_not_the_run(tiny, ranks2, tmp_path):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "checkpoints").write_text("")  # permissions do not stop root, a file in the way does
    code, out, _ = ranks2.run(run_cases.run_saying, settings(tiny, "blocked", output_dir=str(tmp_path)))[0]
    assert code == 0 and "no checkpoint of step 2" in out


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_a_data_file_that_is_a_pickle_runs_no_code(tiny, ranks2, tmp_path, suffix):
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes(pickle.dumps(Evil(tmp_path / "was run")))
    code, *_ = ranks2.run(run_cases.run_saying, tiny_overrides(tiny, data__source=str(file)))[0]
    assert code == 2 and not (tmp_path / "was run").exists()


def test_pickled_weights_that_run_code_do_not(tiny, ranks2, tmp_path):
    shutil.copytree(tiny / "teacher", tmp_path / "evil")
    (tmp_path / "evil" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil(tmp_path / "was run")}, tmp_path / "evil" / "pytorch_model.bin")
    code, *_ = ranks2.run(run_cases.run_saying, tiny_overrides(tiny, teacher__path=f"{tmp_path}/evil"))[0]
    assert code == 2 and not (tmp_path / "was run").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "pkl", "bin", "npz"])
def test_data_under_a_name_that_is_no_data_runs_no_code(tiny, ranks2, tmp_path, suffix):
    file = tmp_path / f"rows.{suffix}"
    torch.save(Evil(tmp_path / "was run"), file)
    for kind in ("instructions", "text"):
        code, _, said = ranks2.run(run_cases.run_saying, tiny_overrides(
            tiny, data__source=str(file), data__kind=kind))[0]  # fmt: skip
        assert code == 2 and str(file) in said and not (tmp_path / "was run").exists()


def test_weights_that_are_a_pickle_by_another_name_run_no_code(tiny, ranks2, tmp_path):
    shutil.copytree(tiny / "student", tmp_path / "evil")
    torch.save(Evil(tmp_path / "was run"), tmp_path / "evil" / "model.safetensors")
    code, _, said = ranks2.run(run_cases.run_saying, tiny_overrides(tiny, student__path=f"{tmp_path}/evil"))[0]
    assert code == 2 and "model.safetensors is damaged" in said and not (tmp_path / "was run").exists()


def test_settings_that_are_yaml_made_to_run_code_do_not(tiny, ranks2, tmp_path):
    """Every setting is read as YAML, and an object of Python's is something that YAML can ask for."""
    evil = f'!!python/object/apply:os.mkdir ["{tmp_path}/was run"]'
    for setting in (f"name={evil}", f"data={{source: {evil}}}", f"student.shape={evil}"):
        code, _, said = ranks2.run(run_cases.run_saying, [*tiny_overrides(tiny), setting])[0]
        assert code == 2 and "is not valid YAML" in said and not (tmp_path / "was run").exists()
    with pytest.raises(FileNotFoundError):  # what it asks for does happen where YAML is not read safely
        yaml.unsafe_load(f'!!python/object/apply:os.mkdir ["{tmp_path}/no/was run"]')


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_is_run_only_where_it_is_trusted(tiny, ranks2, tmp_path, part):
    """As a hub repository has it: a module beside the weights, which config.json names."""
    folder = tmp_path / "evil"
    shutil.copytree(tiny / "student", folder)
    (folder / "own.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'was run')!r})\nraise ValueError('run here')\n"
    )
    name = {"model": "config.json", "tokenizer": "tokenizer_config.json"}[part]
    config = json.loads((folder / name).read_text())
    if part == "model":
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    else:
        config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / name).write_text(json.dumps(config))
    overrides = tiny_overrides(tiny, student__path=str(folder))
    code, _, said = ranks2.run(run_cases.run_saying, overrides)[0]
    assert code == 2 and str(folder) in said and not (tmp_path / "was run").exists(), said
    code, _, said = ranks2.run(run_cases.run_saying, [*overrides, "student.trust_remote_code=true"])[0]
    assert code == 2 and (tmp_path / "was run").exists()


def test_all_generators_come_back():
    load_rng_state(before := rng_state())
    random.gauss(0, 1)
    mid = rng_state()
    wanted = [random.gauss(0, 1), random.random(), np.random.normal(), float(torch.rand(()))]
    load_rng_state(mid)
    assert [random.gauss(0, 1), random.random(), np.random.normal(), float(torch.rand(()))] == wanted
    load_rng_state(before)
