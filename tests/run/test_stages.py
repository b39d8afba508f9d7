"""A student in stages on two real ranks: cut, recovered on text, distilled; stopped, skipped, refused."""

import gc
import importlib
import io
import json
import os
import shutil
import signal
from contextlib import redirect_stdout
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.run import run_cases
from tests.tiny import tiny_overrides
from toolkit.ranks.signals import EXIT_LATER
from toolkit.run.stages import Stages
from toolkit.settings import InitConfig, ModelConfig, RunConfig

RECIPE = Stages(init=InitConfig(layers=1, rows=2, row_tokens=32), runs={"recovery": RunConfig(), "distil": RunConfig()})


def settings(tiny, name, *more):
    """Of both runs, on the models of `tiny`: 3 steps on text, then 3 on rows."""
    given = [text for text in tiny_overrides(tiny, name=name, resume="auto") if not text.startswith("student.path=")]
    return [
        *given, "recovery.data.kind=text", "recovery.data.text_field=response", "recovery.train.tokens=500",
        "recovery.data.max_length=24", "distil.schedule.policy=on_policy", "distil.validation.scored_rows=2", *more,
    ]  # fmt: skip


def run_staged(arguments, recipe=None):
    """(exit code, stdout, stderr, elements of live tensors that each stage left behind so far) on this rank."""
    from toolkit.run import run as staged

    def count():
        return sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu")

    gc.collect()  # what other tests in this process left is not this run's
    before, alive, original = count(), [], staged.run

    def counted(*given, **named):
        found = original(*given, **named)
        alive.append(count() - before)
        return found

    with mock.patch.object(staged, "run", counted):
        return *run_cases.run_saying(arguments, recipe or RECIPE), alive


def run_staged_until(arguments, stop_after, number):
    return run_cases.run_until(arguments, stop_after, number, recipe=RECIPE)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(tiny, ranks2):
    """(folder, what the ranks said, what stayed alive) of all stages in one go."""
    outcomes = ranks2.run(run_staged, settings(tiny, "whole"))
    assert [code for code, *_ in outcomes] == [0, 0], outcomes[0][2]
    return tiny / "runs" / "whole", outcomes[0][1], [alive for *_, alive in outcomes]


@pytest.mark.multiprocess
def test_each_stage_starts_from_the_one_before(tiny, whole):
    folder, said, _ = whole
    assert [f"stage {i} of 3" in said for i in (1, 2, 3)] == [True] * 3
    cut = load_file(folder / "init" / "student" / "model.safetensors")
    teacher = load_file(tiny / "teacher" / "model.safetensors")
    (kept,) = json.loads((folder / "init" / "student" / "pruning.json").read_text())["kept"]["layers"]
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(cut[name.format(0)], teacher[name.format(kept)])
    recovery, distil = summary(folder / "recovery"), summary(folder / "distil")
    assert (recovery["steps"], distil["steps"]) == (3, 3)  # 500 tokens in steps of 8 x 24
    assert distil["source_counts"]["generate"] + distil["source_counts"]["replay"] == 3
    for stage in (recovery, distil):
        assert (
            stage["validation"]["final"]["perplexity"] > 1
            and stage["validation"]["initial"] != (stage["validation"]["final"])
        )
    assert distil["identity"]["base_path"] == str(folder / "recovery" / "student")
    files = [folder / part / "student" / "model.safetensors" for part in ("init", "recovery", "distil")]
    assert len({file.read_bytes() for file in files}) == 3
    assert f"{distil['validation']['final']['kl_nats']:.3f}" in said.splitlines()[-1]


def test_a_cut_student_that_a_kill_has_half_deleted_is_not_taken_for_one(tmp_path):
    stages = RECIPE.with_overrides([f"output_dir={tmp_path}", "name=x"])
    student = stages.folder / "init" / "student"
    student.mkdir(parents=True)
    (student.parent / "summary.json").write_text("{}")
    with mock.patch.object(shutil, "rmtree"):  # as if killed before any file is deleted
        stages.clear()
    assert not stages.is_made and not student.parent.exists()


@pytest.mark.multiprocess
def test_a_stage_leaves_no_engine_behind(whole):
    """A bucket for gradients alone has 50 million elements, the models have 100 thousand."""
    for alive in whole[2]:
        assert alive[1] < 1e6 and alive[1] - alive[0] < 48 * 400, alive  # an embedding of the teacher's


