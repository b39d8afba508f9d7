"""An error of one rank is an error of all: on real ranks, which else wait for the one that has left."""

import pytest
from safetensors import SafetensorError

from tests import engine_cases
from tests.tiny import tiny_overrides

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("kind", [ValueError, OSError, SafetensorError, KeyError, RuntimeError, AssertionError])
@pytest.mark.parametrize("rank", [0, 1])
def test_any_error_of_one_rank_is_raised_on_all(ranks2, kind, rank):
    (zero, said), other = ranks2.run(engine_cases.error_of_one_rank, kind, rank)
    assert zero is ValueError and other == (zero, said) and "no room" in said
    if kind in (KeyError, RuntimeError, AssertionError):  # made for programmers: kind and place have to be told
        assert said.startswith(f"rank {rank}: {kind.__name__}: ") and "(engine_cases.py:" in said


def test_a_disk_that_is_full_at_the_export_ends_both_ranks(tiny, ranks2):
    overrides = tiny_overrides(tiny, name="no room", train__steps=1)
    (code, _, said), other = ranks2.run(engine_cases.run_with_failing_exports, overrides, ["student"])
    assert code == other[0] == 2 and "File too large" in said
    assert not (tiny / "runs" / "no room" / "student").exists()
