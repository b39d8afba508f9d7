"""`python -m toolkit init-student`: write a student that is a part of its teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from toolkit.models.load import default_cache_dir
from toolkit.pruning.made import is_at_hand, materialize, prune_model
from toolkit.ranks import collectives
from toolkit.settings import DataConfig, InitConfig, ModelConfig
from toolkit.storage.appear import made_once


def init_student(out: Path, model: ModelConfig, init: InitConfig, data: DataConfig, text_field: str | None) -> None:
    """Writes the part of `model` that `init` asks for to the folder `out`, by calibration text of `data`. Collective.

    text_field: the field to read `data.source` as plain text from; None reads prompts and answers. Raises ValueError
    for wrong input; nothing is left behind then.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; name another folder, or delete it")
    init.validate("init-student")
    if text_field is not None:
        data = dataclasses.replace(data, kind="text", text_field=text_field, streaming=not is_at_hand(data.source))
    data.validate()

    def make() -> None:
        path = materialize(model, default_cache_dir(""))
        made_once(out, lambda folder: _report(prune_model(model, path, init, data, folder)))
        print(f"student: {out}")

    collectives.on_main_rank(make)


def _report(record: dict[str, Any]) -> None:
    """Prints what the record of a pruned model says: which layers it keeps, and how far it is from its teacher."""
    for choice, kl_nats in record.get("depth_kl_nats", {}).items():
        print(f"layers {choice}: KL {kl_nats:.3f} nats")
    print(f"kept layers {','.join(map(str, record['kept']['layers']))}")
    if found := record.get("calibration"):
        print(
            f"on {found['rows']} x {found['row_tokens']} tokens of {found['source']}: KL to the teacher "
            f"{found['kl_nats']:.3f} nats, top-1 agreement {found['top1_agreement']:.1%}"
        )
