"""JSON files, and manifests: a JSON file in a folder that lists the folder's files with their sizes and hashes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from toolkit.ranks import heartbeat
from toolkit.storage.appear import new_file
from toolkit.storage.tensors import write_safetensors

MANIFEST = "manifest.json"


class Entry(TypedDict):
    """What a manifest says of one file."""

    bytes: int
    sha256: str


def entry_of(path: Path) -> Entry:
    """What a manifest has to say of the file as it is."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_checked(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> Entry:
    """Writes a safetensors file, reads it back, and returns what a manifest has to say of it.

    Raises ValueError where other bytes are read than were written.
    """
    digest = write_safetensors(path, tensors)
    entry = entry_of(path)
    if entry["sha256"] != digest:
        raise ValueError(f"{path} reads back other than it was written: the storage is broken")
    return entry


def check_files(folder: Path, wanted: Mapping[str, Entry], share: int = 0, shares: int = 1) -> None:
    """Raises ValueError, naming file and both values, unless each file in `folder` is as its entry says. Sizes are
    compared for all files, hashes for every `shares`-th from `share` on. No communication."""
    for name, entry in wanted.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size != entry["bytes"]:
            raise ValueError(f"{file} has {size} bytes, its manifest says {entry['bytes']}: it is damaged")
    for name in sorted(wanted)[share::shares]:
        found, said = sha256(folder / name), wanted[name]["sha256"]
        if found != said:
            both = f"has SHA-256 {found:.16}..., its manifest says {said!s:.16}..."
            raise ValueError(f"{folder / name} {both}: it is damaged")


def read_manifest(folder: Path, known_format: int) -> dict[str, Any]:
    """The manifest in `folder`. Raises ValueError where there is none, and for one of another format."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != known_format:
        raise ValueError(f"{folder} has format {manifest.get('format')!r}, this version reads {known_format}")
    return manifest


def entries(manifest: Mapping[str, Any]) -> dict[str, Entry]:
    """The files that it lists. Raises KeyError, TypeError or AttributeError for a manifest that is damaged."""
    files = manifest["files"]
    return {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is not there, or holds anything but an object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def write_json(path: Path, value: object, *, durable: bool, indent: int | None = None) -> None:
    """Writes `value`, of plain JSON types, in place of an older file; durable: as toolkit.storage.appear says."""
    with new_file(path, durable=durable) as unfinished:
        unfinished.write_text(json.dumps(value, indent=indent))


def sha256(path: Path) -> str:
    """Of the file's contents, as 64 hexadecimal digits. The watchdog hears of each file."""
    heartbeat.beat()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
