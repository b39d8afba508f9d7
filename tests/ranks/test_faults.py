"""Steps that are not finite, and memory that runs out, on real ranks."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import fault_cases
from tests.run import run_cases
from tests.tiny import ds_file, save_rows, tiny_overrides
from toolkit.ranks.memory import Halving, is_out_of_memory
from toolkit.ranks.signals import EXIT_LATER
from toolkit.run.guard import StepGuard
from toolkit.settings import FaultsConfig

STUDENTS = [
    ("fp32", "student_sharded"),
    ("bf16", "student_sharded"),
    ("fp32", "student_zero2"),
    ("bf16", "student_zero2"),
]


def settings(tiny, name, **changes):
    return tiny_overrides(tiny, name=name, **({
        "train.steps": 6, "optimizer.name": "adamw", "optimizer.lr": 0.01, "optimizer.max_grad_norm": 1.0} | changes
    ))  # fmt: skip


def records(tiny, name):
    return [json.loads(line) for line in (tiny / "runs" / name / "metrics.jsonl").open()]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("precision", "ds_config"), STUDENTS)
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tiny, ranks2, precision, ds_config, poison):
    name = f"{poison} {precision} {ds_config}"
    overrides = settings(tiny, name, precision=precision, student__ds_config=ds_file(ds_config))
    for code, out, _, digests in ranks2.run(fault_cases.run_poisoned, overrides, poison, steps=(3, 4)):
        assert code == 0
        assert digests[1] == digests[2] == digests[3]  # nothing was taken
        assert len({digests[0], digests[1], digests[4], digests[5]}) == 4  # everything else was
        if out:
            assert "step 3 is skipped" in out and "(2 in a row, 2 in all)" in out
    found = records(tiny, name)
    assert [record["skipped_steps"] for record in found] == [0, 0, 1, 2, 2, 2]
    assert all(isinstance(record["loss"], float) for record in (found[4], found[5]))
    for rank in range(2):
        dump = json.loads((tiny / "runs" / name / "skipped" / "step-00000003" / f"rank-{rank:05d}.json").read_text())
        assert dump["step"] == 3 and len(dump["rows"]) == 4 and dump["rows"][0]["tokens"]


@pytest.mark.multiprocess
def test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint(tiny, ranks2):
    overrides = settings(tiny, "diverged", checkpoint__every_steps=2, faults__max_skipped_steps=2)
    found = ranks2.run(fault_cases.run_poisoned, overrides, "gradient", steps=(3, 4, 5))
    code, _, said, digests = found[0]
    assert code == found[1][0] == 2 and len(digests) == 4
    assert "2 in a row" in said and str(tiny / "runs" / "diverged" / "checkpoints") in said
    code, out, _ = ranks2.run(run_cases.run_saying, [*overrides, "resume=auto"])[0]
    assert code == 0 and "step-00000002" in out  # without the fault it goes on from there


@pytest.mark.multiprocess
def test_a_spike_is_skipped_where_that_is_asked_for(tiny, ranks2):
    guarded = {"faults.spike_factor": 5, "faults.spike_window": 3}
    for name, changes, skipped in (("guarded", guarded, 1), ("unguarded", {}, 0)):
        digests = ranks2.run(
            fault_cases.run_poisoned, settings(tiny, name, **changes), "spike", steps=(5,), ranks=(0, 1)
        )[0][3]
        assert (digests[3] == digests[4]) == bool(skipped)
        assert records(tiny, name)[-1]["skipped_steps"] == skipped


@pytest.mark.multiprocess
def test_what_was_skipped_is_known_after_a_resume(tiny, ranks2):
    overrides = settings(tiny, "skipped resume", resume="auto")
    ranks2.run(fault_cases.run_poisoned, settings(tiny, "skipped whole"), "loss", steps=(2, 3))
    for code, *_ in ranks2.run(fault_cases.run_poisoned_until, overrides, "loss", (2, 3), 3, signal.SIGUSR1):
        assert code == EXIT_LATER
    assert ranks2.run(run_cases.run_saying, overrides)[0][0] == 0
    weights = [(tiny / "runs" / f"skipped {how}" / "student" / "model.safetensors").read_bytes() for how in
               ("resume", "whole")]  # fmt: skip
    assert weights[0] == weights[1] and records(tiny, "skipped resume")[-1]["skipped_steps"] == 2


def test_the_guard_wants_a_full_window_before_it_calls_a_spike():
    guard, faults = StepGuard(), FaultsConfig(spike_factor=2.0, spike_window=3, max_skipped_steps=2)
    for loss in (1.0, 1.0):
        guard.record(loss, taken=True, faults=faults)
    assert (
        guard.objection(100.0, faults) is None
        and guard.objection(float("nan"), faults)
        and guard.objection(float("inf"), faults)
    )
    guard.record(1.0, taken=True, faults=faults)
    assert guard.objection(2.0, faults) is None and "above 2 medians" in guard.objection(2.1, faults)
    guard.record(5.0, taken=False, faults=faults)
    assert guard.losses == [1.0, 1.0, 1.0] and not guard.gives_up(faults)
    guard.record(5.0, taken=False, faults=faults)
    assert guard.gives_up(faults)
    guard.record(1.0, taken=True, faults=faults)
    assert not guard.gives_up(faults) and guard.skipped == 2


def test_halving_says_so_and_stays_at_what_fits(capsys):
    """The allocator's own error: half of the address space is more than any machine has."""
    halving, tried = Halving("the test", "rows", least=2), []

    def work(size):
        tried.append(size)
        return torch.empty(2**46) if size is None or size > 3 else size

    assert halving.run(work, whole=12) == 3 and halving.run(work, whole=12) == 3
    assert tried == [None, 6, 3, 3]
    said = capsys.readouterr().err
    assert "out of memory in the test; 12 rows become 6" in said and said.count("become") == 2
    with pytest.raises(RuntimeError) as raised:
        halving.run(lambda size: torch.empty(2**46), whole=12)
    assert is_out_of_memory(raised.value) and halving.size == 2
    with pytest.raises(RuntimeError, match="something else"):
        halving.run(lambda size: exec('raise RuntimeError("something else")'), whole=12)


