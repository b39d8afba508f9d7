"""The whole loop on real ranks: weights after some steps against a dense float64 reference and other layouts."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.run import loop_cases, run_cases
from tests.tiny import HELD, tiny_overrides
from toolkit.batch import Example, TokenBatch
from toolkit.data import DataConfig, PromptDataset, load_data

pytestmark = pytest.mark.multiprocess


def weights(folder, name):
    return load_file(folder / "runs" / name / "student" / "model.safetensors")


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    worst = max((found[name].double() - wanted[name].double()).abs().max().item() for name in found)
    assert worst <= tolerance, worst


@pytest.mark.parametrize("student", ["student", "tied"])
def test_layout_does_not_change_the_weights(tiny, ranks1, ranks2, student):
    layouts = {
        "1x8": (ranks1, 8),
        "2x4": (ranks1, 4),
        "8x1": (ranks1, 1),
        "2 ranks": (ranks2, 4),
        "2 ranks x1": (ranks2, 1),
    }
    layouts |= {"tokens": (ranks1, None), "2 ranks tokens": (ranks2, None)}
    layouts |= {"resident": (ranks1, 4), "2 ranks resident": (ranks2, 2)}
    for name, (ranks, micro_rows) in layouts.items():
        own = (
            {"train.rows_per_micro_batch": micro_rows}
            if micro_rows
            else {"train.tokens_per_micro_batch": 128, "train.rows_per_micro_batch": 5}
        )
        own |= HELD["resident"] if "resident" in name else {}
        ranks.run(run_cases.run_tiny, tiny_overrides(
            tiny, name=f"{student} {name}", student__path=f"{tiny}/{student}", loss__cross_entropy_weight=0.3, **own,
        ))  # fmt: skip
    start = load_file(tiny / student / "model.safetensors")
    whole = weights(tiny, f"{student} 1x8")
    assert max((whole[name] - start[name]).abs().max().item() for name in whole) > 1e-2  # it did learn
    for name in layouts:
        assert_close(weights(tiny, f"{student} {name}"), whole, 1e-5)
    records = [json.loads(line) for line in (tiny / "runs" / f"{student} tokens" / "metrics.jsonl").open()]
    counts = [record["micro_batches"] for record in records]  # and with 2 ranks one needs fewer than the other
    assert len(set(counts)) > 1 and min(counts) > 1  # it does change from step to step


@pytest.mark.parametrize("divergence", ["skl", "srkl"])
@pytest.mark.parametrize("held", HELD)
def test_two_ranks_follow_a_dense_float64_reference(tiny, ranks2, held, divergence):
    name = f"dense {held} {divergence}"
    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name=name, train__steps=4, train__rows_per_micro_batch=2, loss__divergence=divergence, **HELD[held],
    ))[0]  # fmt: skip
    assert summary["sharding"]["student"] == ("sharded" if held == "sharded" else "resident")
    assert summary["sharding"]["teacher"] == ("resident" if held == "resident" else "sharded")
    assert_close(weights(tiny, name), dense_reference(tiny, steps=4, divergence=divergence), 1e-5)


def test_fine_tuning_needs_no_teacher_and_follows_the_reference(tiny, ranks2):
    """With a teacher it only validates; without one none is loaded, and the schedule sees the cross entropy."""
    alone, measured = (
        tiny_overrides(
            tiny, name=f"fine-tuning {teacher}", teacher__path=f"{tiny}/teacher" if teacher else "", train__steps=4,
            loss__divergence="none", loss__cross_entropy_weight=1, validation__scored_rows=2, validation__samples=1,
        ) for teacher in (False, True)
    )  # fmt: skip
    summary = ranks2.run(run_cases.run_tiny, alone)[0]
    against = ranks2.run(run_cases.run_tiny, measured)[0]
    reference = dense_reference(tiny, steps=4, divergence="none")
    for teacher in (False, True):
        assert_close(weights(tiny, f"fine-tuning {teacher}"), reference, 1e-5)
    final = summary["validation"]["final"]
    assert final["kl_nats"] is None and final["top1_agreement"] is None and "teacher" not in summary["rouge_l"]
    assert against["validation"]["final"]["kl_nats"] > 0 and "teacher" in against["rouge_l"]
    assert final["ce_nats"] == pytest.approx(against["validation"]["final"]["ce_nats"], abs=1e-6)
    assert [loss for _, loss, _ in summary["phi_history"]][-1] == final["ce_nats"]


def test_student_text_may_have_a_divergence_of_its_own(tiny, ranks2):
    """As in DistiLLM-2: one for the data, another for what the student says."""
    skl, both = {"divergence": "skl"}, {"divergence": "skl", "student_text_divergence": "srkl"}
    on_policy = first_step(tiny, ranks2, "on_policy", **both)["loss"]
    assert on_policy == first_step(tiny, ranks2, "on_policy", divergence="srkl")["loss"]
    assert on_policy != first_step(tiny, ranks2, "on_policy", **skl)["loss"]
    assert first_step(tiny, ranks2, "off", **both)["loss"] == first_step(tiny, ranks2, "off", **skl)["loss"]


def test_students_do_not_learn_their_own_text_as_if_it_were_data(tiny, ranks2):
    """The cross entropy beside a divergence is with the data; a weight of its own turns it on for student text."""
    plain = first_step(tiny, ranks2, "on_policy", divergence="skl")
    asked = first_step(tiny, ranks2, "on_policy", divergence="skl", student_text_cross_entropy_weight=0.5)
    beside_data = first_step(tiny, ranks2, "on_policy", divergence="skl", cross_entropy_weight=1)
    assert (beside_data["loss"], beside_data["grad_norm"]) == (plain["loss"], plain["grad_norm"])
    assert asked["loss"] == pytest.approx(plain["kl"] + 0.5 * plain["ce"]) and plain["ce"] > 1
    assert asked["grad_norm"] != plain["grad_norm"]


def first_step(tiny, ranks2, policy, **loss):
    """The metrics of a run's only step."""
    name = " ".join(["first", policy, *map(str, loss.values())])
    ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name=name, schedule__policy=policy, train__steps=1, validation__scored_rows=0, validation__samples=0,
        **{f"loss__{setting}": value for setting, value in loss.items()}))  # fmt: skip
    return json.loads((tiny / "runs" / name / "metrics.jsonl").read_text())


