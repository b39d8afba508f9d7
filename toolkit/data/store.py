"""Tokenised examples in memory-mapped files, made once for the same content, tokenizer and settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from toolkit.batch import Example
from toolkit.data.probe import PROBE
from toolkit.data.sources import Row
from toolkit.storage.appear import made_once

DAMAGE = (OSError, ValueError, KeyError, TypeError)  # what reading a broken entry, or none, raises
FORMAT = 3  # of the files, and of what the tokens of a row are: raise it when either changes


class Part(NamedTuple):
    """What `cached` is given. rows: the texts of the examples, where they are kept. counts: what was cut or left out on
    the way."""

    examples: Iterable[Example]
    rows: Sequence[Row] = ()
    counts: Mapping[str, int] = MappingProxyType({})


class Kept(NamedTuple):
    """A part that is built. sha256: of the tokens, and of where prompts and texts end."""

    examples: Sequence[Example]
    rows: Sequence[Row]
    counts: Mapping[str, int]
    sha256: str


class StoredExamples(Sequence[Example]):
    """The examples of a folder that `store` wrote. Tokens stay on disk until they are asked for; all processes of a
    machine share the pages."""

    def __init__(self, folder: Path):
        load = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ends", "prompts", "start_ends")}
        self._ends, self._prompts, self._start_ends = load["ends"], load["prompts"], load["start_ends"]
        for name in ("tokens", "starts"):
            file = folder / f"{name}.bin"
            is_empty = not file.stat().st_size  # which cannot be mapped
            load[name] = np.empty(0, dtype=np.int32) if is_empty else np.memmap(file, dtype=np.int32, mode="r")
        self._tokens, self._starts = load["tokens"], load["starts"]
        if len(self) and (self._ends[-1], self._start_ends[-1]) != (len(self._tokens), len(self._starts)):
            raise ValueError(f"{folder}: its files do not belong together")

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        # An example begins where the one before it ends.
        at = index % len(self)
        first, first_start = (0, 0) if at == 0 else (self._ends[at - 1], self._start_ends[at - 1])
        starts = self._starts[first_start : self._start_ends[at]]
        return Example(self._tokens[first : self._ends[at]], int(self._prompts[at]), tuple(starts.tolist()))


def longest(examples: Sequence[Example]) -> tuple[int, int]:
    """(tokens of the longest example, of the longest prompt)"""
    if isinstance(examples, StoredExamples):  # not one by one: there may be millions
        return int(np.diff(examples._ends, prepend=0).max()), int(examples._prompts.max())
    return max(len(example.tokens) for example in examples), max(example.prompt_length for example in examples)


def store(folder: Path, examples: Iterable[Example]) -> str:
    """Write them one after the other: they may be more than memory holds. Returns their SHA-256."""
    folder.mkdir(parents=True)
    whole = hashlib.sha256()
    lengths, starts_counts, prompts = [], [], []
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "starts.bin").open("wb") as starts:
        for example in examples:
            whole.update(_bytes(example))
            tokens.write(example.tokens.tobytes())
            starts.write(np.array(example.text_starts, dtype=np.int32).tobytes())
            lengths.append(len(example.tokens))
            starts_counts.append(len(example.text_starts))
            prompts.append(example.prompt_length)
    # Where each example ends in the files above; it begins where the one before ends.
    np.save(folder / "ends.npy", np.cumsum(lengths, dtype=np.int64))
    np.save(folder / "start_ends.npy", np.cumsum(starts_counts, dtype=np.int64))
    np.save(folder / "prompts.npy", np.array(prompts, dtype=np.int32))
    return whole.hexdigest()


def _bytes(example: Example) -> bytes:
    """What is hashed of an example."""
    head = f"{len(example.tokens)} {example.prompt_length} {example.text_starts}"
    return head.encode() + example.tokens.tobytes()


def cached(cache_dir: Path | None, key: dict[str, Any], build: Callable[[], dict[str, Part]]) -> dict[str, Kept]:
    """`build()`'s parts by name, from `cache_dir` where a process has built them for an equal `key` (plain JSON types).
    Several processes may build the same ones at once. A damaged entry is built anew. Where it cannot be written the
    parts are used from memory, with a warning."""
    if cache_dir is None:
        return {name: _in_memory(part) for name, part in build().items()}
    name = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()[:32]
    entry = cache_dir / name
    # One that is whole is used; what is left of a damaged one makes room.
    with contextlib.suppress(*DAMAGE):
        return _load(entry)
    _remove_damaged(entry)

    # A folder for each part, and the key beside them: an entry without it is not whole.
    def make(unfinished: Path) -> None:
        for part_name, part in build().items():
            sha256 = store(unfinished / part_name, part.examples)
            with (unfinished / part_name / "rows.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in part.rows)
            about = {"counts": dict(part.counts), "sha256": sha256}
            (unfinished / part_name / "part.json").write_text(json.dumps(about))
        (unfinished / "key.json").write_text(json.dumps(key, indent=2, sort_keys=True))

    try:
        return _load(made_once(entry, make))
    except OSError as error:
        warnings.warn(f"the tokens of the data could not be kept in {cache_dir}: {error}", stacklevel=2)
        return cached(None, key, build)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which ids a text gets: the Rust tokenizer as a whole, specials and chat template. Of one that
    is code, its vocabulary and the ids of `PROBE` stand for the rules."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        rules = [sorted(tokenizer.get_vocab().items()), [tokenizer(text)["input_ids"] for text in PROBE]]
    else:
        rules = inner.to_str()
    kept = [rules, type(tokenizer).__name__, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def _in_memory(part: Part) -> Kept:
    examples, whole = list(part.examples), hashlib.sha256()
    for example in examples:
        whole.update(_bytes(example))
    return Kept(examples, part.rows, part.counts, whole.hexdigest())


def _load(entry: Path) -> dict[str, Kept]:
    """The parts of an entry. Raises one of DAMAGE where it is not whole."""
    json.loads((entry / "key.json").read_text())
    parts = {}
    for folder in sorted(path.parent for path in entry.glob("*/part.json")):
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        parts[folder.name] = Kept(StoredExamples(folder), rows, **json.loads((folder / "part.json").read_text()))
    return parts


def _remove_damaged(entry: Path) -> None:
    """Takes away an entry that could not be read. It is moved first and read again: another process may have put a
    whole one in its place since, which goes back."""
    moved = entry.with_name(f"{entry.name}.damaged-{secrets.token_hex(8)}")
    try:
        entry.rename(moved)
    except OSError:
        return  # there is no entry, or it cannot be moved
    with contextlib.suppress(*DAMAGE):
        _load(moved)
        if not entry.exists():
            moved.rename(entry)
            return
    shutil.rmtree(moved, ignore_errors=True)
