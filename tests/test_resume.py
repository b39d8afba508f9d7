"""A run that was stopped goes on as if it had not been: weights and metrics bit for bit, on real ranks."""

import json
import signal

import pytest

from tests import engine_cases
from tests.tiny import tiny_overrides
from toolkit.faults import EXIT_LATER

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
    [("fp32", "student_cpu"), ("bf16", "student_cpu"), ("fp32", "student_zero2"), ("bf16", "student_zero2")],
)
def test_a_stopped_run_ends_bitwise_like_one_that_was_not(tiny, ranks2, precision, ds_config):
    changes = {"precision": precision, "student.ds_config": f"ds_configs/{ds_config}.json"}
    name = f"whole {precision} {ds_config}"
    ranks2.run(engine_cases.run_tiny, settings(tiny, name, **changes))
    records = outcome(tiny, name)[1]
    assert {record["source"] for record in records} == {"dataset", "replay", "generate"}
    stopped = settings(tiny, name + " stopped", **changes)
    for stop_after, number in ((5, signal.SIGUSR1), (6, signal.SIGTERM)):
        for code, *_ in ranks2.run(engine_cases.run_until, stopped, stop_after, number, ranks=(1,)):
            assert code == EXIT_LATER
    assert "goes on from" in ranks2.run(engine_cases.run_saying, stopped)[0][1]
    assert_equal(outcome(tiny, name + " stopped"), outcome(tiny, name))
