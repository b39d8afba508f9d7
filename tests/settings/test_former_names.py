"""Settings that were renamed: a former name is refused with the present one, and what was stored under it is read."""

import copy

import pytest

from toolkit.run.checkpoint import compare
from toolkit.run.stages import Stages
from toolkit.settings import EvaluationConfig, InitConfig, ModelConfig, RunConfig, TrainConfig

FORMER = {
    "train.batch_rows": "train.rows_per_step",
    "train.micro_rows": "train.rows_per_micro_batch",
    "train.micro_tokens": "train.tokens_per_micro_batch",
    "text.batch_rows": "text.rows_per_step",
    "teacher.pass_rows": "teacher.rows_per_pass",
    "student.pass_rows": "student.rows_per_pass",
    "rollout.batch_rows": "rollout.rows_at_once",
    "validation.batch_rows": "validation.rows_per_pass",
    "validation.rouge_rows": "validation.scored_rows",
}
FORMER_OF_EVALUATION = {"batch_rows": "rows_at_once", "kl_batch_rows": "rows_per_pass"}
IDENTITY = {"precision": "float32", "data_sha256": "x", "teacher_sha256": {}, "base_sha256": {}}


def under_former_names(stored):
    """The config of a run, as `to_dict` has it, as it was stored before the settings were renamed."""
    stored = copy.deepcopy(stored)
    for former, present in FORMER.items():
        (section, old), (_, new) = former.split("."), present.split(".")
        stored[section][old] = stored[section].pop(new)
    return stored


@pytest.mark.parametrize(("former", "present"), FORMER.items())
def test_a_former_name_is_refused_with_the_present_one(former, present):
    section, name = former.split(".")
    stages = Stages(InitConfig(layers=1), {"recovery": RunConfig()})
    for changed in (
        lambda: RunConfig().with_overrides([f"{former}=4"]),
        lambda: RunConfig().with_overrides([f"{section}={{{name}: 4}}"]),
        lambda: RunConfig().with_settings({former: 4}),
        lambda: RunConfig.from_dict({section: {name: 4}}),
        lambda: stages.with_overrides([f"recovery.{former}=4"]),
    ):
        with pytest.raises(ValueError, match=rf"config key '{former}' is now called {present}$"):
            changed()


@pytest.mark.parametrize(("former", "present"), FORMER_OF_EVALUATION.items())
def test_a_former_name_of_an_evaluation_is_refused_with_the_present_one(former, present):
    with pytest.raises(ValueError, match=rf"config key '{former}' is now called {present}$"):
        EvaluationConfig().with_overrides([f"{former}=4"])


def test_a_former_name_without_its_section_is_told_by_the_present_ones():
    told = r"write text\.rows_per_step or train\.rows_per_step or rollout\.rows_at_once or validation\.rows_per_pass$"
    with pytest.raises(ValueError, match=told):
        RunConfig().with_overrides(["batch_rows=8"])


def test_a_keyword_that_is_no_setting_is_told_by_its_present_or_nearest_name():
    with pytest.raises(TypeError, match=r"TrainConfig\(batch_rows=\.\.\.\): this setting is now called rows_per_step"):
        TrainConfig(steps=3, batch_rows=8)
    with pytest.raises(TypeError, match="did you mean 'random_weights'"):
        ModelConfig(random_weight=True)


def test_a_checkpoint_of_former_names_is_of_the_same_run():
    config = RunConfig().with_overrides(["text.rows_per_step=4", "train.rows_per_step=16", "rollout.rows_at_once=3"])
    saved = {"config": under_former_names(config.to_dict()), "identity": IDENTITY}
    assert saved["config"]["train"]["batch_rows"] == 16 and "rows_per_step" not in saved["config"]["train"]
    assert compare(saved, config, IDENTITY) == []
    assert compare(saved, config.with_overrides(["train.rows_per_micro_batch=2"]), IDENTITY) == [
        "train.rows_per_micro_batch was 4, is 2"
    ]
    with pytest.raises(ValueError, match=r"train\.rows_per_step was 16, is 8"):
        compare(saved, config.with_overrides(["train.rows_per_step=8"]), IDENTITY)


def test_every_former_name_is_in_the_tables_of_this_file():
    found = {
        name + former: name + present
        for name, section in RunConfig().parts()
        for former, present in section.former_names().items()
    }
    assert found == FORMER and EvaluationConfig.former_names() == FORMER_OF_EVALUATION
