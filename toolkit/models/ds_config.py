"""DeepSpeed JSON files: sharding, offload, communication, monitors. What RunConfig owns is refused in them."""

import json
from pathlib import Path
from typing import Any

from toolkit.settings import RunConfig

#: the loop's monitor writes what these ask for; an engine that was given them would write there too, by samples
MONITOR_SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")
REPOSITORY = Path(__file__).resolve().parents[2]
#: key of a DeepSpeed config -> the setting of RunConfig that owns it
OWNED = {
    "train_batch_size": "train.rows_per_step",
    "train_micro_batch_size_per_gpu": "train.rows_per_micro_batch",
    "gradient_accumulation_steps": "train.rows_per_step",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.warmup_steps and min_lr",
    "bf16": "precision",
    "fp16": "precision",
}


def read_ds_config(path: str) -> dict[str, Any]:
    """Raises ValueError for a file that is missing, is not JSON, holds "auto" or a key that RunConfig owns."""
    file = next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)
    if file is None:
        known = sorted(f"ds_configs/{p.name}" for p in (REPOSITORY / "ds_configs").glob("*.json"))
        raise ValueError(f"no DeepSpeed config at {path}; there are {', '.join(known)}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    for key, owner in OWNED.items():
        if key in config:
            raise ValueError(f"{file} sets {key!r}, which belongs to {owner} of the run's config; take it out there")
    if '"auto"' in json.dumps(config):
        raise ValueError(f'{file} holds "auto": nothing fills it in here; write the value')
    return config


def student_ds_config(config: RunConfig, dtype_name: str, world: int) -> dict[str, Any]:
    """The student's file, with batch, precision and clipping from `config`."""
    given = read_ds_config(config.student.ds_config)
    sharding = given.get("zero_optimization", {})
    if sharding.get("stage") not in (1, 2, 3) or sharding.get("offload_optimizer", {}).get("device") == "nvme":
        raise ValueError(
            f"{config.student.ds_config}: zero_optimization = {sharding}, and checkpoints are made of ZeRO stages 1, 2 "
            "and 3 with the optimizer on the device or in CPU memory; see ds_configs/student_zero2.json"
        )
    rows, accumulation = config.train.rows_per_step + config.text_rows, config.accumulation(world)
    return {
        **{key: value for key, value in given.items() if key not in MONITOR_SECTIONS},
        "train_micro_batch_size_per_gpu": rows // (accumulation * world),
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": rows,
        "gradient_clipping": config.optimizer.max_grad_norm,
        # Without the check ZeRO-2 would take a bf16 step whose gradient is not finite; fp32 and ZeRO-3 never do.
        "bf16": {"enabled": dtype_name == "bf16", "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,  # plain SGD; AdamW is on deepspeed's own list
        "steps_per_print": 10**9,
    }


def teacher_ds_config(config: RunConfig, dtype_name: str) -> dict[str, Any]:
    """The teacher's file, with batch and precision from `config`."""
    given = read_ds_config(config.teacher.ds_config)
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 3):  # 1 and 2 shard an optimizer, and deepspeed asserts that there is one
        raise ValueError(
            f"{config.teacher.ds_config}: zero_optimization.stage = {stage}, and a teacher is not trained: give 3, "
            "which shards its weights (ds_configs/teacher_zero3.json), or 0, which keeps it whole on every rank"
        )
    own = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype_name == "bf16"}, "steps_per_print": 10**9}
    return {**given, **own}
