"""The files of an evaluation: what may be written over, and what may not."""

import pytest

from toolkit.evaluation.records import Records

LINE = {"model": "m", "seed": 1, "row": 0, "answer": "a"}


@pytest.mark.parametrize("lines, models", [([LINE], {}), ([], {"m": {"metrics": {"kl": {}}}})])
def test_other_settings_are_refused_where_there_are_results(tmp_path, lines, models):
    records = Records(tmp_path / "out")
    records.write_summary(records.open({"temperature": 1.0}) | {"models": models})
    records.append(lines)
    assert records.open({"temperature": 1.0})["models"] == models
    with pytest.raises(ValueError, match=r"temperature was 1.0, is 0.5\nset these back, or give --out another name"):
        records.open({"temperature": 0.5})


@pytest.mark.parametrize("models", [{}, {"m": {"sha256": "0"}}])
def test_other_settings_take_the_place_of_those_that_nothing_came_of(tmp_path, models):
    records = Records(tmp_path / "out")
    records.write_summary(records.open({"temperature": 1.0}) | {"models": models})
    records.rows.write_text('{"model": "m", "se')  # as a kill leaves it
    wanted = {"settings": {"temperature": 0.5}, "models": {}}
    assert records.open({"temperature": 0.5}) == wanted and records.rows.read_text() == ""
    records.append([LINE])
    assert records.open({"temperature": 0.5}) == wanted  # and they are on disk
    records.summary.write_text('{"settings')
    with pytest.raises(ValueError, match=f"{records.summary} cannot be read"):
        records.open({"temperature": 0.5})
    records.summary.unlink()
    with pytest.raises(ValueError, match="is missing, which says how they were made"):
        records.open({"temperature": 0.5})