@pytest.mark.multiprocess
def test_a_stopped_stage_goes_on_and_what_is_done_is_skipped(tiny, ranks2, whole):
    folder = tiny / "runs" / "stopped"
    for code, *_ in ranks2.run(run_staged_until, settings(tiny, "stopped"), 2, signal.SIGUSR1):
        assert code == EXIT_LATER
    assert not (folder / "recovery" / "student").exists() and not (folder / "distil").exists()
    made = (folder / "init" / "student" / "model.safetensors").stat().st_mtime_ns
    code, said, errors, _ = ranks2.run(run_staged, settings(tiny, "stopped"))[0]
    assert code == 0, errors
    assert f"goes on from {folder / 'recovery'}" in said
    assert (folder / "init" / "student" / "model.safetensors").stat().st_mtime_ns == made
    for stage in ("recovery", "distil"):
        weights = [file / stage / "student" / "model.safetensors" for file in (folder, whole[0])]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    # Checkpoints are large, and a finished stage does not need them.
    for stage in ("recovery", "distil"):
        shutil.rmtree(folder / stage / "checkpoints")
    code, said, *_ = ranks2.run(run_staged, settings(tiny, "stopped"))[0]
    assert code == 0 and said.count("this run is finished") == 2
    # A finished stage with other settings, with or without its checkpoints, is not passed off as this one.
    code, _, errors, _ = ranks2.run(run_staged, settings(tiny, "stopped", "recovery.optimizer.lr=0.4"))[0]
    assert code == 2 and "optimizer.lr was 0.5, is 0.4" in errors
    code, _, errors, _ = ranks2.run(run_staged, settings(tiny, "stopped", "init.depth=even"))[0]
    assert code == 2 and "init.depth was 'importance', is 'even'" in errors
    # A stage that was made anew: the next one, made from the old student, says so.
    code, said, errors, _ = ranks2.run(
        run_staged, settings(tiny, "stopped", "recovery.resume=never", "recovery.optimizer.lr=0.4")
    )[0]
    assert code == 2 and "the student's before training: model.safetensors had SHA-256" in errors
    # One that was started over and stopped: nothing goes on from what it had made before.
    again = settings(tiny, "stopped", "recovery.resume=never")
    assert [code for code, *_ in ranks2.run(run_staged_until, ["recovery", *again], 2, signal.SIGUSR1)] == [75, 75]
    code, _, errors, _ = ranks2.run(run_staged, ["distil", *again])[0]
    assert code == 2 and "is not there or not finished; run the stage recovery first" in errors


@pytest.mark.multiprocess
def test_a_student_is_cut_anew_where_all_is_started_over_and_only_from_the_same_teacher(tiny, ranks2, tmp_path):
    def cut(teacher, *more):
        given = settings(tiny, "cut", f"teacher.path={teacher}", f"output_dir={tmp_path}", *more)
        return ranks2.run(run_staged, ["init", *given])[0]

    teacher, made = tmp_path / "teacher", tmp_path / "cut" / "init" / "student" / "model.safetensors"
    shutil.copytree(tiny / "teacher", teacher)
    assert cut(teacher)[0] == 0
    first = made.stat().st_mtime_ns
    assert (tmp_path / "cut" / "lock").stat().st_mtime_ns < first  # no other job works in the folder meanwhile
    teacher = teacher.rename(tmp_path / "moved")
    assert cut(teacher)[0] == 0 and made.stat().st_mtime_ns == first
    assert cut(teacher, "resume=never")[0] == 0 and made.stat().st_mtime_ns > first
    tensors = load_file(teacher / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, teacher / "model.safetensors", {"format": "pt"})
    code, _, errors, _ = cut(teacher)
    assert code == 2 and "teacher.model.safetensors SHA-256 was " in errors
    code, _, errors, _ = cut(teacher, "init.data=python_docs")
    assert code == 2 and "calibration.source was " in errors


def run_staged_with_a_signal_in_the_export(arguments):
    from toolkit.ranks import collectives
    from toolkit.run import build

    def export(*given):
        if collectives.rank() == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*given)

    original = build.export_student
    with mock.patch.object(build, "export_student", export):
        return run_cases.run_saying(arguments, RECIPE)


@pytest.mark.multiprocess
def test_a_signal_at_the_end_of_a_stage_stops_before_the_next(tiny, ranks2):
    given, folder = settings(tiny, "late signal", "train.steps=1"), tiny / "runs" / "late signal"
    for code, *_ in ranks2.run(run_staged_with_a_signal_in_the_export, given):
        assert code == EXIT_LATER
    assert (folder / "recovery" / "summary.json").is_file() and not (folder / "distil").exists()


