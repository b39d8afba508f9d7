"""DeepSpeed JSON files: sharding, offload, communication, monitors. What RunConfig owns is refused in them."""

import json
from pathlib import Path
from typing import Any

from toolkit.settings import RunConfig

#: the loop's monitor writes what these ask for; an engine that was given them would write there too, by samples
MONITOR_SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")
#: what tunes how ZeRO-3 shards weights: a file that sets one of these is obeyed
SHARDS = (
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "zero_hpz_partition_size",
    "zero_quantized_weights", "offload_param",
)  # fmt: skip
#: what ZeRO-2 and ZeRO-3 both know: how gradients and optimizer state are sharded
OF_GRADIENTS = ("overlap_comm", "contiguous_gradients", "reduce_bucket_size", "reduce_scatter", "allgather_bucket_size",
                "allgather_partitions", "offload_optimizer")  # fmt: skip
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


def sharding_of_file(path: str) -> str | None:
    """What the DeepSpeed file at `path` itself wants for the weights: "resident" (ZeRO stages 0 to 2), "sharded" where it
    tunes how ZeRO-3 shards, or None, which leaves the choice to the memory plan."""
    zero = _zero(path)
    if zero.get("stage", 0) < 3:
        return "resident"
    return "sharded" if any(name in zero for name in SHARDS) else None


def check_sharding(config: RunConfig) -> None:
    """Raises ValueError where `sharding` asks for what the DeepSpeed file beside it does not do."""
    for role, model in (("teacher", config.teacher), ("student", config.student)):
        if role == "teacher" and not config.has_teacher:
            continue
        wanted = sharding_of_file(model.ds_config)
        if model.sharding == "sharded" and wanted == "resident":
            raise ValueError(
                f'{role}.sharding = "sharded", but {model.ds_config} has a ZeRO stage below 3, which keeps weights '
                f"whole: take ds_configs/{role}_zero3.json, or set {role}.sharding=resident"
            )
        if model.sharding == "resident" and "offload_param" in _zero(model.ds_config):
            raise ValueError(
                f'{role}.sharding = "resident", but {model.ds_config} keeps parameters in CPU memory (offload_param): '
                f"take ds_configs/{role}_zero3.json, or set {role}.sharding=sharded"
            )


def _zero(path: str) -> dict[str, Any]:
    return read_ds_config(path).get("zero_optimization", {})


def student_ds_config(config: RunConfig, dtype_name: str, world: int) -> dict[str, Any]:
    """The student's file, with batch, precision and clipping from `config`; of a resident student with ZeRO-2 in the
    place of ZeRO-3."""
    given = read_ds_config(config.student.ds_config)
    sharding = given.get("zero_optimization", {})
    if sharding.get("stage") not in (1, 2, 3) or sharding.get("offload_optimizer", {}).get("device") == "nvme":
        raise ValueError(
            f"{config.student.ds_config}: zero_optimization = {sharding}, and checkpoints are made of ZeRO stages 1, 2 "
            "and 3 with the optimizer on the device or in CPU memory; see ds_configs/student_zero2.json"
        )
    if config.student.sharding == "resident" and sharding["stage"] == 3:
        # Gradients and optimizer state stay sharded. What else the file says of ZeRO-3 is about sharded weights.
        kept = {name: value for name, value in sharding.items() if name in OF_GRADIENTS}
        given = given | {"zero_optimization": {"stage": 2, **kept}}
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
