"""The best student of a run is kept, across a stop as well; its folder is what the validation measured."""

import json
import signal

import pytest

from tests.evaluation import evaluation_cases
from tests.run import run_cases
from tests.tiny import tiny_overrides
from toolkit.ranks.signals import EXIT_LATER

pytestmark = pytest.mark.multiprocess


def settings(tiny, name, by):
    return tiny_overrides(
        tiny, name=name, validation__best=by, train__steps=5, validation__every_steps=1, validation__scored_rows=3,
        checkpoint__every_steps=1, optimizer__lr=6.0, resume="auto",
    )  # fmt: skip


def outcome(tiny, name):
    folder = tiny / "runs" / name
    summary = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    seen = [summary["validation"]["initial"], *(record["validation"] for record in records)]
    return summary["best"], seen, (folder / "best" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("by", "key", "choose"), [
    ("kl", "kl_nats", min), ("ce", "ce_nats", min), ("rouge_l", "rouge_l", max), ("chrf", "chrf", max),
])  # fmt: skip
def test_the_best_is_exported_and_survives_a_stop(tiny, ranks2, by, key, choose):
    ranks2.run(run_cases.run_tiny, settings(tiny, f"best {by}", by))
    best, seen, weights = outcome(tiny, f"best {by}")
    values = [validation[key] for validation in seen]
    assert len(values) == 6 and len(set(values)) > 2
    assert best["by"] == by and best["value"] == choose(values) and best["step"] == values.index(choose(values))
    stopped = settings(tiny, f"best {by} stopped", by)
    for code, *_ in ranks2.run(run_cases.run_until, stopped, 3, signal.SIGUSR1):
        assert code == EXIT_LATER
    ranks2.run(run_cases.run_tiny, stopped)
    again, _, same = outcome(tiny, f"best {by} stopped")
    assert {**again, "student": None} == {**best, "student": None} and same == weights


def test_evaluate_measures_the_best_as_the_validation_did(tiny, ranks2):
    ranks2.run(run_cases.run_tiny, settings(tiny, "best measured", "kl"))
    best, *_ = outcome(tiny, "best measured")
    code, _, said, found = ranks2.run(evaluation_cases.command, [
        "evaluate", "--model", best["student"], "--data", f"{tiny}/rows.jsonl", "--protocol", "plain", "--metric", "kl",
        "--teacher", f"{tiny}/teacher", "--out", f"{tiny}/best-measured", "data.max_rows=6", "data.max_length=96",
        "data.max_prompt_length=64", "precision=fp32",
    ])[0]  # fmt: skip
    assert code == 0, said
    assert found["models"][best["student"]]["metrics"]["kl"]["mean"] == pytest.approx(best["value"], abs=1e-5)
