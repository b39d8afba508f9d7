"""Files with their sizes and hashes, and JSON that is on disk when a call returns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.ranks import heartbeat
from toolkit.storage.tensors import write_safetensors

MANIFEST = "manifest.json"


def write_checked(path: Path, tensors: list[tuple[str, Tensor]]) -> dict[str, Any]:
    """Writes, and reads back; the manifest's entry."""
    digest = write_safetensors(path, tensors)
    if sha256(path) != digest:
        raise ValueError(f"{path} reads back other than it was written: the storage is broken")
    return {"bytes": path.stat().st_size, "sha256": digest}


def check_files(folder: Path, wanted: Mapping[str, tuple[Any, Any]], share: int = 0, shares: int = 1) -> None:
    """Raises ValueError, naming file and both values, unless each file has its (bytes, SHA-256). Sizes are compared for
    all files, hashes for every `shares`-th. No communication."""
    for name, (wanted_size, _) in wanted.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size != wanted_size:
            raise ValueError(f"{file} has {size} bytes, its manifest says {wanted_size}: it is damaged")
    for name in sorted(wanted)[share::shares]:
        found = sha256(folder / name)
        if found != wanted[name][1]:
            raise ValueError(
                f"{folder / name} has SHA-256 {found[:16]}..., its manifest says {str(wanted[name][1])[:16]}...: it is "
                "damaged"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is not there, or holds anything but an object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """On disk when it returns."""
    with path.open("w") as file:
        json.dump(value, file, indent=indent)
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    heartbeat.beat()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
