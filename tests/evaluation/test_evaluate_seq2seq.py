"""`evaluate` of encoder-decoder models: the prompts of training, the rollout's answers, KL against dense references."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.evaluation import evaluation_cases
from tests.rollout import local_cases
from tests.tiny import make_tokenizer, save_llama, save_t5
from toolkit.batch import EncoderDecoder
from toolkit.data import DataConfig, load_data

pytestmark = pytest.mark.multiprocess
SETTINGS = {"max_length": 40, "max_prompt_length": 24, "template": "plain", "prefix": "file: "}


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A teacher (v1.1: a head of its own), a student (v1.0), a model without an encoder, and rows.jsonl."""
    folder, tokenizer = tmp_path_factory.mktemp("t5"), make_tokenizer(chat=False)
    save_t5(folder / "teacher", tokenizer, seed=1, own_head=True, hidden=48, extra_rows=5)
    save_t5(folder / "student", tokenizer, seed=2, extra_rows=8)
    save_llama(folder / "llama", tokenizer, seed=3)
    rows = [{"prompt": "Copy a file " * (1 + i % 9) + str(i), "response": "a folder " * (1 + i % 4)} for i in range(11)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def examples(t5):
    """The rows as training has them."""
    file = str(t5 / "rows.jsonl")
    config = DataConfig(source=file, validation_source=file, **SETTINGS)
    data = load_data(config, AutoTokenizer.from_pretrained(t5 / "student"), layout=EncoderDecoder(0))
    assert 0 < data.counts["train_truncated_prompts"] < 11
    return data.train


def evaluate(t5, out, *more, models=("student",), metric="rouge_l"):
    named = [text for model in models for text in ("--model", f"{t5}/{model}")]
    settings = [f"data.{name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    return [
        "evaluate", *named, "--data", f"{t5}/rows.jsonl", "--protocol", "plain", "--metric", metric, "--seeds", "7",
        "--out", str(out), "precision=fp32", *settings, *more,
    ]  # fmt: skip


def lines(out):
    return [json.loads(line) for line in (out / "rows.jsonl").open()]


def test_prompts_are_those_of_training_and_answers_those_of_the_rollout(t5, examples, tmp_path, ranks1, ranks2):
    tokenizer = AutoTokenizer.from_pretrained(t5 / "student")
    for ranks, name in ((ranks1, "one"), (ranks2, "two")):
        code, _, said, _ = ranks.run(evaluation_cases.command, evaluate(t5, tmp_path / name, "save_rows=4"))[0]
        assert code == 0, said
    found = lines(tmp_path / "one")
    assert found == lines(tmp_path / "two")
    prompts = [tokenizer.decode(example.prompt) for example in examples]
    assert [line["prompt"] for line in found] == prompts
    assert all(prompt.startswith("file: ") and prompt.endswith(tokenizer.eos_token) for prompt in prompts)
    for prompt, example in zip(prompts, examples, strict=True):  # sampled_texts tokenises them again
        assert tokenizer(prompt)["input_ids"] == example.prompt.tolist()
    texts = ranks1.run(local_cases.sampled_texts, t5, prompts, None, max_new_tokens=16)[0]
    said = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in texts]
    assert [line["answer"] for line in found] == said and len(set(said)) > 5
    assert [line["tokens"] for line in found] == [len(ids) for ids in texts]


@pytest.mark.parametrize("ngram", [0, 2])
def test_greedy_answers_are_those_of_transformers(t5, examples, tmp_path, ranks1, ngram):
    """No n-gram comes twice in the answer; the encoder's prompt does not count, there as here."""
    given = evaluate(t5, tmp_path / "greedy", "sampling.temperature=0", f"sampling.no_repeat_ngram_size={ngram}")
    code, _, said, _ = ranks1.run(evaluation_cases.command, given)[0]
    assert code == 0, said
    tokenizer = AutoTokenizer.from_pretrained(t5 / "student")
    model = AutoModelForSeq2SeqLM.from_pretrained(t5 / "student")
    beyond = list(range(len(tokenizer), model.config.vocab_size))  # rows of a padded head that are no tokens
    for line, example in zip(lines(tmp_path / "greedy"), examples, strict=True):
        prompt = torch.from_numpy(example.prompt.astype(np.int64))[None]
        ids = model.generate(
            input_ids=prompt, max_new_tokens=16, do_sample=False, suppress_tokens=beyond, no_repeat_ngram_size=ngram
        )[0, 1:]
        assert line["answer"] == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_kl_is_that_of_full_logits_in_float64(t5, examples, tmp_path, ranks2):
    given = evaluate(t5, tmp_path / "kl", "--teacher", f"{t5}/teacher", "rows_per_pass=2",
                     models=("student", "teacher"), metric="kl")  # fmt: skip
    code, _, said, summary = ranks2.run(evaluation_cases.command, given)[0]
    assert code == 0, said
    tokens = len(AutoTokenizer.from_pretrained(t5 / "student"))
    teacher, student = (
        AutoModelForSeq2SeqLM.from_pretrained(t5 / name, dtype=torch.float64) for name in ("teacher", "student")
    )
    total, count = 0.0, 0
    for example in examples:
        prompt, response = (torch.from_numpy(ids.astype(np.int64))[None] for ids in (example.prompt, example.response))
        said = torch.cat([torch.zeros(1, 1, dtype=torch.long), response[:, :-1]], 1)
        with torch.no_grad():
            log_p, log_q = (
                model(input_ids=prompt, decoder_input_ids=said).logits[0, :, :tokens].log_softmax(-1)
                for model in (teacher, student)
            )
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        count += len(log_p)
    metrics = {name.rpartition("/")[2]: entry["metrics"]["kl"]["mean"] for name, entry in summary["models"].items()}
    assert total / count > 0.1 and metrics["student"] == pytest.approx(total / count, abs=1e-5)
    assert metrics["teacher"] == pytest.approx(0, abs=1e-6)


def test_a_teacher_of_another_make_is_refused(t5, tmp_path, ranks2):
    given = evaluate(t5, tmp_path / "refused", "--teacher", f"{t5}/llama", metric="kl")
    results = ranks2.run(evaluation_cases.command, given)
    said = results[0][2] + results[1][2]
    assert [code for code, *_ in results] == [2, 2] and said.count("error: ") == 1
    assert "the teacher has no encoder, the student starts its decoder with id 0" in said
