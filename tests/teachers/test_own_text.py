"""Sequence-level distillation: the teacher's text in place of the data's, once generated, on any number of ranks."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

import toolkit.teachers.own_text as teacher_text_module
from tests.run import loop_cases, run_cases
from tests.teachers import own_text_cases
from tests.tiny import tiny_overrides

pytestmark = pytest.mark.multiprocess


def files(cache):
    return sorted(cache.glob("teacher-text-*/*.npz"))


def responses(cache):
    (file,) = files(cache)
    with np.load(file) as stored:
        return np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])


def seqkd(tiny, name, **changes):
    return tiny_overrides(tiny, name=name, data__responses="teacher", cache_dir=str(tiny / f"cache {name}"), **changes)


def test_the_text_is_the_teachers_and_the_same_on_one_rank_and_on_two(tiny, ranks1, ranks2):
    for ranks, name in ((ranks1, "seqkd 1"), (ranks2, "seqkd 2")):
        ranks.run(run_cases.run_tiny, seqkd(tiny, name))
    one, two = (responses(tiny / f"cache seqkd {n}") for n in (1, 2))
    assert len(one) > 20 and len({text.tobytes() for text in one}) > 10
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    # What the teacher itself says to the same prompts under the same seeds
    said = ranks2.run(own_text_cases.teacher_answers, seqkd(tiny, "seqkd 2"), len(one))[0]
    assert all(np.array_equal(a, b) for a, b in zip(two, said, strict=True))


def test_it_is_made_once_trained_on_and_a_damaged_file_is_named(tiny, ranks2):
    settings = seqkd(tiny, "seqkd again")
    seen = ranks2.run(loop_cases.run_recording_sources, settings)[0]
    (file,) = files(tiny / "cache seqkd again")
    made, weights = file.stat().st_mtime_ns, load_file(tiny / "runs/seqkd again/student/model.safetensors")
    assert ranks2.run(loop_cases.run_recording_sources, settings)[0] == seen
    assert file.stat().st_mtime_ns == made
    again = load_file(tiny / "runs/seqkd again/student/model.safetensors")
    assert all((again[name] == tensor).all() for name, tensor in weights.items())
    plain = ranks2.run(loop_cases.run_recording_sources, tiny_overrides(tiny, name="not seqkd"))[0]
    assert [digest for _, digest in plain] != [digest for _, digest in seen]  # other text, same prompts
    file.write_bytes(file.read_bytes()[:-40])
    code, said = ranks2.run(run_cases.run_expecting_exit, settings)[0]
    assert code == 2 and str(file) in said and "delete it" in said


def test_without_a_teacher_it_is_refused(tiny, ranks1):
    code, said = ranks1.run(run_cases.run_expecting_exit, tiny_overrides(
        tiny, name="no teacher", data__responses="teacher", teacher__path="", loss__divergence="none",
        loss__cross_entropy_weight=1))[0]  # fmt: skip
    assert code == 2 and "teacher.path is empty" in said


def test_epochs_count_the_rows(tiny, ranks2):
    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="epochs", train__epochs=0.5))[0]
    rows = summary["data"]["train_rows"]
    assert summary["steps"] == round(0.5 * rows / 8) != 3
    saved = json.loads((tiny / "runs/epochs/summary.json").read_text())
    assert saved["steps"] == summary["steps"]


def test_two_jobs_that_write_the_same_text_do_not_disturb_each_other(tmp_path, monkeypatch):
    texts, save, calls = [np.array([5, 6]), np.array([7])], np.savez, []

    def save_twice(file, **arrays):
        calls.append(1)
        if len(calls) == 1:  # the other one writes while this one does
            teacher_text_module._write(tmp_path / "0.npz", texts)
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", save_twice)
    teacher_text_module._write(tmp_path / "0.npz", texts)
    assert len(calls) == 2 and [path.name for path in tmp_path.iterdir()] == ["0.npz"]
    assert [text.tolist() for text in teacher_text_module._read(tmp_path / "0.npz", 2)] == [[5, 6], [7]]


def test_a_long_generation_is_progress(tiny, ranks2):
    """The watchdog hears of each file, and of each pass of the model in between."""
    for files, calls in ranks2.run(own_text_cases.run_watching_teacher_text, seqkd(tiny, "seqkd watched"), 16):
        assert files == 3 and len(calls) >= 3 and all(calls)
