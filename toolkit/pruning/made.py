"""Models that are made of others: GGUF converted, layers left out, a student cut. A run makes them once and keeps them
in the cache; `init_student` (`python -m toolkit init-student`) writes one where the user says."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from toolkit.models.files import PICKLED, SAFETENSORS, TOKENIZER_FILES, hub_version, source_folder
from toolkit.models.gguf import convert_gguf
from toolkit.models.load import _is_local, default_cache_dir, resolve
from toolkit.models.portable import make_portable
from toolkit.models.tokenizer import TOKENIZERS_READ, check_saved, load_tokenizer
from toolkit.pruning import leave_out_layers, prune
from toolkit.ranks import collectives
from toolkit.settings import PYTHON_DOCS, DataConfig, InitConfig, ModelConfig
from toolkit.storage.appear import made_once

WEIGHT_FILES = (SAFETENSORS, PICKLED)


def materialize(model: ModelConfig, cache_dir: Path, data: DataConfig | None = None) -> str:
    """The folder to load `model` from, after what has to be made of it once; of a hub model that of its newest commit.
    No communication; run it on rank 0 first. `data` is the calibration text of `model.init`, where that names none.
    Raises ValueError for a local path that is not a model, and for sizes that cannot be cut out of it."""

    def once(name: str, make: Callable[[Path], object]) -> str:
        return str(made_once(cache_dir / name, make))

    # A GGUF file becomes a folder.
    path, trusted = resolve(model.path), model.trust_remote_code
    if path.endswith(".gguf"):
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"no GGUF file at {path}")
        key = _key(path, file.stat().st_size, file.stat().st_mtime_ns, TOKENIZERS_READ)
        path = once(f"{file.stem}-{key}", partial(convert_gguf, file))
    if model.random_weights:
        return path if not path or _is_local(path) else str(source_folder(path, with_weights=False))

    # A name of the hub becomes the folder that it was fetched to. `version` tells this model from others of its name.
    version: list[object]
    if _is_local(path):
        _check_folder(Path(path))
        name, version = Path(path).name, _contents(path)
    else:
        # With its weights, wherever they are needed: checkpoints say by hashes which models a run was made of.
        hub_name, path = hub_version(path)[0], str(source_folder(path))
        # The folder's name is the commit. Times would not do: other machines fetched the same files at other times.
        name, version = Path(hub_name).name, [hub_name, Path(path).name]

    # Layers are left out, then sizes are cut.
    if model.drop_layers:
        whole = path
        path = once(
            f"{name}-without-{'_'.join(map(str, model.drop_layers))}-{_key(*version)}",
            lambda folder: leave_out_layers(whole, model.drop_layers, folder, trusted),
        )
        name, version = Path(path).name, _contents(path)
    if model.init.wanted:
        data = calibration_data(data or DataConfig(), model.init)
        text = _contents(data.source) if Path(data.source).is_file() else []
        tokenizer = [model.tokenizer, TOKENIZERS_READ] if model.tokenizer else [""]
        key = _key(*version, *tokenizer, model.init, data, *text)
        path = once(f"{name}-pruned-{key}", partial(prune_model, model, path, model.init, data))
    return path


def calibration_data(data: DataConfig, init: InitConfig) -> DataConfig:
    """The run's own data, or the text that `init` names, read as the run's would be; whole where it is at hand."""
    if not init.data:
        return data
    streaming = data.streaming and not is_at_hand(init.data)
    return dataclasses.replace(data, source=init.data, subset=None, streaming=streaming)


def is_at_hand(source: str) -> bool:
    """Whether text is built in or local: nothing of it has to be streamed."""
    return source == PYTHON_DOCS or Path(source).exists()


def prune_model(model: ModelConfig, path: str, init: InitConfig, data: DataConfig, folder: Path) -> dict[str, Any]:
    """Write what `init` leaves of `model`, which `materialize` put at `path`, into the empty `folder`, beside it the
    tokenizer that `model` names; returns what pruning.json holds. Raises ValueError as `prune` does."""
    record = prune(path, init, data, folder, lambda: load_tokenizer(model, path), model.trust_remote_code)
    if model.tokenizer:
        # The teacher's tokenizer makes room.
        for file in [file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)]:
            file.unlink()
        tokenizer = load_tokenizer(model, path)
        tokenizer.save_pretrained(folder)
        make_portable(folder)
        check_saved(folder, tokenizer)
    return record


def init_student(out: Path, model: ModelConfig, init: InitConfig, data: DataConfig, text_field: str | None) -> None:
    """Writes the part of `model` that `init` asks for to the folder `out`, by calibration text of `data`. Collective.
    text_field: the field to read `data.source` as plain text from; None reads prompts and answers. Raises ValueError
    for wrong input; nothing is left behind then."""
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


def _check_folder(folder: Path) -> None:
    """Raises ValueError unless it holds a configuration and whole weights."""
    if not folder.is_dir():
        raise ValueError(f"no model folder at {folder}; give a folder, a .gguf file, or a hub name as owner/name")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        known = " or ".join(WEIGHT_FILES)
        raise ValueError(f"{folder} has no weights ({known}); copy them there, or ask for random_weights=true")
    for file in folder.glob(SAFETENSORS):
        try:
            with safe_open(file, framework="pt"):
                pass  # opening it reads the header and checks that the file is as long as that says
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut off: {error}; copy it again") from error


def _contents(path: str) -> list[object]:
    """What tells apart two folders of one name, and a folder from what it was before it was written anew."""
    files = sorted(p for p in Path(path).glob("*") if p.is_file()) or [Path(path)] * Path(path).is_file()
    return [Path(path).resolve(), *((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)] if files else []


def _key(*parts: object) -> str:
    """Eight hexadecimal digits that tell apart what these parts say."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:8]
