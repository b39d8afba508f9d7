"""What the recipes of the paper's tables share: Dolly, OpenWebText, the protocol's settings, a run for each method."""

from typing import Any, NamedTuple

from toolkit.settings import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TextConfig, ValidationConfig
from toolkit.settings.methods import METHODS, with_method

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
    validation=ValidationConfig(every_steps=200, rows=500, scored_rows=500, best="rouge_l"),
)  # fmt: skip
Settings = dict[str, Any]
NONE: Settings = {}
TEXT = {"text.source": "Skylion007/openwebtext"}
#: --kd-ratio 0.5: the loss is the sum of its halves, twice the scripts', and so are gradients and their bound
HALF_CROSS_ENTROPY = {"loss.cross_entropy_weight": 1.0, "optimizer.max_grad_norm": 2.0}
#: methods whose student starts from the data, not from the 3 epochs of `init`
FROM_SCRATCH = ("sft", "kd", "seqkd")


def batch(rows: int, accumulation: int = 1) -> Settings:
    """So many rows in a micro-batch on each GPU."""
    return {"train.rows_per_step": rows * accumulation * GPUS, "train.rows_per_micro_batch": rows}


class Size(NamedTuple):
    """A model of a table: its hub name; rows a GPU, learning rate and epochs of the script for DistiLLM; and by run
    what the scripts of others have in their place. Methods without a script take DistiLLM's."""

    path: str
    rows: int
    lr: float
    epochs: int
    others: dict[str, Settings] = NONE


def teacher(family: str, size: Size, settings: Settings = NONE) -> RunConfig:
    """The teacher of a table, fine-tuned on its data."""
    return _run(family, "teacher", "sft", size, settings)


def rows(
    family: str, students: dict[str, Size], with_text: tuple[str, ...], settings: Settings = NONE
) -> dict[str, RunConfig]:
    """For each student `init` and a run of each method; those in `with_text` also learn OpenWebText with weight 1."""
    found = {}
    for label, size in students.items():
        for run in ("init", *METHODS):
            own = dict(settings)
            if run == "init":
                own["train.epochs"] = 3
            elif run not in FROM_SCRATCH:
                own["student.path"] = f"runs/{family}-{label}-init/student"
            if run in with_text:
                own |= TEXT
            if run == "minillm":
                own |= {
                    "optimizer.lr": 5e-6, "optimizer.min_lr": 5e-6, "optimizer.warmup_steps": 100, "train.epochs": 10
                }  # fmt: skip
            method = "sft" if run == "init" else run
            found[f"{label}/{run}"] = _run(family, f"{label}-{run}", method, size, own | size.others.get(run, NONE))
    return found


def _run(family: str, name: str, method: str, size: Size, settings: Settings) -> RunConfig:
    given = {
        "name": f"{family}-{name}", "student.path": size.path, "train.epochs": size.epochs, "optimizer.lr": size.lr,
        **batch(size.rows),
    }  # fmt: skip
    if method != "sft":
        given["teacher.path"] = f"runs/{family}-teacher/student"
    return with_method(BASE, method, given | settings)
