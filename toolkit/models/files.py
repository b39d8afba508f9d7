"""The files that a model is made of, in a folder or on the hub."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from toolkit.ranks import heartbeat

SAFETENSORS, PICKLED = "*.safetensors", "pytorch_model*.bin"
#: names of a single file of weights, the preferred one first
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
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
    """`path` where it is a folder, else the folder of the hub's model OWNER/NAME, or of OWNER/NAME@REVISION.
    with_weights: with the hub's safetensors, or where it has none its pytorch_model.bin. may_fetch: otherwise what is
    in the hub's cache on this machine. Raises ValueError where it is not to be had."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError
    from huggingface_hub.utils import tqdm

    class Beating(tqdm):
        """The bar of the bytes that have come: the watchdog hears of them."""

        def update(self, n: float | None = 1) -> bool | None:
            heartbeat.beat()
            return super().update(n)

    # What a model needs, without copies of its weights in other formats, which repositories keep beside it.
    name, revision = hub_version(path)

    def fetched(*files: str) -> Path:
        try:
            return Path(snapshot_download(
                name, revision=revision, tqdm_class=Beating, local_files_only=not may_fetch, allow_patterns=list(files),
                ignore_patterns=["consolidated*", "*/*"],
            ))  # fmt: skip
        except IncompleteSnapshotError as error:
            # Without the hub nobody knows whether what the cache lacks is needed. Loading will tell.
            return Path(error.snapshot_path)

    try:
        folder = fetched(*(FILES if with_weights else SMALL_FILES), "*.py")
        if with_weights and first_weights_file(folder, names=("model.safetensors",)) is None:
            fetched(f"{PICKLED}*")
        return folder
    except (OSError, HFValidationError) as error:
        told = f"the model {path} could not be had from the hub, and there is no folder {Path(path).absolute()}"
        raise ValueError(f"{told}: {error}") from error


def first_weights_file(folder: Path, names: Sequence[str] = WEIGHTS_NAMES) -> Path | None:
    """The file with all weights, or the index of the files that they are split into, of the first of `names` that is in
    `folder`: transformers prefers them in this order. None where it has none."""
    files = [folder / name for single in names for name in (single, f"{single}.index.json")]
    return next((file for file in files if file.is_file()), None)


def weight_files(folder: Path, config: PretrainedConfig | None = None) -> list[Path]:
    """The files of weights that transformers reads in `folder`; none where it finds none. A `config` may name them."""
    named = getattr(config, "transformers_weights", None)
    file = first_weights_file(folder, [named] if named else WEIGHTS_NAMES)
    if file is None or not file.name.endswith(".index.json"):
        return [file] if file else []
    return sorted({folder / part for part in json.loads(file.read_text())["weight_map"].values()})