@pytest.fixture(scope="module")
def roomy(tiny, ranks2):
    """Settings by name of a run whose parts are large enough to be halved, its folder, and the largest tensor that each
    part made, in bytes, where nothing was short."""
    save_rows(tiny / "many.jsonl", 140)

    def roomy_settings(name):
        return settings(
            tiny, name, train__steps=2, data__source=f"{tiny}/many.jsonl", train__rows_per_step=128,
            train__rows_per_micro_batch=64, schedule__policy="mixed", schedule__mixed_share=1.0,
            rollout__train_on_fresh=True, rollout__max_new_tokens=48, loss__memory_budget_mib=8, validation__rows=2,
        )  # fmt: skip

    found = ranks2.run(fault_cases.run_short_of_memory, roomy_settings("roomy"), {})
    assert [code for code, *_ in found] == [0, 0] and "out of memory" not in found[0][1] + found[1][1]
    return roomy_settings, tiny / "runs" / "roomy", found[1][2]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("loss", "the loss; 8 MiB of tiles become 4"),
        ("teacher", "the teacher's window; 64 rows become 32"),
        ("generation", "generation; 64 rows become 32"),
    ],
)
def test_a_rank_that_is_short_of_memory_halves_its_part_and_the_run_ends_the_same(tiny, ranks2, roomy, part, said):
    roomy_settings, whole, most_bytes = roomy
    limits = {part: 0.75 * most_bytes[part]}
    (*zero, _), (*one, _) = ranks2.run(fault_cases.run_short_on_last_rank, roomy_settings(f"short {part}"), limits)
    assert zero == [0, ""]
    assert one[0] == 0 and one[1].count("out of memory") == 1 and f"rank 1: out of memory in {said}" in one[1]
    folder = tiny / "runs" / f"short {part}"
    tensors = [load_file(run / "student" / "model.safetensors") for run in (folder, whole)]
    assert max((tensors[0][name] - tensors[1][name]).abs().max().item() for name in tensors[1]) <= 1e-5
    for ours, theirs in zip(records(tiny, folder.name), records(tiny, whole.name), strict=True):
        assert (ours["source"], ours["tokens"]) == (theirs["source"], theirs["tokens"])
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
