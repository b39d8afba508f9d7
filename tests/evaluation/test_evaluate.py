"""`evaluate` as a whole: on one rank and on two, cut off and continued, against dense references, and refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation import evaluation_cases
from toolkit.batch import TokenBatch
from toolkit.data import DataConfig, load_rows, tokenize_rows
from toolkit.evaluation.protocols import PROTOCOLS
from toolkit.storage.lock import sole_use

pytestmark = pytest.mark.multiprocess
ROWS = [
    {"instruction": f"What is file {i}?", "input": "a folder" * (i % 2), "output": ["Return the number", f"a file {i}"]}
    for i in range(7)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def arguments(tiny, data, out, *more, models=("student",), metric="rouge_l,bleu,chrf,exact_match", seeds="10,20"):
    named = [text for model in models for text in ("--model", f"{tiny}/{model}")]
    return [
        "evaluate", *named, "--data", str(data), "--metric", metric, "--seeds", seeds, "--out", str(out),
        "precision=fp32", "data.max_length=190", "data.max_prompt_length=170", *more,
    ]  # fmt: skip


def evaluated(ranks, *given, **named):
    code, printed, said, found = ranks.run(evaluation_cases.command, arguments(*given, **named))[0]
    assert code == 0, said
    return found, printed


def lines(out):
    return [json.loads(line) for line in (out / "rows.jsonl").open()]


def scores(summary):
    return {name: entry["metrics"] for name, entry in summary["models"].items()}


def test_two_ranks_say_and_score_what_one_does(tiny, data, tmp_path, ranks1, ranks2):
    models = ("student", "tied")
    one, printed = evaluated(ranks1, tiny, data, tmp_path / "one", models=models)
    two, _ = evaluated(ranks2, tiny, data, tmp_path / "two", "save_rows=3", models=models)  # 3: an uneven deal
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    assert scores(one) == scores(two)
    rows = lines(tmp_path / "one")
    assert [(r["model"], r["seed"], r["row"]) for r in rows] == [
        (f"{tiny}/{m}", s, i) for m in models for s in (10, 20) for i in range(7)
    ]
    assert rows[1]["references"] == ROWS[1]["output"] and rows[1]["prompt"].endswith("### Response:\n")
    assert "### Input:\na folder\n" in rows[1]["prompt"] and "### Input" not in rows[0]["prompt"]
    assert len({r["answer"] for r in rows}) > 20 and all(0 < r["tokens"] <= 20 for r in rows)
    found = one["models"][f"{tiny}/student"]["metrics"]["rouge_l"]
    by_seed = [sum(r["scores"]["rouge_l"] for r in rows[start : start + 7]) / 7 for start in (0, 7)]
    assert list(found["by_seed"].values()) == pytest.approx(by_seed)
    assert found["deviation"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5) and found["deviation"] > 0
    table = [line for line in printed.splitlines() if line.startswith("|")]
    titles = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert titles == ["model", "ROUGE-L", "BLEU", "chrF", "exact match", "tokens/s"] and len(table) == 4
    assert f"{found['mean']:.2f} ± {found['deviation']:.2f}" in table[2]
    assert printed.endswith("; ± is the deviation over seeds; 0 prompts cut to 170 tokens\n")


def test_an_evaluation_that_was_cut_ends_like_one_that_was_not(tiny, data, tmp_path, ranks2):
    whole, _ = evaluated(ranks2, tiny, data, tmp_path / "whole", "save_rows=4")
    cut, _ = evaluated(ranks2, tiny, data, tmp_path / "cut", "save_rows=4", metric="rouge_l")
    text = (tmp_path / "cut" / "rows.jsonl").read_bytes()
    middle = len(text) // 2
    assert text[middle - 1 : middle] != b"\n"
    (tmp_path / "cut" / "rows.jsonl").write_bytes(text[:middle])  # as a kill leaves it: half of a line
    said_tokens = cut["models"][f"{tiny}/student"]["generated_tokens"]
    again, _ = evaluated(ranks2, tiny, data, tmp_path / "cut", "save_rows=5")  # and three metrics more
    assert (tmp_path / "cut" / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()
    assert scores(again) == scores(whole)
    entry = again["models"][f"{tiny}/student"]
    assert said_tokens < entry["generated_tokens"] < 2 * said_tokens  # what was there was not asked for again
    done, printed = evaluated(ranks2, tiny, data, tmp_path / "cut")
    assert done == again and "answers" not in printed


def test_what_nothing_came_of_holds_nothing(tiny, data, tmp_path, ranks1):
    given = arguments(tiny, data, tmp_path / "out", models=("nowhere",), seeds="1")
    assert ranks1.run(evaluation_cases.command, given)[0][0] == 2
    found, printed = evaluated(
        ranks1, tiny, data, tmp_path / "out", "sampling.temperature=0.5", "data.max_prompt_length=44", seeds="1"
    )
    assert found["settings"]["temperature"] == 0.5 and found["settings"]["max_prompt_length"] == 44
    cut = found["models"][f"{tiny}/student"]["truncated_prompts"]
    assert cut > 0 and printed.endswith(f"; {cut} prompts cut to 44 tokens\n")


def test_kl_is_that_of_full_logits_in_float64(tiny, data, tmp_path, ranks2):
    found, _ = evaluated(
        ranks2, tiny, data, tmp_path / "kl", "--teacher", f"{tiny}/teacher", "rows_per_pass=2",
        models=("student", "teacher"), metric="kl",
    )  # fmt: skip
    assert not (tmp_path / "kl" / "rows.jsonl").exists()  # nothing had to be said for it
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    config = DataConfig(
        source=str(data), template="alpaca", max_length=190, max_prompt_length=170, prompt_field="instruction",
        input_field="input", response_field="output",
    )  # fmt: skip
    examples = tokenize_rows(load_rows(config, str(data))[0], tokenizer, config).examples
    batch = TokenBatch.from_examples(examples, tokenizer.pad_token_id)
    logs = []
    for model in ("teacher", "student"):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(tiny / model, dtype=torch.float64)(
                batch.input_ids_BT, attention_mask=batch.attention_mask_BT
            ).logits
        logs.append(logits[batch.predicts_BT][:, : len(tokenizer)].log_softmax(-1))
    wanted = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()
    metrics = scores(found)
    assert wanted > 0.1 and metrics[f"{tiny}/student"]["kl"]["mean"] == pytest.approx(wanted, abs=1e-5)
    assert metrics[f"{tiny}/teacher"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)


def test_the_papers_protocol_to_the_letter():
    paper = PROTOCOLS["paper"]
    sampling = paper.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.no_repeat_ngram_size) == (1, 1, 0, 6)
    assert (paper.data.template, paper.data.max_length, paper.data.max_prompt_length) == ("alpaca", 512, 256)
    assert paper.new_tokens == 256


def test_no_ngram_comes_twice_where_the_protocol_says_so(tiny, data, tmp_path, ranks1):
    free, _ = evaluated(ranks1, tiny, data, tmp_path / "free", "sampling.no_repeat_ngram_size=0",
                        "sampling.temperature=0", seeds="1")  # fmt: skip
    bound, _ = evaluated(ranks1, tiny, data, tmp_path / "bound", "sampling.no_repeat_ngram_size=2",
                         "sampling.temperature=0", seeds="1")  # fmt: skip
    assert free["settings"]["no_repeat_ngram_size"] == 0 and bound["settings"]["no_repeat_ngram_size"] == 2
    assert [line["answer"] for line in lines(tmp_path / "free")] != [
        line["answer"] for line in lines(tmp_path / "bound")
    ]


@pytest.mark.parametrize(("message", "more", "named"), [
    ("temperature was 1.0, is 0.5", ["sampling.temperature=0.5"], {}),
    ("rows was 7, is 5", ["data.max_rows=5"], {}),
    ("system was None, is 'Be brief.'\n  template was 'alpaca', is 'chat'\n  template_args was None, is {'role': 'x'}",
     ["data.template=chat", "data.system=Be brief.", "data.template_args={role: x}"], {}),
])  # fmt: skip
def test_answers_made_otherwise_are_not_mixed(tiny, data, tmp_path, ranks2, message, more, named):
    evaluated(ranks2, tiny, data, tmp_path / "out", seeds="1")
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    results = ranks2.run(evaluation_cases.command, arguments(tiny, data, tmp_path / "out", *more, seeds="1", **named))
    assert [code for code, *_ in results] == [2, 2]
    said = results[0][2] + results[1][2]
    assert said.count("error: ") == 1 and message in said and "--out" in said
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before


def test_a_model_that_was_written_anew_is_another_one(tiny, data, tmp_path, ranks1):
    model = tmp_path / "models" / "changing"
    AutoModelForCausalLM.from_pretrained(tiny / "student").save_pretrained(model)
    AutoTokenizer.from_pretrained(tiny / "student").save_pretrained(model)
    evaluated(ranks1, tmp_path / "models", data, tmp_path / "out", models=("changing",), seeds="1")
    AutoModelForCausalLM.from_pretrained(tiny / "tied").save_pretrained(model)
    given = arguments(tmp_path / "models", data, tmp_path / "out", models=("changing",), seeds="1")
    code, _, said, _ = ranks1.run(evaluation_cases.command, given)[0]
    assert code == 2 and "sha256 of the model was" in said


@pytest.mark.parametrize(("message", "more", "named"), [
    ("did you mean 'rouge_l'", [], {"metric": "rougel"}),
    ("kl and a teacher go together", [], {"metric": "kl"}),
    ("kl and a teacher go together", ["--teacher", "x/y"], {}),
    ("did you mean 'paper'", ["--protocol", "papers"], {}),
    ("write them as in 10,20,30", [], {"seeds": "ten"}),
    ("a repeated entry", [], {"seeds": "10,10"}),
    ("a repeated entry", [], {"models": ("student", "student")}),
    ("no model folder", [], {"models": ("nowhere",)}),
    ("did you mean 'sampling.top_p'", ["sampling.topp=1"], {}),
    ("sampling.top_p = 2.0; it has to be above 0 and at most 1", ["sampling.top_p=2"], {}),
    ("no field 'prompt'", ["data.prompt_field=prompt"], {}),
    ("256 positions", ["max_new_tokens=250"], {}),
    ("No such option: --metrics", ["--metrics=bleu"], {}),
])  # fmt: skip
def test_wrong_input(tiny, data, tmp_path, ranks2, message, more, named):
    results = ranks2.run(evaluation_cases.command, arguments(tiny, data, tmp_path / "out", *more, **named))
    said = results[0][2] + results[1][2]
    assert [code for code, *_ in results] == [2, 2] and said.count("error: ") == 1 and message in said, said


@pytest.mark.parametrize("change", ["data.prefix=please", "tokenizer={tmp_path}/tokenizer"])
def test_answers_to_other_prompts_are_not_mixed(tiny, data, tmp_path, ranks1, change):
    other = AutoTokenizer.from_pretrained(tiny / "student")
    other.add_tokens(["What is"])
    other.save_pretrained(tmp_path / "tokenizer")
    given = arguments(tiny, data, tmp_path / "out", seeds="1")
    assert ranks1.run(evaluation_cases.command, given)[0][0] == 0
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    code, _, said, _ = ranks1.run(evaluation_cases.command, [*given, change.format(tmp_path=tmp_path)])[0]
    assert code == 2 and "sha256 of the tokenised prompts was" in said and "--out" in said
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(("out", "lock"), [("out", "out/lock"), ("out.jsonl", "out.jsonl.lock")])
def test_two_jobs_do_not_write_to_one_place(tiny, data, tmp_path, ranks2, out, lock):
    given, place = arguments(tiny, data, tmp_path / out, seeds="1"), (tmp_path / lock)
    with sole_use(place.parent, name=place.name):
        found = ranks2.run(evaluation_cases.impatient_command, given)
    assert [code for code, *_ in found] == [2, 2]
    assert f"{tmp_path / out} is in use by another job (process " in found[0][2]
    assert "give --out another name" in found[0][2]
    assert ranks2.run(evaluation_cases.command, given)[0][0] == 0