def load_tiny(tiny, tokenizer):
    rows = f"{tiny}/rows.jsonl"
    config = DataConfig(source=rows, validation_source=rows, max_length=96, max_prompt_length=64)
    return load_data(config, tokenizer, seed=10)


TEXT = {"text.max_length": 24, "text.rows_per_step": 4, "text.weight": 0.7, "text.field": "response"}


def text_blocks(tiny, tokenizer):
    """The answers of rows.jsonl, EOS after each, in pieces of 24 tokens: [[text, text, ...], ...]."""
    documents = [json.loads(line)["response"] for line in (tiny / "rows.jsonl").open()]
    ids = [(n, token) for n, text in enumerate(documents) for token in [*tokenizer(text)["input_ids"], 1]]
    blocks = [ids[start : start + 24] for start in range(0, len(ids), 24)]
    return [[[token for n, token in block if n == m] for m in sorted({n for n, _ in block})] for block in blocks]


def text_cross_entropy(model, block, vocabulary):
    """(sum over its predicted tokens, their number); each text is seen alone."""
    total, count = 0.0, 0
    for text in block:
        log_probs = model(torch.tensor([text])).logits[0, :-1, :vocabulary].log_softmax(-1)
        total = total - log_probs[torch.arange(len(text) - 1), text[1:]].sum()
        count += len(text) - 1
    return total, count


