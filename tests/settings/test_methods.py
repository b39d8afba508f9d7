"""The paper's tables: every run of every recipe is valid, and each method takes two steps on random weights."""

import importlib
import json

import pytest

from tests.run import run_cases
from tests.tiny import tiny_overrides
from toolkit.run.recipe import chosen, main
from toolkit.settings import DataConfig, RunConfig, ScheduleConfig
from toolkit.settings.methods import METHODS, expanded, with_method

SHAPES = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 400, "n_positions": 128},
    "openllama2": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                   "intermediate_size": 64, "vocab_size": 400},
    "opt": {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
            "vocab_size": 400, "word_embed_proj_dim": 32},
}  # fmt: skip
TABLES = {name: importlib.import_module(f"recipes.{name}").RECIPES for name in SHAPES}


def tiny_run(tiny, family, run):
    """The recipe's settings where a method or a table makes them, everything that costs time small."""
    config = TABLES[family][run]
    small = {}
    for text in tiny_overrides(tiny):
        key, _, value = text.partition("=")
        if not key.startswith(("schedule.", "optimizer.")):
            small[key] = json.loads(value)
    tokenizer = f"{tiny}/student"
    for role in ("teacher", "student") if config.has_teacher else ("student",):
        small |= {f"{role}.random_weights": True, f"{role}.shape": SHAPES[family], f"{role}.tokenizer": tokenizer}
    if config.has_teacher:
        small["teacher.num_layers"] = 1  # two alike would have nothing to teach
    small |= {
        "name": f"{family} {run.replace('/', ' ')}", "train.epochs": None, "train.steps": 2, "train.rows_per_step": 4,
        "train.rows_per_micro_batch": 2, "optimizer.warmup_steps": 0, "validation.scored_rows": 2,
        "validation.every_steps": 1,
        "data.input_field": None, "data.prompt_field": "prompt", "text.max_length": 32, "text.field": "response",
        "validation.samples": 0, "teacher.path": "", "student.path": "", "rollout.max_new_tokens": 6,
    }  # fmt: skip
    if config.text.source:
        small["text.source"] = f"{tiny}/rows.jsonl"
    if config.schedule.policy == "adaptive":
        small["schedule.phi_initial"] = 1.0  # the paper's runs start at 0, and two steps would see the data alone
    return config.with_settings(small)


def different_runs():
    """One of the runs that are alike at tiny size: sizes differ in shapes, learning rates and lengths only."""
    seen, found = set(), []
    for family, table in TABLES.items():
        for run in table:
            kind = (family, run.rpartition("/")[2])
            if kind not in seen:
                seen.add(kind)
                found.append((family, run))
    return found


@pytest.mark.parametrize("family", TABLES)
def test_every_run_is_valid_and_says_its_name(family):
    for run, config in TABLES[family].items():
        config.validate()
        assert config.name == f"{family}-{run.replace('/', '-')}"
    assert {run.partition("/")[2] for run in TABLES[family]} == {"", "init", *METHODS}


@pytest.mark.parametrize(
    "family, run, lr, rows, epochs, ce, has_text, from_init",
    [
        ("gpt2", "teacher", 5e-5, 2, 10, 1, False, False),
        ("gpt2", "0.1b/distillm_skl", 5e-4, 8, 20, 0, True, True),
        ("gpt2", "0.1b/kd", 5e-4, 2, 20, 0, False, False),
        ("gpt2", "0.1b/seqkd", 5e-4, 2, 20, 0, True, False),
        ("gpt2", "0.3b/minillm", 5e-6, 4, 10, 0, True, True),
        ("gpt2", "0.7b/distillm_srkl", 1e-4, 4, 10, 0, True, True),
        ("gpt2", "0.7b/init", 5e-4, 8, 3, 1, False, False),
        ("gpt2", "0.7b/sft", 1e-4, 8, 10, 1, False, False),
        ("gpt2", "0.7b/imitkd", 5e-4, 4, 10, 0, True, True),
        ("opt", "0.1b/sft", 5e-4, 32, 20, 1, False, False),
        ("opt", "1.3b/init", 5e-5, 2, 3, 1, False, False),
        ("openllama2", "3b/sft", 5e-4, 8, 20, 1, False, False),
        ("openllama2", "3b/kd", 1e-5, 4, 10, 1, False, False),
        ("openllama2", "3b/gkd", 5e-4, 8, 10, 0, True, True),
    ],
)  # fmt: skip
def test_rows_are_those_of_the_released_scripts(family, run, lr, rows, epochs, ce, has_text, from_init):
    config = TABLES[family][run]
    assert (config.optimizer.lr, config.train.rows_per_step / 8, config.train.epochs) == (lr, rows, epochs)
    assert config.loss.cross_entropy_weight == ce and bool(config.text.source) == has_text
    assert config.student.path.startswith("runs/") == from_init


