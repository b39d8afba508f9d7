"""What shows that weights have not arrived at a server, and what is only rounding."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import make_tokenizer, save_llama
from toolkit.rollout.arrival import Arrivals, probe_tokens, write_start

STUDENT = -12 + 3 * np.random.default_rng(1).standard_normal(127)  # log-probabilities
ROUNDING = 0.08 * np.random.default_rng(2).standard_normal(127)  # of a server in bf16


def export(folder, value):
    folder.mkdir()
    save_file({"weight": torch.full((4,), value)}, folder / "model.safetensors")
    return folder


def rounded(seed):
    return 0.08 * np.random.default_rng(seed).standard_normal(127)


@pytest.mark.parametrize("change_nats", (0, 1e-4, 1e-2, 0.3, 5))
def test_rounding_is_no_objection_whatever_the_student_has_changed_by(tmp_path, change_nats):
    arrivals = Arrivals()
    for push in range(5):
        wanted = STUDENT + push * change_nats
        found = wanted + rounded(push)
        assert arrivals.objection(export(tmp_path / f"{push}", float(push)), wanted, found) == ""


@pytest.mark.parametrize("change_nats", (1e-3, 1e-2, 0.3))
def test_an_answer_that_stays_the_same_digit_by_digit_is_by_old_weights(tmp_path, change_nats):
    arrivals, found = Arrivals(), STUDENT + ROUNDING
    assert arrivals.objection(export(tmp_path / "0", 0.0), STUDENT, found) == ""
    said = arrivals.objection(export(tmp_path / "1", 1.0), STUDENT + change_nats, found)
    assert f"speaks by the weights of an earlier push, not by those in {tmp_path / '1'}" in said


def test_changes_that_a_server_may_round_away_add_up_until_they_tell(tmp_path):
    arrivals, found, told = Arrivals(), STUDENT + ROUNDING, []
    for push in range(6):
        folder = export(tmp_path / f"{push}", float(push))
        told.append(bool(arrivals.objection(folder, STUDENT + push * 2e-5, found)))
        shutil.rmtree(tmp_path / f"{push - 1}", ignore_errors=True)
    assert told == [False, False, False, False, True, True]


def test_unequal_answers_by_equal_weights_are_no_change(tmp_path):
    """The first push repeats the hand-over, and some GPU kernels do not add up alike twice."""
    arrivals, found = Arrivals(), STUDENT + ROUNDING
    for push in range(3):
        assert arrivals.objection(export(tmp_path / f"{push}", 1.0), STUDENT + rounded(push), found) == ""
    assert arrivals.objection(export(tmp_path / "3", 2.0), STUDENT + rounded(3), found) != ""


@pytest.mark.parametrize("wanted, found", ((STUDENT, STUDENT + 0.6), (STUDENT, STUDENT * np.nan)))
def test_answers_far_from_the_students_are_by_other_weights(tmp_path, wanted, found):
    assert "speaks by other weights than those in" in Arrivals().objection(tmp_path, wanted, found)


def test_each_tensor_that_a_server_keeps_from_its_start_is_told(tmp_path):
    """As a real model would have it: one part stays what the server has started with, all others have arrived."""
    source, start = tmp_path / "student", tmp_path / "start"
    save_llama(source, make_tokenizer(), seed=3)
    (source / "model.safetensors").chmod(0o640)
    write_start(source, start)
    assert sorted(file.name for file in start.iterdir()) == sorted(file.name for file in source.iterdir())
    assert (start / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (start / "model.safetensors").stat().st_mode & 0o777 == 0o640

    model, weights = AutoModelForCausalLM.from_pretrained(source), load_file(source / "model.safetensors")
    ids = torch.from_numpy(probe_tokens(model.config.vocab_size, 96))[None]

    @torch.no_grad()
    def answer(changed):
        model.load_state_dict(weights | changed)
        log_probs_TV = model(ids).logits[0].log_softmax(-1)
        return log_probs_TV[:-1].gather(1, ids[0, 1:, None]).squeeze(1).numpy()

    wanted = answer({})
    for name, kept in load_file(start / "model.safetensors").items():
        assert kept.shape == weights[name].shape
        assert "speaks by other weights" in Arrivals().objection(source, wanted, answer({name: kept})), name
    assert Arrivals().objection(source, wanted, wanted) == ""