@pytest.mark.multiprocess
def test_one_stage_alone(tiny, ranks2, whole):
    folder = tiny / "runs" / "alone"
    code, _, errors, _ = ranks2.run(run_staged, ["distil", *settings(tiny, "alone")])[0]
    assert code == 2 and "run the stage recovery first" in errors
    student = f"student.path={whole[0] / 'recovery' / 'student'}"
    code, _, errors, _ = ranks2.run(run_staged, ["distil", *settings(tiny, "alone"), student])[0]
    assert code == 0, errors
    weights = [run / "distil" / "student" / "model.safetensors" for run in (folder, whole[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert ranks2.run(run_staged, ["init", *settings(tiny, "alone")])[0][0] == 0
    assert (folder / "init" / "student" / "pruning.json").is_file() and not (folder / "recovery").exists()


@pytest.mark.multiprocess
def test_a_random_teacher_is_one_and_the_same_in_all_stages(tiny, ranks2):
    shape = {"model_type": "llama", "vocab_size": 405, "hidden_size": 48, "num_hidden_layers": 9, "head_dim": 12,
             "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 256}  # fmt: skip
    changes = [
        "teacher.random_weights=true", "teacher.num_layers=2", f"teacher.shape={json.dumps(shape)}", "teacher.path=",
        f"teacher.tokenizer={tiny}/teacher", "distil.validation.scored_rows=0", "init.layers=2", "train.steps=1",
        "optimizer.lr=1e-9", "optimizer.min_lr=0", "precision=bf16",
    ]  # fmt: skip
    code, _, errors, _ = ranks2.run(run_staged, settings(tiny, "random", *changes))[0]
    assert code == 0, errors
    for stage in ("recovery", "distil"):  # nothing was left out, nothing was learned: the student is the teacher
        assert summary(tiny / "runs" / "random" / stage)["validation"]["final"]["kl_nats"] < 1e-4
    shutil.rmtree(tiny / "runs" / "random" / "init")
    changes[1] = "teacher.num_layers=3"
    assert ranks2.run(run_staged, ["init", *settings(tiny, "random", *changes)])[0][0] == 0
    made = json.loads((tiny / "runs" / "random" / "random_teacher" / "config.json").read_text())
    assert made["num_hidden_layers"] == 3


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["recovry.train.steps=2"], "did you mean 'recovery'"), (["train.stps=2"], "did you mean 'train.steps'"),
        (["init.layer=2"], "did you mean 'layers'"), (["steps=2"], "write train.steps"),
        (["distil.name=other"], "set output_dir and name for all of them"),
        (["student.path=x"], "write recovery.student.path"),
        (["student.random_weights=true"], "student.random_weights = True in stage recovery"),
        (["distil.student.drop_layers=[0]"], "student.drop_layers = [0] in stage distil"),
        (["recovery.student.path=x", "student.num_layers=1"], "student.num_layers = 1 in stage distil"),
        (["student.init.mlp=8"], "student.init = 'set' in stage recovery"),
        (["distil.student.lora.adapter=x", "distil.student.lora.rank=2"], "student.lora.adapter = 'x' in stage distil"),
        (["init.layers=null"], "say what the student keeps"),
        (["distill", "train.steps=2"], "did you mean 'distil'"), (["init.width=best"], "init.width = 'best'"),
        (["distil.train.tokens=5"], "train.tokens = 5 counts tokens of plain text"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_before_anything_is_made(tmp_path, ranks2, given, said):
    at = 1 if "=" not in given[0] else 0
    given = [*given[:at], f"output_dir={tmp_path}", "teacher.path=nowhere", *given[at:]]
    outcomes = ranks2.run(run_staged, given)
    assert [code for code, *_ in outcomes] == [2, 2]
    assert said in outcomes[0][2]
    assert not list(tmp_path.iterdir())


def test_a_setting_is_for_one_stage_or_for_all():
    found = RECIPE.with_overrides(
        ["train.steps=7", "distil.train.steps=9", "init.layers=4", "name=x", "output_dir=y", "distil.loss.alpha=0.3"]
    )
    assert found.init.layers == 4
    runs = found.chained()
    assert [config.train.steps for config in runs.values()] == [7, 9]
    assert [str(config.run_dir) for config in runs.values()] == ["y/x/recovery", "y/x/distil"]
    assert [config.student.path for config in runs.values()] == ["y/x/init/student", "y/x/recovery/student"]
    assert [config.loss.alpha for config in runs.values()] == [0.1, 0.3]
    own = RECIPE.with_overrides(["recovery.student.path=mine"])
    assert own.names == ["recovery", "distil"] and own.chained()["recovery"].student.path == "mine"


def test_the_length_that_is_given_last_counts():
    config = RunConfig().with_overrides(["data.kind=text", "data.max_length=32", "train.tokens=1e4"])
    assert config.for_rows(None).train.steps == 40  # 10,000 tokens in steps of 8 x 32
    assert config.with_overrides(["train.steps=3"]).for_rows(None).train.steps == 3
    assert config.with_overrides(["train.epochs=2"]).for_rows(100).train.steps == 25
    assert RunConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"leaves nothing of train\.steps = 40"):
        config.with_overrides(
            ["schedule.policy=off", "teacher.path=x", "student.path=y", "optimizer.warmup_steps=40"]
        ).validate()


@pytest.mark.parametrize("name", ["llama_7b_to_1b", "smollm2_135m_to_70m"])
def test_recipes_are_valid_and_help_says_their_stages(name, capsys):
    recipe = importlib.import_module(f"recipes.{name}").RECIPE
    for config in recipe.chained().values():
        config.validate()
    assert recipe.names == ["init", "recovery", "distil"]
    from toolkit.run.recipe import main

    said = io.StringIO()
    with redirect_stdout(said):
        main(recipe, ["--help"])
    assert "init, recovery, distil" in said.getvalue() and "warmup_steps" in said.getvalue()


def test_a_cut_needs_no_teacher_section_of_its_own():
    assert Stages(InitConfig(layers=1), {"only": RunConfig(student=ModelConfig(path="x"))}).names == ["only"]
