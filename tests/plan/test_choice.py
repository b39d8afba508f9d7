"""Which layout a plan takes, and what it says where none fits."""

import dataclasses
import json

import pytest

from tests.plan.plan_cases import machine, run_config, shapes
from toolkit.plan import DEVICES, Machine, ModelShape, plan_run


def planned(config, on):
    return plan_run(config, on, *shapes())


def test_models_that_fit_are_resident(tmp_path):
    plan = planned(run_config(tmp_path, "schedule.policy=on_policy"), machine(4))
    assert (plan.student, plan.teacher, plan.fits) == ("resident", "resident", True)
    assert plan.refusal() is None
    assert plan.why.startswith("student resident, teacher resident, rollout.gather ")
    assert "student sharded: " in plan.why and " s a step" in plan.why


def test_with_less_memory_fewer_are_and_with_the_least_none(tmp_path):
    """Of models whose weights are more than their activations."""
    config, wide = (
        run_config(tmp_path, stage3_max_reuse_distance=1),
        dict(model_type="llama", num_attention_heads=8, vocab_size=2000),
    )
    sizes = {"teacher": dict(hidden_size=1024, num_hidden_layers=12), "student": dict(hidden_size=512)}
    teacher, student = (ModelShape.of(wide | {"intermediate_size": 2048} | size) for size in sizes.values())

    def of(student_held, teacher_held, memory_bytes=2**40):
        settings = [f"student.sharding={student_held}", f"teacher.sharding={teacher_held}"]
        return plan_run(config.with_overrides(settings), machine(16, memory_bytes), teacher, student)

    both = ("resident", "sharded")
    peaks = {(one, other): of(one, other).peak[1] for one in both for other in both}
    assert peaks["sharded", "sharded"] == min(peaks.values()) < peaks["resident", "resident"] == max(peaks.values())
    for layout, bytes_ in peaks.items():
        found = of("auto", "auto", int(bytes_ / 0.92) + 1)
        assert found.fits and found.peak[1] <= bytes_, layout
    found = of("auto", "auto", int(peaks["sharded", "sharded"] / 0.92) + 1)
    assert (found.student, found.teacher) == ("sharded", "sharded")
    found = of("auto", "auto", int(peaks["resident", "resident"] / 0.92) + 1)
    assert (found.student, found.teacher) == ("resident", "resident")


def test_settings_and_files_that_decide_are_obeyed(tmp_path):
    plan = planned(run_config(tmp_path, "student.sharding=sharded", "teacher.sharding=sharded"), machine(4))
    assert (plan.student, plan.teacher) == ("sharded", "sharded")
    assert planned(run_config(tmp_path, "rollout.gather=never"), machine(4)).gather == "never"
    plan = planned(run_config(tmp_path, zero_hpz_partition_size=4), machine(4))
    assert (plan.student, plan.teacher) == ("sharded", "sharded")


def test_a_plan_that_does_not_fit_is_refused_with_its_table(tmp_path):
    plan = planned(run_config(tmp_path), machine(2, 1000))
    assert not plan.fits
    refusal = plan.refusal()
    assert refusal.startswith("this run does not fit: student ")
    assert "| memory of a rank" in refusal and "the least of all layouts" in refusal
    assert plan.limit.startswith("memory, in ")


def test_on_a_cpu_the_replay_buffer_takes_the_models_memory(tmp_path):
    config = run_config(tmp_path, "schedule.policy=on_policy", "rollout.rows_at_once=1", "rollout.capacity=100000")
    peak = planned(config, machine(2, device="cpu")).peak[1]
    host = 50_000 * 32 * 4
    assert not planned(config, machine(2, int(peak / 0.92) + 1, device="cpu")).fits
    assert planned(config, machine(2, int((peak + host) / 0.92) + 1, device="cpu")).fits


def rows_of_advice(plan):
    return [(one.change, one.fits) for one in plan.advice]


def test_each_change_that_is_said_to_be_enough_is(tmp_path):
    config = run_config(tmp_path, "train.rows_per_step=64", "train.rows_per_micro_batch=16")
    least = plan_run(config, machine(2, 1), *shapes()).peak[1]
    on = machine(2, int(least * 0.9 / 0.92))
    plan = planned(config, on)
    assert not plan.fits
    enough = [one for one in plan.advice if one.fits]
    assert enough, rows_of_advice(plan)
    for one in enough:
        if one.change.startswith("--nodes"):
            changed = planned(config, dataclasses.replace(on, nodes=int(one.change.split()[1])))
        else:
            changed = planned(config.with_overrides(one.change.split()), on)
        assert changed.fits, one.change
        assert changed.peak[1] == pytest.approx(plan.peak[1] - one.saved)
        assert changed.exposed_seconds == one.seconds
    # The cheapest comes first, and other machines last.
    nodes = [one.change.startswith("--nodes") for one in plan.advice]
    assert nodes == sorted(nodes)
    seconds = [
        round(one.seconds / plan.exposed_seconds, 2) for one in plan.advice if not one.change.startswith("--nodes")
    ]
    assert seconds == sorted(seconds)


def test_changes_that_fit_only_together_are_told_together(tmp_path):
    config = run_config(tmp_path, "train.rows_per_step=64", "train.rows_per_micro_batch=16")
    smallest = plan_run(config, machine(2, 1), *shapes()).peak[1]
    for share in (0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
        plan = planned(config, machine(2, int(smallest * share / 0.92)))
        if plan.together:
            break
    assert plan.together, rows_of_advice(plan)
    assert not any(one.fits for one in plan.advice if not one.change.startswith("--nodes"))
    changed = config.with_overrides([text for change in plan.together for text in change.split()])
    assert planned(changed, plan.machine).fits
    assert f"Together these fit: {plan.together[0]}" in plan.table()


def test_time_follows_the_slowest_of_four(tmp_path):
    config = run_config(tmp_path, "student.sharding=resident", "teacher.sharding=resident")
    slow = dataclasses.replace(DEVICES["h100"], flops=1.0)
    plan = plan_run(config, Machine(1, 2, 2**40, 2**40, slow), *shapes())
    # 8 rows of 32 tokens: two FLOPs for each of 7,776 weights in layers, causal attention's, and the head's at 192
    teacher = plan.times[0]
    flops = 256 * (2 * 7776 + 2 * 32 * 16 * 3) + 2 * 192 * 1024
    assert teacher.arithmetic == pytest.approx(flops / 0.45)
    assert (teacher.seconds, teacher.limit) == (teacher.arithmetic, "arithmetic")
    assert plan.gpu_hours == pytest.approx(100 * plan.seconds * 2 / 3600)


def test_thousands_of_ranks_are_planned_in_one_process_and_written_as_json(tmp_path):
    config = run_config(tmp_path, "train.rows_per_step=8192")
    plan = planned(config, machine(8, nodes=512))
    found = json.loads(json.dumps(plan.to_json()))
    assert found["machine"]["nodes"] == 512
    assert found["peak"]["bytes"] == plan.peak[1] == max(found["bytes_by_phase"].values())
    assert found["collectives"][0]["received_between_nodes"] > 0


def test_a_machine_without_ranks_and_an_unknown_device_are_refused():
    with pytest.raises(ValueError, match="ranks_per_node = 0"):
        machine(0)
    with pytest.raises(ValueError, match="device = 'h1000' is not one of a100, h100"):
        machine(1, device="h1000")
