"""What a model is made of, by content: two names of one model are equal, one name of two models is not."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from toolkit import distributed, heartbeat
from toolkit.models.files import FILES, RECORD


def file_hashes(path: str) -> dict[str, str]:
    """SHA-256 of the weights, configuration and tokenizer at `path`, a folder or a hub name in the cache.

    The files are dealt over the ranks. Collective.
    """
    rank, world = distributed.rank(), distributed.world()
    files = _model_files(path)
    hashes = distributed.together(lambda: {file.name: sha256(file) for file in files[rank::world]})
    return {name: digest for part in distributed.gather_objects(hashes) for name, digest in sorted(part.items())}


def sha256(path: Path) -> str:
    heartbeat.beat()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_files(path: str) -> list[Path]:
    folder = Path(path)
    if path and not folder.is_dir():
        cached = try_to_load_from_cache(path, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    found = (
        {file for pattern in (*FILES, "*.bin") for file in folder.glob(pattern)} if path and folder.is_dir() else set()
    )
    return sorted(file for file in found if file.name != RECORD)  # it says where the teacher lay: one model, two texts
