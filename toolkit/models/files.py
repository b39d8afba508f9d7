"""The files that a model is made of, in a folder or on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolkit.ranks import heartbeat

SAFETENSORS, PICKLED = "*.safetensors", "pytorch_model*.bin"
#: weights, configuration and tokenizer, beside weights in the older format
SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.bpe", "*.spm")
FILES = (SAFETENSORS, *SMALL_FILES)
#: what a tokenizer may leave beside the weights
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "*.tiktoken",
    "*.bpe", "*.spm", "chat_template*",
)  # fmt: skip
#: what pruning says of a model that it made
RECORD = "pruning.json"


def hub_version(path: str) -> tuple[str, str | None]:
    """(OWNER/NAME, REVISION) of OWNER/NAME@REVISION; None is the newest."""
    name, _, revision = path.partition("@")
    return name, revision or None


def source_folder(path: str, with_weights: bool = True, may_fetch: bool = True) -> Path:
    """`path` where it is a folder, else the hub's model OWNER/NAME, or its version OWNER/NAME@REVISION, fetched: its
    safetensors, or where it has none its pytorch_model.bin; not `with_weights`, none of them. What is in the cache
    already, where it `may_fetch` nothing.

    Raises ValueError where it is not to be had.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError
    from huggingface_hub.utils import tqdm

    class Beating(tqdm):  # the bar of the bytes that have come
        def update(self, n: float | None = 1) -> bool | None:
            heartbeat.beat()
            return super().update(n)

    name, revision = hub_version(path)

    def fetched(*files: str) -> Path:
        wanted = {"allow_patterns": list(files), "ignore_patterns": ["consolidated*", "*/*"]}
        wanted |= {"local_files_only": not may_fetch}
        try:
            return Path(snapshot_download(name, revision=revision, tqdm_class=Beating, **wanted))
        except IncompleteSnapshotError as error:  # without the hub: some file is not in the cache, maybe of no use here
            return Path(error.snapshot_path)

    try:
        folder = fetched(*(FILES if with_weights else SMALL_FILES), "*.py")
        if with_weights and not any(
            (folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
        ):
            fetched(f"{PICKLED}*")
        return folder
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"the model {path} could not be had from the hub, and there is no folder {Path(path).absolute()}: {error}"
        ) from error


def weight_files(folder: Path, config: Any = None) -> list[Path]:
    """The files of weights that transformers reads in `folder`, in its order of preference; none: it finds none."""
    named = getattr(config, "transformers_weights", None)
    plain = ("model.safetensors", "pytorch_model.bin")
    names = [named] if named else [found for name in plain for found in (name, f"{name}.index.json")]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        return []
    if not file.name.endswith(".index.json"):
        return [file]
    return sorted({folder / part for part in json.loads(file.read_text())["weight_map"].values()})