def dense_reference(tiny, steps, divergence, text_weight=0.0):
    student = AutoModelForCausalLM.from_pretrained(tiny / "student", dtype=torch.float64)
    train_dense(tiny, student, steps, divergence, text_weight=text_weight)
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def train_dense(tiny, student, steps, divergence, rows=8, lr=0.5, min_lr=1e-7, alpha=0.1, text_weight=0.0):
    """Plain SGD in float64 on full logits; the loss from probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    data = load_tiny(tiny, tokenizer)
    dataset = PromptDataset(data.train, 10)
    teacher = AutoModelForCausalLM.from_pretrained(tiny / "teacher", dtype=torch.float64)
    for step in range(steps):
        total, count = 0.0, 0
        for example in dataset.window_examples(step, 0, 1, rows):
            ids = torch.from_numpy(example.tokens.astype(np.int64))[None]
            at = slice(example.prompt_length - 1, len(example.tokens) - 1)
            with torch.no_grad():
                p = teacher(ids).logits[0, at, : len(tokenizer)].softmax(-1)
            q = student(ids).logits[0, at, : len(tokenizer)].softmax(-1)
            if divergence == "none":
                total = total - q[torch.arange(len(q)), ids[0, at.start + 1 :]].log().sum()
            elif divergence == "skl":
                total = total + (p * (p / (alpha * p + (1 - alpha) * q)).log()).sum()
            else:
                total = total + (q * (q / ((1 - alpha) * p + alpha * q)).log()).sum()
            count += at.stop - at.start
        student.zero_grad()
        (total / count).backward()
        if text_weight:
            blocks = text_blocks(tiny, tokenizer)
            order = PromptDataset([Example(np.array([n, n]), 1) for n in range(len(blocks))], 10)
            chosen = [blocks[e.tokens[0]] for e in order.window_examples(step, 0, 1, TEXT["text.rows_per_step"])]
            sums = [text_cross_entropy(student, block, len(tokenizer)) for block in chosen]
            (text_weight * sum(total for total, _ in sums) / sum(count for _, count in sums)).backward()
        rate = min_lr + (lr - min_lr) * 0.5 * (1 + np.cos(np.pi * step / steps))
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter -= rate * parameter.grad


@pytest.mark.parametrize("micro", [{"train.rows_per_micro_batch": 2}, {"train.tokens_per_micro_batch": 96}])
@pytest.mark.parametrize("held", HELD)
def test_plain_text_beside_the_distillation_follows_the_reference(tiny, ranks2, held, micro):
    """Each kind is divided by its own tokens, one backward for each micro-batch."""
    name = f"text {held} {next(iter(micro))}"
    ranks2.run(
        run_cases.run_tiny,
        tiny_overrides(
            tiny,
            name=name,
            train__steps=4,
            loss__divergence="skl",
            text__source=f"{tiny}/rows.jsonl",
            **TEXT,
            **micro,
            **HELD[held],
        ),
    )
    reference = dense_reference(tiny, steps=4, divergence="skl", text_weight=0.7)
    assert_close(weights(tiny, name), reference, 1e-5)
    without = dense_reference(tiny, steps=4, divergence="skl")
    assert max((reference[n] - without[n]).abs().max().item() for n in reference) > 1e-3
    records = [json.loads(line) for line in (tiny / "runs" / name / "metrics.jsonl").open()]
    for record in records:
        assert record["loss"] == pytest.approx(record["kl"] + 0.7 * record["text_ce"], abs=1e-6)
    start = AutoModelForCausalLM.from_pretrained(tiny / "student", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    blocks = text_blocks(tiny, tokenizer)
    order = PromptDataset([Example(np.array([n, n]), 1) for n in range(len(blocks))], 10)
    first = [blocks[e.tokens[0]] for e in order.window_examples(0, 0, 1, 4)]
    with torch.no_grad():
        total, count = np.sum(
            [[float(x) for x in text_cross_entropy(start, block, len(tokenizer))] for block in first], 0
        )
    assert records[0]["text_ce"] == pytest.approx(total / count, abs=1e-5)
    assert records[0]["text_tokens"] == sum(len(text) for block in first for text in block)


def test_packing_does_not_change_the_weights(tiny, ranks1, ranks2):
    """Its micro-batches have other numbers of rows on other ranks, and the teacher still makes as many passes."""
    ranks1.run(run_cases.run_tiny, tiny_overrides(tiny, name="not packed", train__rows_per_micro_batch=8))
    layouts = ("1x8", ranks1, 8, None), ("2 ranks", ranks2, 4, None), ("2 ranks, 4 passes", ranks2, 1, 1)
    for name, ranks, micro_rows, rows_per_pass in (*layouts, ("2 ranks, tokens", ranks2, None, 1)):
        micro = {"train.rows_per_micro_batch": micro_rows} if micro_rows else {"train.tokens_per_micro_batch": 104}
        ranks.run(run_cases.run_tiny, tiny_overrides(
            tiny, name=f"packed {name}", data__packing=True, teacher__rows_per_pass=rows_per_pass, **micro,
        ))  # fmt: skip
        assert_close(weights(tiny, f"packed {name}"), weights(tiny, "not packed"), 1e-5)


def test_distillation_on_plain_text(tiny, ranks2):
    """Every token counts; perplexity on documents held out is measured, shown and falls."""

    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name="plain text", data__kind="text", data__source=f"{tiny}/rows.jsonl", data__text_field="response",
        data__validation_source=None, data__validation_fraction=0.3, data__max_length=24, train__steps=12,
        loss__cross_entropy_weight=1))[0]  # fmt: skip
    validation = summary["validation"]
    assert validation["final"]["perplexity"] == pytest.approx(np.exp(validation["final"]["ce_nats"]))
    assert validation["final"]["perplexity"] < 0.7 * validation["initial"]["perplexity"]
    records = [json.loads(line) for line in (tiny / "runs" / "plain text" / "metrics.jsonl").open()]
    assert records[-1]["validation"]["perplexity"] == validation["final"]["perplexity"]
    # all tokens but the first of each text: full blocks of 24
    assert all(0.75 * r["tokens"] < r["response_tokens"] < r["tokens"] for r in records)
    code, said = ranks2.run(run_cases.run_expecting_exit, tiny_overrides(
        tiny, data__kind="text", schedule__policy="adaptive"))[0]  # fmt: skip
    assert code == 2 and "schedule.policy = 'adaptive' asks for generated answers, but data.kind" in said


def test_no_logits_of_a_batch_and_no_gather_within_the_tiles(tiny, ranks2):
    """Nothing as large as targets x vocabulary is ever made, and each head is gathered as often for many tiles as for
    one: the teacher's once, the student's for forward and for backward."""
    for one, many in zip(*(ranks2.run(loop_cases.loss_step, tiny, budget) for budget in (64, 1)), strict=True):
        assert one[2] == 1 and many[2] > 2
        assert one[3] == many[3] and many[3]["teacher"] == 1 and many[3]["student"] <= 2
        assert 0 < many[0] < many[1]


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "symmetric_kl", "jsd", "tvd", "skl", "srkl", "akl"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny, ranks2, divergence):
    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name=f"same {divergence}", student__path=f"{tiny}/teacher", loss__divergence=divergence,
        train__steps=2))[0]  # fmt: skip
    records = [json.loads(line) for line in (tiny / "runs" / f"same {divergence}" / "metrics.jsonl").open()]
    assert all(abs(record["loss"]) < 1e-6 and record["grad_norm"] < 1e-4 for record in records), records
    assert summary["validation"]["final"]["kl_nats"] < 1e-6
    assert summary["validation"]["final"]["top1_agreement"] == 1
    assert_close(weights(tiny, f"same {divergence}"), load_file(tiny / "teacher" / "model.safetensors"), 1e-5)


def test_ranks_take_the_same_source_and_their_own_rows(tiny, ranks2):
    seen = ranks2.run(loop_cases.run_recording_sources, tiny_overrides(
        tiny, name="sources", schedule__policy="adaptive", schedule__phi_initial=0.7, train__steps=12,
        rollout__max_new_tokens=20))  # fmt: skip
    sources = [[source for source, _ in rank] for rank in seen]
    assert sources[0] == sources[1]
    assert set(sources[0]) == {"dataset", "replay", "generate"}
    assert all(mine != theirs for (_, mine), (_, theirs) in zip(*seen, strict=True))
    again = ranks2.run(loop_cases.run_recording_sources, tiny_overrides(
        tiny, name="sources again", schedule__policy="adaptive", schedule__phi_initial=0.7, train__steps=12,
        rollout__max_new_tokens=20))  # fmt: skip
    assert again == seen


def test_one_gather_makes_the_text_of_several_windows(tiny, ranks2):
    """The same prompts in a third of the calls, every text with a seed of its own, and the steps between replay."""
    changes = {"schedule__policy": "on_policy", "train__steps": 6}
    one = ranks2.run(loop_cases.run_recording_texts, tiny_overrides(tiny, name="window", **changes))
    many = ranks2.run(
        loop_cases.run_recording_texts, tiny_overrides(tiny, name="windows", rollout__windows=3, **changes)
    )
    for (apart, _), (joined, _) in zip(one, many, strict=True):
        assert [len(prompts) for prompts, *_ in apart] == [4] * 6
        assert [len(prompts) for prompts, *_ in joined] == [12, 12]
        asked = [[ids for prompts, *_ in calls for ids in prompts] for calls in (apart, joined)]
        assert asked[0] == asked[1]
        assert joined[0][1][:4] == apart[0][1]
    seeds = [seed for calls, _ in many for _, seeds, _ in calls for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 48
    records = [json.loads(line) for line in (tiny / "runs" / "windows" / "metrics.jsonl").open()]
    assert [record["source"] for record in records] == ["generate", "replay", "replay"] * 2
    assert [records[at]["staleness_steps"] for at in (0, 1, 2)] == [0, 1, 2]


@pytest.mark.parametrize("windows", [1, 3])
def test_every_text_is_learned_once_where_each_step_asks_for_its_own(tiny, ranks2, windows):
    """With train_on_fresh a window made ahead waits for its step, whatever else the buffer holds."""
    overrides = tiny_overrides(
        tiny, name=f"fresh {windows}", schedule__policy="on_policy", rollout__train_on_fresh=True, train__steps=7,
        rollout__windows=windows,
    )  # fmt: skip
    for calls, learned in ranks2.run(loop_cases.run_recording_texts, overrides):
        made = [text for *_, texts in calls for text in texts]
        assert [text for step in learned for text in step] == made[: 7 * 4]
    records = [json.loads(line) for line in (tiny / "runs" / f"fresh {windows}" / "metrics.jsonl").open()]
    wanted = [0] * 7 if windows == 1 else [0, 1, 2, 0, 1, 2, 0]
    assert [record["staleness_steps"] for record in records] == wanted


def test_training_is_exact_after_sharded_generation(tiny, ranks2):
    ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="untouched"))
    ranks2.run(loop_cases.run_generating_aside, tiny_overrides(tiny, name="sharded", rollout__gather="never"))
    assert_close(weights(tiny, "sharded"), weights(tiny, "untouched"), 0.0)


@pytest.mark.parametrize("fail", [False, True])
def test_training_is_exact_after_generation(tiny, ranks2, fail):
    ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="untouched"))
    ranks2.run(loop_cases.run_generating_aside, tiny_overrides(tiny, name=f"aside {fail}"), fail=fail)
    assert_close(weights(tiny, f"aside {fail}"), weights(tiny, "untouched"), 0.0)


def test_run_folder_holds_what_it_should(tiny, ranks2):
    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name="folder", schedule__policy="on_policy", validation__scored_rows=3, validation__samples=1,
        train__steps=4, validation__every_steps=2))[0]  # fmt: skip
    folder = tiny / "runs" / "folder"
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {
        "steps",
        "tokens",
        "wall_time_s",
        "tokens_per_s",
        "peak_rss_gib",
        "time_share",
        "phi_final",
    } <= summary.keys()
    assert summary["source_counts"] == {"dataset": 0, "replay": 0, "generate": 4}
    assert sum(summary["time_share"].values()) == pytest.approx(1)
    assert {"initial", "final"} <= summary["rouge_l"].keys()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    wanted = {
        "loss",
        "kl",
        "phi",
        "source",
        "tokens",
        "tokens_per_s",
        "seconds",
        "learning_rate",
        "grad_norm",
        "peak_rss_gib",
    }
    assert all(wanted <= record.keys() for record in records)
    assert "validation" in records[1] and "validation" not in records[0]
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    prompt = tokenizer("What is the number?", return_tensors="pt")
    assert len(student.generate(**prompt, max_new_tokens=4, do_sample=False)[0]) > len(prompt["input_ids"][0])


def test_validation_agrees_with_full_logits(tiny, ranks2):
    """Measured on two ranks with ragged shares: the mean over tokens, not over batches or ranks."""
    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name="validation", train__steps=1, validation__rows=5, validation__rows_per_pass=1))[0]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    data = load_tiny(tiny, tokenizer)
    batch = TokenBatch.from_examples(data.validation[:5], tokenizer.pad_token_id)
    logs = []
    for model in ("teacher", "student"):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(tiny / model, dtype=torch.float64)(
                batch.input_ids_BT, attention_mask=batch.attention_mask_BT
            ).logits
        logs.append(logits[batch.predicts_BT][:, : len(tokenizer)].log_softmax(-1))
    found = summary["validation"]["initial"]
    assert found["kl_nats"] == pytest.approx((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item(), abs=1e-5)
    assert found["ce_nats"] == pytest.approx(-logs[1].gather(1, batch.targets_N[:, None]).mean().item(), abs=1e-5)
    assert found["top1_agreement"] == pytest.approx((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean().item())


def test_bf16_adamw_learns(tiny, ranks2):
    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name="bf16", precision="bf16", optimizer__name="adamw", optimizer__lr=0.01, train__steps=15,
        optimizer__max_grad_norm=1.0, teacher__rows_per_pass=2, student__gradient_checkpointing=True,
        data__packing=True))[0]  # fmt: skip
    assert summary["precision"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tiny / "runs" / "bf16" / "student").dtype == torch.bfloat16
    assert summary["validation"]["final"]["kl_nats"] < 0.7 * summary["validation"]["initial"]["kl_nats"]


def test_a_run_may_go_on_from_the_student_in_its_own_folder(tiny, ranks2):
    overrides = tiny_overrides(tiny, name="own", train__steps=1)
    first = ranks2.run(run_cases.run_tiny, overrides)[0]["validation"]
    again = [*overrides, f"student.path={tiny}/runs/own/student"]
    second = ranks2.run(run_cases.run_tiny, again)[0]["validation"]
    assert second["initial"]["kl_nats"] == pytest.approx(first["final"]["kl_nats"], abs=1e-5)
    assert second["final"] != second["initial"]


@pytest.mark.parametrize("held", HELD)
def test_weight_decay_is_for_matrices(tiny, ranks2, held):
    """The student is its teacher: there is nothing else to learn."""
    name = f"decay {held}"
    ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name=name, student__path=f"{tiny}/teacher", train__steps=1, optimizer__weight_decay=0.1,
        **HELD[held]))  # fmt: skip
    before, after = load_file(tiny / "teacher" / "model.safetensors"), weights(tiny, name)
    assert any(tensor.dim() == 1 for tensor in before.values())
    for key, tensor in before.items():
        kept = 1 - 0.5 * 0.1 if tensor.dim() > 1 else 1
        torch.testing.assert_close(after[key], kept * tensor, rtol=1e-5, atol=1e-6)


def test_an_exported_student_ends_where_it_was_taught_to(tiny, ranks2, tmp_path):
    """Its own generation settings name another end than the chat template's turns have. Some contradict others, as
    published ones do: transformers loads them with a warning, and does not save them once anything has changed."""
    folder = shutil.copytree(tiny / "student", tmp_path / "student")
    found = json.loads((folder / "generation_config.json").read_text())
    found |= {
        "eos_token_id": 0, "temperature": 0.9, "pad_token_id": -1, "early_stopping": True, "length_penalty": 2.0,
        "output_attentions": True, "max_new_tokens": 7,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(found))
    overrides = tiny_overrides(
        tiny, name="ends", student__path=str(folder), train__steps=1, validation__every_steps=1, validation__best="ce"
    )
    code, said, error = ranks2.run(run_cases.run_saying, overrides)[0]
    assert code == 0, error
    told = [line for line in said.splitlines() if "generation settings of the student" in line]
    assert len(told) == 1 and "pad_token_id = -1 becomes 1" in told[0] and "early_stopping = True" in told[0]
    for name in ("student", "best"):
        settings = AutoModelForCausalLM.from_pretrained(tiny / "runs" / "ends" / name).generation_config
        settings.validate(strict=True)
        assert settings.eos_token_id == [0, 1] and settings.do_sample and settings.temperature == 0.9
        assert settings.pad_token_id == 1 and settings.max_new_tokens == 7
        assert not (settings.early_stopping or settings.length_penalty or settings.output_attentions)


def test_what_cannot_be_exported_is_refused_before_the_first_step(tiny, ranks2):
    overrides = tiny_overrides(tiny, name="unwritable")
    (code, said, error), (other_code, _, other_error) = ranks2.run(
        loop_cases.run_with_a_tokenizer_that_cannot_be_saved, overrides
    )
    assert code == other_code == 2 and "step 1" not in said and "could not be written" not in other_error
    assert "the student could not be written to" in error and "not JSON serializable" in error
    left = {path.name for path in (tiny / "runs" / "unwritable").iterdir()}
    assert "config.yaml" in left and not left & {"student", "student.unfinished", "metrics.jsonl"}
