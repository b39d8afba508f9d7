"""What a model is made of, by content: two names of one model are equal, one name of two models is not."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from toolkit.models.files import PICKLED, TOKENIZER_FILES
from toolkit.ranks import collectives
from toolkit.storage.manifest import sha256


def file_hashes(path: str) -> dict[str, str]:
    """SHA-256 of the weights, configuration and tokenizer in the folder `path`; of "" there are none.

    The files are dealt over the ranks. Collective.
    """
    rank, world = collectives.rank(), collectives.world()
    files = _model_files(path)
    hashes = collectives.together(lambda: {file.name: _known(file) for file in files[rank::world]})
    return {name: digest for part in collectives.gather_objects(hashes) for name, digest in sorted(part.items())}


def _known(path: Path) -> str:
    """Stages of one process have the same teacher: its files are read once."""
    stat = path.stat()
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)


def _model_files(path: str) -> list[Path]:
    """What is loaded from there. Other files may come and go beside it: weights in another format, an evaluation's
    results, the record of a pruning, which says where its teacher lay."""
    if not path:
        return []
    folder = Path(path)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weights = [index, *(folder / name for name in {*json.loads(index.read_text())["weight_map"].values()})]
    else:
        weights = [single] if single.is_file() else [*folder.glob(f"{PICKLED}*")]
    patterns = ("config.json", "generation_config.json", *TOKENIZER_FILES, "*.py")
    return sorted({*weights, *(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())})
