"""Bytes of the collectives of a step, counted by hand for tiny shapes."""

import pytest

from tests.plan.plan_cases import EVERY_WEIGHT, STUDENT_NUMEL, TEACHER_NUMEL, machine, run_config, shapes
from toolkit.plan import plan_run
from toolkit.plan.traffic import Collective


def moved(config, on):
    return {one.name: one for one in plan_run(config, on, *shapes()).moved}


SHARDED = ("student.sharding=sharded", "teacher.sharding=sharded")
RESIDENT = ("student.sharding=resident", "teacher.sharding=resident")


def test_a_sharded_step_gathers_weights_and_scatters_gradients(tmp_path):
    found = moved(run_config(tmp_path, *SHARDED, **EVERY_WEIGHT), machine(4))
    # Each of 2 micro-batches gathers the student; it is small enough to stay until its backward pass
    assert found["student's weights, forward"].payload == 2 * 2 * STUDENT_NUMEL
    assert "student's weights, backward" not in found
    assert found["gradients"].payload == 2 * 2 * STUDENT_NUMEL
    # The teacher passes once over all rows. Its head is not part of the pass.
    assert found["teacher's layers"].payload == 2 * (TEACHER_NUMEL - 1024)
    assert found["teacher's head"].payload == 2 * 1024


def test_what_is_not_kept_is_gathered_again(tmp_path):
    found = moved(run_config(tmp_path, *SHARDED, stage3_max_reuse_distance=1, **EVERY_WEIGHT), machine(4))
    assert found["student's weights, backward"].payload == 2 * 2 * (STUDENT_NUMEL - 512)


def test_passes_of_the_teacher_gather_it_each(tmp_path):
    found = moved(run_config(tmp_path, *SHARDED, "teacher.rows_per_pass=2", **EVERY_WEIGHT), machine(2))
    assert found["teacher's layers"].payload == 4 * 2 * (TEACHER_NUMEL - 1024)


def test_a_resident_step_reduces_gradients_and_gathers_updated_weights_once(tmp_path):
    found = moved(run_config(tmp_path, *RESIDENT, "schedule.policy=on_policy"), machine(4))
    assert set(found) == {"gradients", "weights after the step"}
    assert (found["gradients"].kind, found["gradients"].payload) == ("all-reduce", 2 * 2 * STUDENT_NUMEL)
    assert found["weights after the step"].payload == 2 * STUDENT_NUMEL


def test_generation_gathers_the_student_once_or_for_each_token(tmp_path):
    settings = (*SHARDED, "schedule.policy=on_policy")
    once = moved(run_config(tmp_path, *settings, "rollout.gather=always", **EVERY_WEIGHT), machine(2))
    assert once["student, to generate"].payload == 2 * STUDENT_NUMEL
    assert once["student's weights, backward after it"].payload == 2 * STUDENT_NUMEL
    each = moved(run_config(tmp_path, *settings, "rollout.gather=never", **EVERY_WEIGHT), machine(2))
    assert each["student, to generate"].payload == 25 * 2 * STUDENT_NUMEL  # the prompt and 24 tokens


def test_one_rank_moves_nothing(tmp_path):
    assert not moved(run_config(tmp_path, *SHARDED, **EVERY_WEIGHT), machine(1))


@pytest.mark.parametrize(
    "kind, nodes, inside, between",
    [
        ("all-gather", 1, 700.0, 0.0),  # 7 of 8 eighths
        ("all-reduce", 1, 1400.0, 0.0),
        ("all-gather", 2, 875.0, 62.5),  # a rank gets 15 of 16 parts; half of all enters its node, by 8 ports
        ("reduce-scatter", 4, 875.0, 93.75),
    ],
)
def test_bytes_between_nodes_enter_a_node_once(kind, nodes, inside, between):
    got = Collective("x", kind, "teacher", 800.0 if nodes == 1 else 1000.0).received(machine(8, nodes=nodes))
    assert got == pytest.approx((inside, between))


def test_a_second_shard_keeps_the_teacher_s_traffic_in_its_node(tmp_path):
    found = moved(run_config(tmp_path, zero_hpz_partition_size=8, **EVERY_WEIGHT), machine(8, nodes=2))
    inside, between = found["teacher's layers"].received(machine(8, nodes=2))
    assert between == 0
    assert inside == found["teacher's layers"].payload * 7 / 8
