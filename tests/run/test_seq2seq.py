"""T5 and mT5 through the loop on real ranks, against a dense float64 reference and against themselves."""

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig

from tests.rollout import local_cases
from tests.run import loop_cases, run_cases
from tests.run.test_loop import assert_close
from tests.run.test_resume import FULL, assert_equal, outcome
from tests.tiny import make_tokenizer, save_rows, save_t5, tiny_overrides
from toolkit.batch import EncoderDecoder
from toolkit.data import DataConfig, PromptDataset, load_data
from toolkit.ranks.signals import EXIT_LATER

pytestmark = pytest.mark.multiprocess
PREFIX = "file: "


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A folder with a teacher (v1.1: a head of its own), students of three makes, and rows.jsonl."""
    folder, tokenizer = tmp_path_factory.mktemp("t5"), make_tokenizer(chat=False)
    save_t5(folder / "teacher", tokenizer, seed=1, own_head=True, hidden=48, extra_rows=5)
    save_t5(folder / "student", tokenizer, seed=2, extra_rows=8)
    save_t5(folder / "v1_1", tokenizer, seed=3, own_head=True)
    save_t5(folder / "mt5", tokenizer, seed=4, kind="mt5", own_head=True)
    save_t5(folder / "dropout", tokenizer, seed=5, dropout=0.1)
    save_rows(folder / "rows.jsonl")
    return folder


def overrides(t5, **changes):
    return tiny_overrides(t5, **({"data.template": "plain", "data.prefix": PREFIX, "optimizer.lr": 0.1} | changes))


def exported(t5, name):
    return load_file(t5 / "runs" / name / "student" / "model.safetensors")


@pytest.mark.parametrize(("student", "divergence"), [("student", "skl"), ("v1_1", "srkl"), ("mt5", "skl")])
def test_two_ranks_follow_a_dense_float64_reference(t5, ranks2, student, divergence):
    """Tied and scaled (T5 1.0), and a head of its own, which ZeRO-3 loads sharded (1.1, mT5); the export as well."""
    name = f"dense {student}"
    ranks2.run(run_cases.run_tiny, overrides(
        t5, name=name, student__path=f"{t5}/{student}", train__steps=3, train__rows_per_micro_batch=2,
        loss__divergence=divergence))  # fmt: skip
    reference, example = dense_reference(t5, student, steps=3, divergence=divergence)
    wanted = {key: value for key, value in reference.state_dict().items() if key in exported(t5, name)}
    assert ("lm_head.weight" in wanted) == (student != "student")
    assert_close(exported(t5, name), wanted, 1e-5)
    start = load_file(t5 / student / "model.safetensors")
    assert max((value - start[key]).abs().max().item() for key, value in wanted.items()) > 5e-3  # it did learn
    found = AutoModelForSeq2SeqLM.from_pretrained(t5 / "runs" / name / "student", dtype=torch.float64)
    torch.testing.assert_close(logits(found, example), logits(reference, example), atol=2e-4, rtol=0)


def logits(model, example):
    prompt, response = (torch.from_numpy(ids.astype(np.int64))[None] for ids in (example.prompt, example.response))
    said = torch.cat([torch.zeros(1, 1, dtype=torch.long), response[:, :-1]], 1)
    return model(input_ids=prompt, decoder_input_ids=said).logits[0]


def dense_reference(t5, student, steps, divergence, rows=8, lr=0.1, min_lr=1e-7, alpha=0.1):
    """(student after plain SGD in float64 on full logits, an example)."""
    tokenizer = AutoTokenizer.from_pretrained(t5 / student)
    file = f"{t5}/rows.jsonl"
    config = DataConfig(source=file, validation_source=file, max_length=96, max_prompt_length=64, template="plain",
                        prefix=PREFIX)  # fmt: skip
    dataset = PromptDataset(load_data(config, tokenizer, seed=10, layout=EncoderDecoder(0)).train, 10)
    teacher, model = (
        AutoModelForSeq2SeqLM.from_pretrained(t5 / name, dtype=torch.float64) for name in ("teacher", student)
    )
    for step in range(steps):
        total, count = 0.0, 0
        for example in dataset.window_examples(step, 0, 1, rows):
            assert example.prompt[-1] == example.response[-1] == tokenizer.eos_token_id
            with torch.no_grad():
                p = logits(teacher, example)[:, : len(tokenizer)].softmax(-1)
            q = logits(model, example)[:, : len(tokenizer)].softmax(-1)
            if divergence == "skl":
                total = total + (p * (p / (alpha * p + (1 - alpha) * q)).log()).sum()
            else:
                total = total + (q * (q / ((1 - alpha) * p + alpha * q)).log()).sum()
            count += len(q)
        model.zero_grad()
        (total / count).backward()
        rate = min_lr + (lr - min_lr) * 0.5 * (1 + np.cos(np.pi * step / steps))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    return model, example


def test_neither_layout_nor_checkpointing_nor_stage_changes_the_weights(t5, ranks1, ranks2):
    layouts = {
        "1x8": (ranks1, {"train.rows_per_micro_batch": 8}),
        "8x1 checkpointing": (ranks1, {"train.rows_per_micro_batch": 1, "student.gradient_checkpointing": True}),
        "2 ranks, tokens": (ranks2, {"train.tokens_per_micro_batch": 96, "teacher.rows_per_pass": 1}),
        "2 ranks ZeRO-2": (ranks2, {"student.ds_config": "ds_configs/student_zero2.json", "teacher.rows_per_pass": 2}),
    }
    for name, (ranks, changes) in layouts.items():
        ranks.run(run_cases.run_tiny, overrides(t5, name=name, **changes))
    for name in layouts:
        assert_close(exported(t5, name), exported(t5, "1x8"), 1e-5)


def test_text_does_not_depend_on_ranks_batches_or_gathering(t5, ranks1, ranks2):
    prompts = ["Return the number", "a file " * 9, "a", "Copy a file to a folder", "missing", "What is it", "the"]
    settings = dict(max_new_tokens=15, temperature=0.9)
    one = ranks1.run(local_cases.sampled_texts, t5, prompts, None, **settings)[0]
    assert len({tuple(ids) for ids in one}) > 3
    assert ranks2.run(local_cases.sampled_texts, t5, prompts, 2, **settings) == [one, one]
    for some in (prompts, prompts[:1]):  # ranks that end at different steps, and one without a prompt
        for texts, mode in ranks2.run(local_cases.sampled_texts_and_mode, t5, some, "never", **settings):
            assert mode == "sharded" and texts == one[: len(some)]


def test_training_is_exact_after_sharded_generation(t5, ranks2):
    ranks2.run(run_cases.run_tiny, overrides(t5, name="untouched", train__steps=2))
    for gather in ("never", "always"):
        ranks2.run(loop_cases.run_generating_aside, overrides(
            t5, name=gather, train__steps=2, rollout__gather=gather))  # fmt: skip
        assert_close(exported(t5, gather), exported(t5, "untouched"), 0.0)


def test_a_stopped_run_with_dropout_ends_bitwise_like_one_that_was_not(t5, ranks2):
    """Every source of text, a replay buffer, validation and ROUGE-L on the way; the validation loss falls."""
    changes = FULL | {"student.path": f"{t5}/dropout", "train.steps": 6}
    ranks2.run(run_cases.run_tiny, overrides(t5, name="whole", **changes))
    records = outcome(t5, "whole")[1]
    assert {record["source"] for record in records} == {"dataset", "replay", "generate"}
    stopped = overrides(t5, name="stopped", **changes)
    for code, *_ in ranks2.run(run_cases.run_until, stopped, 4, signal.SIGUSR1, ranks=(1,)):
        assert code == EXIT_LATER
    assert "goes on from" in ranks2.run(run_cases.run_saying, stopped)[0][1]
    assert_equal(outcome(t5, "stopped"), outcome(t5, "whole"))
    validation = outcome(t5, "whole")[2]["validation"]
    assert validation["final"]["kl_nats"] < validation["initial"]["kl_nats"]


def test_no_logits_of_a_batch_and_no_gather_within_the_tiles(t5, ranks2):
    for one, many in zip(*(ranks2.run(loop_cases.loss_step, t5, budget) for budget in (64, 1)), strict=True):
        assert one[2] == 1 and many[2] > 2
        assert one[3] == many[3] and many[3]["teacher"] == 1
        assert 0 < many[0] < many[1]


def test_bf16_adamw_learns(t5, ranks2):
    summary = ranks2.run(run_cases.run_tiny, overrides(
        t5, name="bf16", precision="bf16", student__path=f"{t5}/dropout", optimizer__name="adamw", optimizer__lr=0.01,
        optimizer__max_grad_norm=1.0, train__steps=15, student__gradient_checkpointing=True))[0]  # fmt: skip
    assert summary["precision"] == "bfloat16"
    assert summary["validation"]["final"]["kl_nats"] < 0.7 * summary["validation"]["initial"]["kl_nats"]


def test_models_of_different_make_are_refused(t5, tiny, tmp_path, ranks2):
    BartConfig(vocab_size=400, d_model=16, encoder_layers=1, decoder_layers=1).save_pretrained(tmp_path)
    for changes, message in (
        ({"teacher.path": f"{tiny}/teacher"}, "the teacher has no encoder, the student starts its decoder with id 0"),
        ({"student.path": f"{tiny}/student"}, "the teacher starts its decoder with id 0, the student has no encoder"),
        ({"student.path": str(tmp_path), "student.random_weights": True, "student.tokenizer": f"{t5}/student"},
         "model_type = 'bart' is not one of t5, mt5"),
    ):  # fmt: skip
        found = ranks2.run(run_cases.run_expecting_exit, overrides(t5, name="refused", **changes))
        assert [code for code, _ in found] == [2, 2] and message in found[0][1]


@pytest.mark.parametrize(
    ("recipe", "kind", "fields", "prefix"),
    [
        ("t5_summarization", "t5", ("dialogue", "summary"), "summarize: "),
        ("t5_translation", "mt5", ("en", "de"), "translate English to German: "),
    ],
)
def test_recipes_take_two_steps_on_text_of_their_own(t5, ranks2, tmp_path, recipe, kind, fields, prefix):
    data = tmp_path / "rows.jsonl"
    rows = [{fields[0]: f"Copy a file to folder {i}", fields[1]: "a file " * (1 + i % 3)} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = dict(
        model_type=kind, vocab_size=410, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=1, dropout_rate=0.1
    )
    settings = {
        "data.source": str(data), "data.validation_source": str(data), "data.max_length": 96,
        "data.max_prompt_length": 64, "precision": "fp32", "schedule.phi_initial": 1, "train.steps": 2,
        "train.rows_per_step": 4, "train.rows_per_micro_batch": 1, "optimizer.warmup_steps": 0,
        "rollout.max_new_tokens": 6,
        "validation.rows": 3, "validation.scored_rows": 2, "validation.samples": 1, "output_dir": str(tmp_path),
        "student.shape": shape, "teacher.shape": shape | {"tie_word_embeddings": False, "num_decoder_layers": 2},
    } | {
        f"{role}.{name}": value for role in ("teacher", "student") for name, value in {
            "path": "", "random_weights": True, "tokenizer": f"{t5}/student",
            "ds_config": f"tests/{role}_sharded.json"}.items()
    }  # fmt: skip
    summary = ranks2.run(run_cases.run_recipe, recipe, [f"{k}={json.dumps(v)}" for k, v in settings.items()])[0]
    assert summary["source_counts"] == {"dataset": 0, "replay": summary["steps"] - summary["source_counts"]["generate"],
                                        "generate": summary["source_counts"]["generate"]}  # fmt: skip
    assert summary["source_counts"]["generate"] >= 1 and summary["rouge_l"]["rows"] == 2
    records = [json.loads(line) for line in (tmp_path / recipe / "metrics.jsonl").open()]
    assert all(0 < record["grad_norm"] < float("inf") for record in records)
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / recipe / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / recipe / "student")
    prompt = tokenizer(prefix + "Copy a file", return_tensors="pt")
    assert student.generate(**prompt, max_new_tokens=5, do_sample=False)[0, 0] == student.config.decoder_start_token_id
