"""skl and srkl against alpha: how far the gradient's coefficients spread, and what a short run comes to.

    python benchmarks/alpha_study.py --train train.jsonl --validation valid.jsonl            # both parts
    python benchmarks/alpha_study.py ... --only skl-0.1,srkl-0.1                             # some runs
    python benchmarks/alpha_study.py ... --only ""                                           # no runs, coefficients

Models, data and settings are those of methods_study.py, whose start it shares where --out is the same; the runs are on
the data alone (schedule `off`).

A coefficient is the derivative of the divergence by the student's probability q(y) of a token y (arXiv 2402.03898):
    skl    -(1 - a) p / (a p + (1 - a) q)
    srkl   log q - log m + 1 - a q / m,   m = a q + (1 - a) p
It is taken at the student's start, at all response positions of the validation file, twice: y is the data's next token,
or one drawn from the student.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from methods_study import (  # noqa: E402
    FIELDS,
    LENGTHS,
    START,
    TEACHER,
    checked,
    settings_of,
    split_validation,
    student_of,
    study_parser,
    train,
)

from toolkit.batch import TokenBatch  # noqa: E402
from toolkit.data import DataConfig, load_data  # noqa: E402
from toolkit.models.tokenizer import load_tokenizer  # noqa: E402
from toolkit.pruning.made import materialize  # noqa: E402
from toolkit.settings import ModelConfig  # noqa: E402
from toolkit.tables import format_table  # noqa: E402

ALPHAS = (0.0, 0.05, 0.1, 0.3, 0.5, 0.9)
CASES = {f"{name}-{alpha:g}": (name, alpha) for name in ("skl", "srkl") for alpha in ALPHAS}


def main() -> None:
    parser = study_parser(__doc__, "runs/methods_study")
    parser.add_argument("--only", default=",".join(CASES), help="runs, with commas between")
    parser.set_defaults(steps=24)
    options = checked(parser.parse_args())
    options.only = [name for name in options.only.split(",") if name]
    if wrong := [name for name in options.only if name not in CASES]:
        parser.error(f"no cases named {', '.join(wrong)}; there are {', '.join(CASES)}")
    split_validation(options)
    train(settings_of(START, options), options)
    file = options.out / "coefficients.json"
    if not file.is_file():
        file.write_text(json.dumps(spreads(log_probabilities(options))))
    coefficients = json.loads(file.read_text())
    for name in options.only:
        train(alpha_settings(name, options), options)
    found = {name: {"coefficient": coefficients[name], "validation": trained(name, options)} for name in CASES}
    (options.out / "alpha.json").write_text(json.dumps(found, indent=2) + "\n")
    text = table(found)
    (options.out / "alpha.md").write_text(text + "\n")
    print("\n" + text)
    if options.plot:
        draw(found, options.plot)


def alpha_settings(name: str, options: argparse.Namespace) -> dict:
    divergence, alpha = CASES[name]
    settings = settings_of("kd", options) | {"name": name, "loss.divergence": divergence, "loss.alpha": alpha}
    return settings | {"validation.every_steps": options.steps}


def trained(name: str, options: argparse.Namespace) -> dict | None:
    file = options.out / name / "summary.json"
    return json.loads(file.read_text())["validation"]["final"] if file.is_file() else None


@torch.no_grad()
def log_probabilities(options: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """log p and log q of one token at each response position, in fp32: the data's own, and one that q draws."""
    path = materialize(ModelConfig(path=TEACHER), options.out / "cache")
    tokenizer = load_tokenizer(ModelConfig(path=TEACHER), path)
    given = {key.removeprefix("data."): value for key, value in (FIELDS | LENGTHS).items()}
    data = DataConfig(source=str(options.validation), validation_source=str(options.validation), **given)
    examples = load_data(data, tokenizer).validation
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (student_of(START, options), path)
    )
    generator = torch.Generator().manual_seed(10)
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {"data": ([], []), "student": ([], [])}
    for start in range(0, len(examples), 4):
        batch = TokenBatch.from_examples(examples[start : start + 4], tokenizer.pad_token_id)
        log_q_NV, log_p_NV = (next_tokens(model, batch, len(tokenizer)) for model in (student, teacher))
        drawn_N = torch.multinomial(log_q_NV.exp(), 1, generator=generator)[:, 0]
        for name, tokens_N in (("data", batch.targets_N), ("student", drawn_N)):
            for log_NV, parts in zip((log_p_NV, log_q_NV), found[name], strict=True):
                parts.append(log_NV.gather(-1, tokens_N[:, None])[:, 0])
    return {name: (torch.cat(p), torch.cat(q)) for name, (p, q) in found.items()}