@pytest.mark.multiprocess
@pytest.mark.parametrize("family, run", different_runs())
def test_two_steps(tiny, ranks2, family, run):
    config = tiny_run(tiny, family, run)
    said = [f"{key}={json.dumps(value)}" for key, value in flat(config.to_dict()).items()]
    summary = ranks2.run(run_cases.run_tiny, said)[0]
    records = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").open()]
    assert summary["steps"] == len(records) == 2
    assert all(0 < record["grad_norm"] < float("inf") for record in records)
    assert (summary["validation"]["final"]["kl_nats"] is None) == (not config.has_teacher)
    sources = {record["source"] for record in records}
    wanted = {"off": {"dataset"}, "on_policy": {"generate"}, "adaptive": {"generate", "replay"}}
    assert sources <= wanted.get(config.schedule.policy, {"dataset", "generate"})
    assert all(("text_ce" in record) == bool(config.text.source) for record in records)


def flat(values, prefix=""):
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "shape":
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def test_a_recipe_of_several_runs_is_asked_by_name():
    table = {"a": RunConfig(name="a"), "b/c": RunConfig(name="b")}
    assert chosen(table, ["b/c", "seed=3"]) == RunConfig(name="b", seed=3)
    assert chosen(table["a"], ["seed=3"]) == RunConfig(name="a", seed=3)
    for method in METHODS:
        given = [f"method={method}", "loss.beta=0.1"]
        assert chosen(table["a"], given) == with_method(RunConfig(name="a"), method, {"loss.beta": 0.1})
        recipe = importlib.import_module("recipes.quickstart").RECIPE
        chosen(recipe, given[:1]).validate()
    assert 'distil.loss.divergence="rkl"' in expanded(["distil.method=minillm"])
    with pytest.raises(ValueError, match=r"distil.method = 'gdk' is not one of .* did you mean 'gkd'"):
        expanded(["distil.method=gdk"])
    with pytest.raises(ValueError, match="name one first: a, b/c"):
        chosen(table, ["seed=3"])
    with pytest.raises(ValueError, match="did you mean 'b/c'"):
        chosen(table, ["b/d"])
    with pytest.raises(ValueError, match=r"method = 'gdk' is not one of .* did you mean 'gkd'"):
        with_method(RunConfig(), "gdk")


@pytest.mark.parametrize("before", METHODS)
def test_a_method_is_the_same_whatever_was_set_before(before):
    """But for what none can know: the teacher that `sft` leaves out, the packing that `distillm2` switches off."""
    base = RunConfig(data=DataConfig(packing=False), schedule=ScheduleConfig(phi_initial=0.3))
    for method in METHODS:
        wanted = with_method(base, method)
        assert with_method(with_method(base, before), method) == wanted
        assert chosen(base, [f"method={before}", f"method={method}"]) == wanted
    assert with_method(base, before, {"loss.alpha": 0.15}).loss.alpha == 0.15
    assert with_method(base, before).schedule.phi_initial == 0.3


def test_help_of_several_runs_lists_the_settings_of_one(capsys):
    table = {"a": RunConfig(name="first"), "b/c": RunConfig(name="second")}
    for given, name, said in ((["--help"], "a", "first"), (["b/c", "--help"], "b/c", "second")):
        main(table, given)
        printed = capsys.readouterr().out
        assert "a, b/c" in printed and f"Settings of {name}," in printed
        assert f"\n  name = {said} " in printed and printed.count("\n  name = ") == 1
    with pytest.raises(SystemExit):
        main(table, ["b/d", "--help"])
    assert "did you mean 'b/c'" in capsys.readouterr().err
