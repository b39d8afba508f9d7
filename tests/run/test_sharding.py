"""How a run's models are held: by the memory that its ranks have, by its settings, or as before a resume."""

import json

import pytest
import yaml

from tests.run import run_cases
from tests.tiny import HELD, tiny_overrides
from toolkit.plan import Machine, plan_of
from toolkit.plan.machine import ROOM
from toolkit.settings import RunConfig
from toolkit.settings.ds_files import sharding_of_file

pytestmark = pytest.mark.multiprocess
#: files that leave the choice to the plan
OPEN = {"teacher.ds_config": "ds_configs/teacher_cpu.json", "student.ds_config": "ds_configs/student_cpu.json"}


def run(tiny, ranks, name, free_bytes, **changes):
    """(exit code, stdout, stderr) of rank 0, in a run of ranks with so much free memory."""
    overrides = tiny_overrides(tiny, name=name, train__steps=2, **(OPEN | changes))
    return ranks.run(run_cases.run_with_free, overrides, free_bytes)[0]


def held(tiny, name):
    """(teacher, student) as config.yaml and summary.json both have them."""
    settings = yaml.safe_load((tiny / "runs" / name / "config.yaml").read_text())
    summary = json.loads((tiny / "runs" / name / "summary.json").read_text())["sharding"]
    found = tuple(settings[role]["sharding"] for role in ("teacher", "student"))
    assert found == (summary["teacher"], summary["student"]) and summary["why"]
    return found


def test_what_fits_is_resident_and_the_first_line_says_why(tiny, ranks2):
    code, out, _ = run(tiny, ranks2, "roomy", 2**30)
    assert code == 0 and held(tiny, "roomy") == ("resident", "resident")
    lines = [line for line in out.splitlines() if not line.startswith(("DeepSpeed ", "["))]
    assert lines[0].startswith("student resident, teacher resident"), out


def test_what_does_not_fit_is_sharded_and_trains(tiny, ranks2, tmp_path):
    """With more than the plan of sharded models says, and less than that of resident ones."""
    written = json.loads((tiny / "teacher" / "config.json").read_text())
    shape = written | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "head_dim": 128}
    kept = {name: shape[name] for name in (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "head_dim", "eos_token_id",
    )}  # fmt: skip
    # By default ZeRO-3 keeps up to 10**9 parameters gathered: of models below that size, sharding saves nothing.
    releases = {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "overlap_comm": False,
                "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 10**6}  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": releases}))
    large = {f"{role}.ds_config": f"{tmp_path}/ds.json" for role in ("teacher", "student")}
    for role in ("teacher", "student"):
        large |= {f"{role}.path": "", f"{role}.tokenizer": f"{tiny}/{role}", f"{role}.random_weights": True,
                  f"{role}.shape": kept}  # fmt: skip

    def peak(sharding):
        settings = tiny_overrides(tiny, **large, teacher__sharding=sharding, student__sharding=sharding)
        return plan_of(RunConfig().with_overrides(settings), Machine(1, 2, 2**40, 2**40, "cpu")).peak[1]

    sharded, resident = peak("sharded"), peak("resident")
    assert sharded < resident
    code, out, told = run(tiny, ranks2, "tight", int((0.9 * sharded + 0.1 * resident) / ROOM), **large)
    assert code == 0 and held(tiny, "tight")[0] == "sharded", (out, told)
    (why,) = [line for line in out.splitlines() if line.startswith("student ")]
    assert "teacher sharded" in why and "which does not fit" in why
    assert len((tiny / "runs/tight/metrics.jsonl").read_text().splitlines()) == 2


def test_what_cannot_fit_is_refused_with_the_table_before_weights_are_read(tiny, ranks2):
    code, _, told = run(tiny, ranks2, "impossible", 100 * 2**10)
    assert code == 2 and "this run does not fit" in told and "GiB" in told and "train.rows_per_micro_batch" in told
    assert not (tiny / "runs" / "impossible" / "metrics.jsonl").exists()
    asked = {"teacher.sharding": "resident", "student.sharding": "resident"}
    code, out, _ = run(tiny, ranks2, "all the same", 100 * 2**10, **asked)
    assert code == 0 and "warning: this run may not fit: student resident, teacher resident" in out


def test_a_file_that_tunes_sharding_is_obeyed_and_one_that_cannot_is_refused(tiny, ranks2):
    assert [sharding_of_file(f"ds_configs/{name}.json") for name in (
        "student_cpu", "student_zero3", "student_zero2", "teacher_zero3_hpz", "teacher_zero3_offload",
    )] == [None, None, "resident", "sharded", "sharded"]  # fmt: skip
    files = {role: f"tests/{role}_sharded.json" for role in ("teacher", "student")}
    code, *_ = run(tiny, ranks2, "tuned", 2**30, **{f"{role}.ds_config": file for role, file in files.items()})
    assert code == 0 and held(tiny, "tuned") == ("sharded", "sharded")
    code, _, told = run(tiny, ranks2, "stage", 2**30, **HELD["zero2"], student__sharding="sharded")
    assert code == 2 and "has a ZeRO stage below 3" in told and "student.sharding=resident" in told
    offloads = {"teacher.ds_config": "ds_configs/teacher_zero3_offload.json", "teacher.sharding": "resident"}
    code, _, told = run(tiny, ranks2, "offloaded", 2**30, **offloads)
    assert code == 2 and "offload_param" in told


def test_a_resumed_run_keeps_what_was_chosen_unless_it_is_told_otherwise(tiny, ranks2):
    changes = {"resume": "auto", "checkpoint.every_steps": 1}
    name = "kept"
    assert run(tiny, ranks2, name, 2**30, **changes, student__sharding="sharded")[0] == 0
    for more, wanted in (({}, "sharded"), ({"student.sharding": "resident"}, "resident")):
        (tiny / "runs" / name / "summary.json").unlink()
        code, out, _ = run(tiny, ranks2, name, 2**30, **changes, **more)
        assert code == 0 and "goes on from" in out and held(tiny, name)[1] == wanted
