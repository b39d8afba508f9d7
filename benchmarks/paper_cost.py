"""The runs of the paper's tables with an estimate of their hours on 8 A100 GPUs, as a table for docs/reproduction.md.
A row is a method, a column a student: `./run.sh gpt2 0.1b/kd` is row kd, column gpt2 0.1b.

    python benchmarks/paper_cost.py

An estimate and no measurement. Products: 2 operations a parameter and token forward, 6 forward and backward, at 30 %
of 312 TFLOP/s. Generation: 256 positions one after another, 15 ms each. Dolly: 14,500 rows of 151 tokens (the mean of
900 of them under the template, SmolLM2's tokenizer), blocks of plain text 512. An adaptive schedule is taken to
generate at 15 % of its steps (phi 0.3 on average, half of it new).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from importlib import import_module

from toolkit.settings import RunConfig
from toolkit.tables import format_table

GPUS, RATE, POSITION_S = 8, 0.3 * 312e12, 0.015
ROWS, ROW_TOKENS, TEXT_TOKENS, NEW_TOKENS = 14500, 151, 512, 256
PARAMETERS = {
    "gpt2": 0.124e9, "gpt2-medium": 0.355e9, "gpt2-large": 0.774e9, "gpt2-xl": 1.56e9, "opt-125m": 0.125e9,
    "opt-350m": 0.331e9, "opt-1.3b": 1.32e9, "opt-2.7b": 2.65e9, "open_llama_3b_v2": 3.43e9, "open_llama_7b_v2": 6.74e9,
}  # fmt: skip
GENERATING = {"off": 0.0, "on_policy": 1.0, "mixed": 0.5, "adaptive": 0.15}


def hours(config: RunConfig, student: float, teacher: float) -> float:
    steps = config.train.epochs * ROWS / config.train.rows_per_step
    rows = steps * config.train.rows_per_step
    operations = rows * ROW_TOKENS * (6 * student + (2 * teacher if config.has_teacher else 0))
    if config.text.source:
        operations += rows * TEXT_TOKENS * 6 * student
    positions = steps * GENERATING[config.schedule.policy] * NEW_TOKENS
    if config.data.responses == "teacher":
        positions += ROWS / (GPUS * 64) * NEW_TOKENS
    return (operations / (GPUS * RATE) + positions * POSITION_S) / 3600


def main() -> None:
    cells: dict[str, dict[str, str]] = {}
    students = []
    for family in ("gpt2", "opt", "openllama2"):
        table = import_module(f"recipes.{family}").RECIPES
        teacher = parameters(table["teacher"])
        for run, config in table.items():
            label, _, method = run.rpartition("/")
            size = parameters(table[f"{label}/init"] if label else config)
            found = f"{hours(config, size, teacher):.2f}"
            for student in [f"{family} {label}"] if label else [f"{family} {one}" for one in labels(table)]:
                cells.setdefault(method, {})[student] = found
                students += [student] * (student not in students)
    rows = [[f"`{method}`", *(found.get(one, "-") for one in students)] for method, found in cells.items()]
    print(format_table(["method", *students], rows))


def labels(table: dict[str, RunConfig]) -> list[str]:
    """The students of a family, whose teacher stands in each of their columns."""
    return list(dict.fromkeys(run.partition("/")[0] for run in table if "/" in run))


def parameters(config: RunConfig) -> float:
    return PARAMETERS[config.student.path.rpartition("/")[2]]


if __name__ == "__main__":
    main()
