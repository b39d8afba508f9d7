"""DeepSpeed JSON files as they are read: what RunConfig owns is refused in them."""

import json
from pathlib import Path
from typing import Any

#: what tunes how ZeRO-3 shards weights: a file that sets one of these has chosen for itself
SHARDS = (
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "zero_hpz_partition_size",
    "zero_quantized_weights", "offload_param",
)  # fmt: skip
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
    """What the DeepSpeed file at `path` itself wants for the weights: "resident" (ZeRO stages 0 to 2), "sharded" where
    it tunes how ZeRO-3 shards, or None, which leaves the choice to the memory plan."""
    zero = _zero(path)
    if zero.get("stage", 0) < 3:
        return "resident"
    return "sharded" if any(name in zero for name in SHARDS) else None


def check_sharding(role: str, path: str, sharding: str) -> None:
    """Raises ValueError where `sharding` of the "teacher" or "student" asks for what its DeepSpeed file does not do."""
    if sharding == "sharded" and sharding_of_file(path) == "resident":
        raise ValueError(
            f'{role}.sharding = "sharded", but {path} has a ZeRO stage below 3, which keeps the weights whole on every '
            f"rank: take {role}.ds_config=ds_configs/{role}_zero3.json, or set {role}.sharding=resident"
        )
    if sharding == "resident" and "offload_param" in _zero(path):
        raise ValueError(
            f'{role}.sharding = "resident", but {path} keeps the parameters in CPU memory (offload_param): take '
            f"{role}.ds_config=ds_configs/{role}_zero3.json, or set {role}.sharding=sharded"
        )


def _zero(path: str) -> dict[str, Any]:
    return read_ds_config(path).get("zero_optimization", {})
