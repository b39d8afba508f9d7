"""What differs is told name by name with both values."""

import pytest

from toolkit.storage.differences import HASHES, differences, refuse


def test_each_difference_is_a_line_and_what_is_missing_is_none():
    before, now = {"a": 1, "b": "x", "c": None, "d": 2}, {"a": 1, "b": "y", "e": 3}
    assert differences(before, now) == {
        "b": "b was 'x', is 'y'", "d": "d was 2, is None", "e": "e was None, is 3",
    }  # fmt: skip
    found = differences({"model": "0" * 64}, {"model": "1" * 64, "new": "2" * 64}, HASHES)
    assert found["model"] == f"model had SHA-256 {'0' * 16}, has {'1' * 16}"
    assert found["new"] == f"new had SHA-256 None, has {'2' * 16}"


def test_a_refusal_has_what_is_wrong_each_line_and_the_remedy():
    refuse("it", [], "do this")
    with pytest.raises(ValueError, match=r"^it:\n  a\n  b\ndo this$"):
        refuse("it", iter("ab"), "do this")
