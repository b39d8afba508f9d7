"""T5 shapes from random weights, on one CPU core: does the loss fall and BLEU or ROUGE-L rise from the start?

    python benchmarks/seq2seq.py translation --train train.jsonl --valid valid.jsonl
    python benchmarks/seq2seq.py summarization --train train.jsonl --valid valid.jsonl --fields dialogue summary

A tokenizer is trained on the texts (`tokenizers`). A teacher is fine-tuned on the data (method sft), then a smaller
student is distilled from the teacher that validated best (method distillm_srkl), both by the recipe of the task. At
each validation held-out rows are answered greedily and scored. The same command goes on where it was stopped, also by
--minutes, and prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.ranks.signals import EXIT_LATER  # noqa: E402
from toolkit.settings.methods import METHODS  # noqa: E402
from toolkit.tables import format_table  # noqa: E402

TEACHER = {"d_model": 192, "d_ff": 768, "d_kv": 48, "num_heads": 4, "num_layers": 2}
STUDENT = {"d_model": 96, "d_ff": 384, "d_kv": 24, "num_heads": 4, "num_layers": 2}
#: task -> (recipe, score, settings of both runs, steps of teacher and student)
TASKS = {
    "translation": ("t5_translation", "bleu", {
        "data.max_length": 128, "data.max_prompt_length": 64, "rollout.max_new_tokens": 48, "train.rows_per_step": 32,
        "train.rows_per_micro_batch": 32, "validation.scored_rows": 100, "validation.every_steps": 100,
    }, (500, 400)),
    "summarization": ("t5_summarization", "rouge_l", {
        "data.max_length": 320, "data.max_prompt_length": 256, "rollout.max_new_tokens": 64, "train.rows_per_step": 8,
        "train.rows_per_micro_batch": 8, "validation.scored_rows": 100, "validation.every_steps": 40,
    }, (240, 200)),
}  # fmt: skip


def main() -> None:
    options = arguments()
    recipe, score, settings, steps = TASKS[options.task]
    out = options.out / options.task
    tokenizer = out / "tokenizer"
    if not tokenizer.is_dir():
        train_tokenizer(options.train, options.fields, options.vocabulary).save_pretrained(tokenizer)
    settings = settings | {
        "data.source": options.train, "data.validation_source": options.valid, "data.prompt_field": options.fields[0],
        "data.response_field": options.fields[1], "data.prefix": "", "output_dir": out, "cache_dir": out,
        "optimizer.lr": 2e-3, "optimizer.warmup_steps": 50, "validation.best": score, "validation.samples": 2,
        "validation.sampling_temperature": 0, "checkpoint.every_steps": 100, "checkpoint.keep": 1,
        "teacher.ds_config": "ds_configs/teacher_cpu.json", "student.ds_config": "ds_configs/student_cpu.json",
        "student.path": "", "student.random_weights": True, "student.tokenizer": tokenizer,
    }  # fmt: skip
    ends_s = time.monotonic() + 60 * options.minutes if options.minutes else None
    runs = {
        "teacher": METHODS["sft"].settings | {"student.shape": shape(TEACHER, tokenizer)},
        "student": METHODS["distillm_srkl"].settings
        | {"student.shape": shape(STUDENT, tokenizer), "teacher.path": out / "teacher" / "best"},
    }
    for (name, own), count in zip(runs.items(), options.steps or steps, strict=True):
        run(recipe, settings | own | {"name": name, "train.steps": count}, options.override, ends_s)
        print(f"\n{name} ({parameters(out / name / 'student'):.1f} M parameters)\n{table(out / name, score)}\n")


def train_tokenizer(file: Path, fields: list[str], size: int) -> PreTrainedTokenizerFast:
    """BPE over words that keep the space before them, with T5's special tokens."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    inner.train_from_iterator(
        (row[field] for row in rows for field in fields),
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def shape(sizes: dict[str, int], tokenizer: Path) -> dict[str, Any]:
    tokens = len(PreTrainedTokenizerFast.from_pretrained(tokenizer))
    return {"model_type": "t5", "vocab_size": tokens, "dropout_rate": 0.1, **sizes}


def run(recipe: str, settings: dict[str, Any], override: list[str], ends_s: float | None) -> None:
    """The recipe with these settings, up to its end or to `ends_s`; a run that is stopped saves, and ends this one."""
    given = [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *given, *override]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(None if ends_s is None else max(1.0, ends_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
        code = process.wait()
    if code == EXIT_LATER:
        print("stopped; the same command goes on from here")
    if code:
        sys.exit(code)


def table(run: Path, score: str) -> str:
    """Step, seconds of training up to it, loss of training (mean since the line before), held-out loss and score."""
    validation = json.loads((run / "summary.json").read_text())["validation"]["initial"]
    lines = [[0, 0.0, None, validation]]
    seconds, losses = 0.0, []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(text)
        seconds += record["step_time_s"] if "step_time_s" in record else record["tokens"] / record["tokens_per_s"]
        losses.append(record["loss"])
        if "validation" in record:
            lines.append([record["step"], seconds, sum(losses) / len(losses), record["validation"]])
            losses = []
    has_teacher = validation["kl_nats"] is not None
    names = {"ce_nats": "held-out cross-entropy"} | ({"kl_nats": "held-out KL"} if has_teacher else {})
    return format_table(
        ["step", "seconds", "training loss", *names.values(), {"bleu": "BLEU", "rouge_l": "ROUGE-L"}[score]],
        [
            [str(step), f"{seconds:.0f}", "-" if loss is None else f"{loss:.2f}",
             *(f"{found[name]:.2f}" for name in names), f"{found[score]:.1f}"]
            for step, seconds, loss, found in lines
        ],
    )  # fmt: skip


def parameters(folder: Path) -> float:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys()) / 1e6  # noqa: SIM118


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--train", type=Path, required=True, help="jsonl")
    parser.add_argument("--valid", type=Path, required=True, help="jsonl")
    parser.add_argument("--fields", nargs=2, default=["source", "target"], metavar=("PROMPT", "RESPONSE"))
    parser.add_argument("--out", type=Path, default=Path("runs/seq2seq"))
    parser.add_argument("--vocabulary", type=int, default=4000, help="entries of the tokenizer, at most")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--minutes", type=float, help="stop after about so many; the same command goes on")
    parser.add_argument("override", nargs="*", help="further key=value settings of both runs")
    options = parser.parse_intermixed_args()
    for name in ("train", "valid", "out"):
        setattr(options, name, getattr(options, name).resolve())
    return options


if __name__ == "__main__":
    main()
