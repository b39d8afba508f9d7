import json
import multiprocessing
import sys
import time

import pytest

from toolkit.data import python_docs
from toolkit.data.python_docs import clean_docstring, python_docs_rows


@pytest.fixture(scope="module")
def train():
    return python_docs_rows("train")


@pytest.fixture(scope="module")
def validation():
    return python_docs_rows("validation")


def test_size_time_and_share(train, validation):
    python_docs._all_rows.cache_clear()
    start = time.perf_counter()
    assert python_docs_rows("train") == train  # read anew: deterministic
    assert time.perf_counter() - start < 15
    assert len(train) >= 3000
    assert 0.04 < len(validation) / (len(train) + len(validation)) < 0.1


def test_splits_share_no_module_and_no_answer(train, validation):
    modules = [{row["module"].split(".")[0] for row in rows} for rows in (train, validation)]
    assert not modules[0] & modules[1] and len(modules[1]) >= 5
    answers = [row["response"].lower() for row in train + validation]
    assert len(set(answers)) == len(answers)


def test_rows_are_prose(train, validation):
    for row in train + validation:
        text = row["response"]
        assert 4 <= len(text.split()) <= 90 and text[-1] in ".!?)\"'", row
        assert not any(mark in text for mark in (">>>", "\n", "  ", " -> ", "@param", "{", "|", "::")), row
        assert row["prompt"].count("`") == 2 and row["prompt"][-1] in "?.", row
        assert not python_docs.SIGNATURE.match(text), row


def test_well_known_rows_are_there(train, validation):
    by_name = {row["prompt"].split("`")[1]: row["response"] for row in train + validation}
    assert by_name["shutil.copytree"].startswith("Recursively copy a directory tree")
    assert by_name["math.cbrt"] == "Return the cube root of x."
    assert by_name["json.dumps"] == "Serialize `obj` to a JSON formatted `str`."
    assert {"len", "os.getcwd", "heapq.heappush", "unittest.TestCase.assertEqual"} <= set(by_name)


def test_first_rows_are_of_many_modules(train):
    assert len({row["module"] for row in train[:100]}) > 30


def test_several_phrasings(train):
    assert len({row["prompt"].partition("`")[0] for row in train}) >= 8


def test_nothing_is_imported_into_this_process(train):
    assert "wsgiref.simple_server" not in sys.modules and "this" not in sys.modules


@pytest.mark.parametrize(
    "doc, want",
    [
        ("copy(x) -> y\n\nReturn a shallow copy of x.", "Return a shallow copy of x."),
        ("copy(x, [y]) -> z\ncopy(x)\nReturn a copy of x.", "Return a copy of x."),
        ("f(x) -- do something with x", "Do something with x."),
        ("Return a copy\n    of x.\n\n    More about it.", "Return a copy of x."),
        ("Use :class:`~a.B` or ``None`` here.", "Use `a.B` or `None` here."),
        ("Point(x: int, y: int = 0)", None),
        ("Too short.", None),
        ("word " * 91, None),
        ("For example this: >>> f(1) gives two", None),
        ("The following options are known:", None),
        ("- a list of things\n- and more of them", None),
        ("", None),
        (None, None),
    ],
)
def test_clean_docstring(doc, want):
    assert clean_docstring(doc, "m.f") == want


def _rows_into(cache_dir):
    return len(python_docs_rows("train", cache_dir))


@pytest.mark.multiprocess
def test_two_processes_may_fill_one_cache(tmp_path, train, monkeypatch):
    cache_dir = str(tmp_path / "new")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_rows_into, [cache_dir] * 2) == [len(train)] * 2
    (cached,) = (tmp_path / "new").iterdir()  # and no temporary file is left
    assert sys.version.split()[0] in cached.name
    (tmp_path / "plain").write_text("")
    assert cached.stat().st_mode == (tmp_path / "plain").stat().st_mode  # other users of the cache can read it
    lines = cached.read_text().splitlines()
    cached.write_text("\n".join(lines[:10]))  # the cache is what is read
    assert len(python_docs_rows("train", cache_dir)) + len(python_docs_rows("validation", cache_dir)) == 10
    assert {"prompt", "response", "module"} == set(json.loads(lines[0]))


def test_unknown_split():
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        python_docs_rows("test")
