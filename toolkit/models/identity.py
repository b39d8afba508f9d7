"""What a model is made of, by content: two names of one model are equal, one name of two models is not."""

import functools
from pathlib import Path
from typing import NotRequired, TypedDict

from toolkit.models.files import TOKENIZER_FILES, first_weights_file, weight_files
from toolkit.ranks import collectives
from toolkit.storage.manifest import sha256


class RunIdentity(TypedDict):
    """What a run is made of beside its settings, as checkpoints and summaries keep it. The hashes of a model are by
    file name. teacher_cache: the hash of the stored answers that it learned from, if it did."""

    teacher_path: str
    teacher_sha256: dict[str, str]
    base_path: str
    base_sha256: dict[str, str]
    data_sha256: str
    precision: str
    teacher_cache: NotRequired[str]


def file_hashes(path: str) -> dict[str, str]:
    """SHA-256 of the weights, configuration and tokenizer in the folder `path`; of "" there are none. The files are
    dealt over the ranks. Collective."""
    rank, world = collectives.rank(), collectives.world()
    files = _model_files(path)

    def hashed() -> dict[str, str]:
        stats = {file: file.stat() for file in files[rank::world]}
        return {file.name: _known(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}

    hashes = collectives.together(hashed)
    return {name: digest for part in collectives.gather_objects(hashes) for name, digest in sorted(part.items())}


@functools.cache
def _known(path: Path, size: int, mtime_ns: int) -> str:
    """The SHA-256 of a file, which is read once unless it changes: stages of one process have the same teacher."""
    return sha256(path)


def _model_files(path: str) -> list[Path]:
    """What is loaded from there. Other files may come and go beside it: weights in another format, an evaluation's
    results, the record of a pruning, which says where its teacher lay."""
    if not path:
        return []
    folder = Path(path)
    first = first_weights_file(folder)
    weights = [first, *weight_files(folder)] if first else []
    patterns = ("config.json", "generation_config.json", *TOKENIZER_FILES, "*.py")
    return sorted({*weights, *(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())})
