"""DeepSpeed JSON files: sharding, offload, communication, monitors. What RunConfig owns is refused in them."""

from typing import Any

from toolkit.settings import RunConfig
from toolkit.settings.ds_files import read_ds_config

#: the loop's monitor writes what these ask for; an engine that was given them would write there too, by samples
MONITOR_SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")
#: what ZeRO-2 and ZeRO-3 both know: how gradients and optimizer state are sharded
OF_GRADIENTS = ("overlap_comm", "contiguous_gradients", "reduce_bucket_size", "reduce_scatter", "allgather_bucket_size",
                "allgather_partitions", "offload_optimizer")  # fmt: skip


def student_ds_config(config: RunConfig, dtype_name: str, world: int) -> dict[str, Any]:
    """The student's file, with batch, precision and clipping from `config`; of a resident student with ZeRO-2 in the
    place of ZeRO-3. Gradients of several micro-batches add up in fp32, unless the file says otherwise."""
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
        # Without reduce_scatter a bucket is reduced where it is. With it, DeepSpeed 0.19.8 makes the same all-reduce of
        # a copy, and copies the result back.
        given = given | {"zero_optimization": {"stage": 2, "reduce_scatter": False, **kept}}
    rows, accumulation = config.train.rows_per_step + config.text_rows, config.accumulation(world)
    adds_up = accumulation > 1 or config.train.tokens_per_micro_batch is not None
    # Of ZeRO-1 DeepSpeed 0.19.8 makes another optimizer for it, whose states checkpoints cannot read.
    if adds_up and dtype_name == "bf16" and given["zero_optimization"]["stage"] > 1:
        given = given | {"data_types": {"grad_accum_dtype": "fp32"} | given.get("data_types", {})}
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