def next_tokens(model: torch.nn.Module, batch: TokenBatch, vocabulary: int) -> Tensor:
    hidden_BTH = model.base_model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).last_hidden_state
    return model.get_output_embeddings()(hidden_BTH[batch.predicts_BT])[:, :vocabulary].log_softmax(-1)


def coefficients(divergence: str, alpha: float, log_p_N: Tensor, log_q_N: Tensor) -> Tensor:
    """Derivative of skl or srkl by q(y), the formulas above; in float64, formed in log space."""
    log_p_N, log_q_N = log_p_N.double(), log_q_N.double()
    log_a, log_b = torch.tensor(alpha).double().log(), torch.tensor(1 - alpha).double().log()
    if divergence == "skl":
        return -(log_b + log_p_N - torch.logaddexp(log_a + log_p_N, log_b + log_q_N)).exp()
    log_ratio_N = log_q_N - torch.logaddexp(log_a + log_q_N, log_b + log_p_N)
    return log_ratio_N + 1 - alpha * log_ratio_N.exp()


def spreads(tokens: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, dict[str, float]]]:
    """case -> whose token -> deviation of the coefficients, median, 99th percentile and largest of their sizes."""
    found = {}
    for name, (divergence, alpha) in CASES.items():
        found[name] = {}
        for whose, (log_p_N, log_q_N) in tokens.items():
            values_N = coefficients(divergence, alpha, log_p_N, log_q_N)
            size_N = values_N.abs()
            found[name][whose] = {
                "std": values_N.std().item(), "median": size_N.median().item(), "p99": size_N.quantile(0.99).item(),
                "max": size_N.max().item(), "tokens": len(values_N),
            }  # fmt: skip
    return found


def table(found: dict) -> str:
    heads = ["loss", "alpha", "data: std", "99 % below", "largest", "student: std", "99 % below", "largest",
             "KL after", "agreement"]  # fmt: skip
    rows = []
    for name, one in found.items():
        divergence, alpha = CASES[name]
        spread, end = one["coefficient"], one["validation"]
        rows.append([
            f"`{divergence}`", f"{alpha:g}",
            *(spread[whose][key] for whose in ("data", "student") for key in ("std", "p99", "max")),
            f"{end['kl_nats']:.3f}" if end else "-", f"{end['top1_agreement']:.1%}" if end else "-",
        ])  # fmt: skip
    return format_table(heads, rows)


def draw(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for index, divergence in enumerate(("skl", "srkl")):
        cases = [found[f"{divergence}-{alpha:g}"] for alpha in ALPHAS]
        for whose, style in (("data", "-"), ("student", "--")):
            sizes = [case["coefficient"][whose]["std"] for case in cases]
            left.plot(ALPHAS, sizes, style, marker="o", color=f"C{index}", label=f"{divergence}, token of the {whose}")
        ends = [(alpha, case["validation"]["kl_nats"]) for alpha, case in zip(ALPHAS, cases, strict=True)
                if case["validation"]]  # fmt: skip
        if ends:
            right.plot(*zip(*ends, strict=True), marker="o", color=f"C{index}", label=divergence)
    left.set(xlabel="alpha", ylabel="deviation of the gradient's coefficients", yscale="log")
    right.set(xlabel="alpha", ylabel="KL after the run (nats a token)")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
