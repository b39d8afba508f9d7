"""Settings for readers: what is written beside each, the page of `--help`, and docs/configuration.md."""

from pathlib import Path

import pytest

from toolkit import cli
from toolkit.evaluation.protocols import PROTOCOLS, settings_table
from toolkit.settings import EvaluationConfig, InitConfig, RunConfig
from toolkit.settings.page import help_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


@pytest.mark.parametrize("config", [RunConfig(), EvaluationConfig(), InitConfig()])
def test_every_setting_says_what_it_means_and_its_default_is_allowed(config):
    for key, value, setting in config.entries():
        assert setting.meaning.endswith("."), key
        setting.check(key, value)
        assert setting.unit or not key.endswith(("rows", "_steps", "_tokens", "_s", "_mib")), key
        assert value is not None or None in setting.means, f"{key}: what does null stand for?"


def test_the_page_in_docs_is_the_one_that_the_settings_make(capsys):
    cli.main(["settings"])
    assert PAGE.read_text() == capsys.readouterr().out, (
        "docs/configuration.md is stale; run python -m toolkit settings > docs/configuration.md"
    )


@pytest.mark.parametrize("columns", [40, 100, 300])
def test_help_says_name_value_and_meaning_of_every_setting_in_the_width_of_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    config = RunConfig().with_overrides(["train.steps=7", "text.field=a b"])
    page = help_page(config)
    words = " ".join(page.split())
    for key, _, setting in config.entries():
        assert f"\n  {key} = " in page and setting.meaning in words
    assert " train.steps = 7 Optimizer steps. " in words and ' text.field = "a b" Field ' in words
    assert "(rows of all ranks; at least 1)" in words  # unit and bounds
    assert "(one of auto, bf16, fp32)" in words and "null: all rows" in words  # choices, what some values stand for
    too_long = [line for line in page.splitlines() if len(line) > min(columns, 120) and " " in line.strip()]
    assert all(" = " in line for line in too_long)  # a name with its value, which are not parted
    assert page.startswith("A whole run;")


def test_help_of_stages_says_where_the_others_differ():
    first = RunConfig()
    page = help_page(first, {"distil": first.with_overrides(["train.steps=9"])})
    assert page.count("distil: ") == 1 and "distil: 9" in page


def test_help_of_evaluate_has_the_values_of_both_protocols():
    page = " ".join(settings_table().split())
    assert "sampling.no_repeat_ngram_size = 6 " in page and "--protocol plain: 0" in page
    assert all(f" {key} = " in page for key, *_ in PROTOCOLS["plain"].entries())
