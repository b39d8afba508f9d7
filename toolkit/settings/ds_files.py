"""DeepSpeed JSON files as they are read: what RunConfig owns is refused in them."""

import json
from pathlib import Path
from typing import Any

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
