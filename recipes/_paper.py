"""What the recipes of the paper's tables share: Dolly, OpenWebText, the protocol's settings, a run for each method."""

from typing import Any, NamedTuple

from toolkit.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TextConfig, ValidationConfig
from toolkit.methods import METHODS, with_method

GPUS = 8  # the scripts' batches are per GPU
BASE = RunConfig(
    teacher=ModelConfig(ds_config="ds_configs/teacher_zero3.json"),
    student=ModelConfig(ds_config="ds_configs/student_zero3.json"),
    data=DataConfig(
        source="dolly", template="alpaca", max_length=512, max_prompt_length=256, validation_fraction=0.033,
        on_bad_row="skip",  # MiniLLM's copy, less the 500 prompts of the papers' test
    ),
    text=TextConfig(max_length=512, streaming=True),
    optimizer=OptimizerConfig(min_lr=1e-7, weight_decay=1e-2, max_grad_norm=1.0),
    validation=ValidationConfig(every_steps=200, rows=500, rouge_rows=500, best="rouge_l"),
)  # fmt: skip
OPENWEBTEXT = "Skylion007/openwebtext"
Settings = dict[str, Any]
NONE: Settings = {}
#: methods whose student starts from the data, not from the 3 epochs of `init`
FROM_SCRATCH = ("sft", "kd", "seqkd")


class Size(NamedTuple):
    """A model of a table: its hub name, rows a GPU, learning rates with and without a teacher, epochs."""

    path: str
    rows: int
    lr: float
    sft_lr: float
    epochs: int


def fine_tuned(family: str, name: str, size: Size, epochs: int | None = None, settings: Settings = NONE) -> RunConfig:
    """A model of its own, without a teacher: the teacher of a table, or where a student starts."""
    return _run(family, name, "sft", size, settings | {"train.epochs": epochs or size.epochs})


def rows(
    family: str, students: dict[str, Size], with_text: tuple[str, ...], settings: Settings = NONE
) -> dict[str, RunConfig]:
    """For each student a run of each method; those in `with_text` also learn OpenWebText with weight 1."""
    found = {}
    for label, size in students.items():
        found[f"{label}/init"] = fine_tuned(family, f"{label}-init", size, 3, settings | {"optimizer.lr": size.lr})
        for method in METHODS:
            own = dict(settings)
            if method not in FROM_SCRATCH:
                own["student.path"] = f"runs/{family}-{label}-init/student"
            if method in with_text:
                own["text.source"] = OPENWEBTEXT
            if method == "minillm":
                own |= {
                    "optimizer.lr": 5e-6, "optimizer.min_lr": 5e-6, "optimizer.warmup_steps": 100, "train.epochs": 10
                }  # fmt: skip
            found[f"{label}/{method}"] = _run(family, f"{label}-{method}", method, size, own)
    return found


def _run(family: str, name: str, method: str, size: Size, settings: Settings) -> RunConfig:
    given = {
        "name": f"{family}-{name}", "student.path": size.path, "train.batch_rows": size.rows * GPUS,
        "train.micro_rows": size.rows, "train.epochs": size.epochs,
        "optimizer.lr": size.sft_lr if method == "sft" else size.lr,
    }  # fmt: skip
    if method != "sft":
        given["teacher.path"] = f"runs/{family}-teacher/student"
    return with_method(BASE, method, given | settings)
