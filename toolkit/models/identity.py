"""What a model is made of, by content: two names of one model are equal, one name of two models is not."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from toolkit import distributed, heartbeat
from toolkit.models.files import FILES, RECORD


def file_hashes(path: str) -> dict[str, str]:
    """SHA-256 of the weights, configuration and tokenizer in the folder `path`; of "" there are none.

    The files are dealt over the ranks. Collective.
    """
    rank, world = distributed.rank(), distributed.world()
    files = _model_files(path)
    hashes = distributed.together(lambda: {file.name: _known(file) for file in files[rank::world]})
    return {name: digest for part in distributed.gather_objects(hashes) for name, digest in sorted(part.items())}


def _known(path: Path) -> str:
    """Stages of one process have the same teacher: its files are read once."""
    stat = path.stat()
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)


def sha256(path: Path) -> str:
    heartbeat.beat()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_files(path: str) -> list[Path]:
    patterns = (*FILES, "*.bin") if path else ()
    found = {file for pattern in patterns for file in Path(path).glob(pattern)}
    return sorted(file for file in found if file.name != RECORD)  # it says where the teacher lay: one model, two texts
