"""An error of one rank is an error of all: on real ranks, which else wait for the one that has left."""

import pytest
from safetensors import SafetensorError

from tests.ranks import collectives_cases
from tests.run import resume_cases
from tests.tiny import tiny_overrides
from toolkit.ranks.collectives import Told

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("kind", [ValueError, OSError, SafetensorError, KeyError, RuntimeError, AssertionError])
@pytest.mark.parametrize("rank", [0, 1])
def test_any_error_of_one_rank_is_raised_on_all(ranks2, kind, rank):
    (zero, said), other = ranks2.run(collectives_cases.error_of_one_rank, kind, rank)
    assert zero is Told and other == (zero, said) and "no room" in said
    if kind in (KeyError, RuntimeError, AssertionError):  # made for programmers: kind and place have to be told
        assert said.startswith(f"rank {rank}: {kind.__name__}: ") and "(collectives_cases.py:" in said


def test_a_disk_that_is_full_at_the_export_ends_both_ranks(tiny, ranks2):
    overrides = tiny_overrides(tiny, name="no room", train__steps=1)
    (code, _, said), other = ranks2.run(resume_cases.run_with_failing_exports, overrides, ["student"])
    assert code == other[0] == 2 and "File too large" in said
    assert not (tiny / "runs" / "no room" / "student").exists()


@pytest.mark.parametrize("failing_ranks, is_told, told_by", [
    ((0, 1), True, 0), ((0, 1), False, 0), ((0,), False, 0), ((1,), False, 1),
])  # fmt: skip
def test_an_error_is_told_once_by_a_rank_that_has_it(ranks2, failing_ranks, is_told, told_by):
    for rank, (code, said) in enumerate(ranks2.run(collectives_cases.words_of_one_message, failing_ranks, is_told)):
        assert code == (2 if rank in failing_ranks else 0)
        place = " on rank 1" if told_by else ""
        assert said == (f"error{place}: this is wrong\n" if rank == told_by else "")


def test_a_folder_that_one_rank_does_not_see_is_refused_on_both(tmp_path, ranks2):
    assert ranks2.run(collectives_cases.error_of_folders, [tmp_path, tmp_path]) == [None, None]
    there = [tmp_path, tmp_path / "elsewhere"]
    zero, one = ranks2.run(collectives_cases.error_of_folders, there)
    assert f"{there[0]} of rank 0 is not there for rank 1 on " in zero
    assert zero.split(" of rank 0 ")[1] == one.split(" of rank 0 ")[1]
    assert not list(tmp_path.iterdir())
