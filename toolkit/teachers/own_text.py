"""The teacher's own text in place of the data's responses: sequence-level distillation (arXiv 1606.07947).

It is generated once and kept in files of some hundred rows each. A file appears by rename, so a run that is stopped
while it generates loses one file's rows at most.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.batch import Example
from toolkit.ranks import collectives
from toolkit.rollout.local import GatheredRollout, SeededSampling, sequence_seed
from toolkit.settings import RunConfig, SamplingSettings

FILE_ROWS = 512


def teacher_text(
    examples: Sequence[Example], rollout: GatheredRollout, config: RunConfig, folder: Path,
    between_files: Callable[[], None] = lambda: None,
) -> list[Example]:  # fmt: skip
    """`examples` with the teacher's responses, order kept, equal on all ranks. Collective.

    rollout: the teacher's. Each row has its own seed, so its text depends on no rank layout. between_files is called
    before each file that has to be made; what it raises passes through. Raises ValueError on every rank where a file
    cannot be read or written.
    """
    rank, world, found = collectives.rank(), collectives.world(), []
    for first in range(0, len(examples), FILE_ROWS):
        rows, file = examples[first : first + FILE_ROWS], folder / f"{first:09d}.npz"
        if not collectives.everywhere(file.is_file()):
            between_files()
            own = range(rank, len(rows), world)
            seeds = [sequence_seed(config.seed, 0, first + row) for row in own]
            sampling = SeededSampling.of(config.rollout, config.max_new_tokens, seeds)
            answers = [e.response for e in rollout.complete([rows[row].prompt for row in own], sampling)]
            dealt = collectives.gather_objects(answers)
            responses = [dealt[row % world][row // world] for row in range(len(rows))]
            collectives.together(lambda file=file, texts=responses: _write(file, texts) if rank == 0 else None)
        else:
            responses = collectives.together(lambda file=file, rows=rows: _read(file, len(rows)))
        found += [
            Example(np.concatenate([row.prompt, response]), row.prompt_length)
            for row, response in zip(rows, responses, strict=True)
        ]
    return found


def text_folder(cache_dir: Path, identity: dict[str, Any], config: RunConfig) -> Path:
    """Where the text of this teacher, data and sampling is kept. identity: toolkit.run.checkpoint.identity's."""
    sampling = {field.name: getattr(config.rollout, field.name) for field in dataclasses.fields(SamplingSettings)}
    data_sha256 = identity["data_sha256"].split()[0]  # without that of the plain text beside it
    parts = [
        identity["teacher_sha256"], identity["precision"], data_sha256, sampling, config.max_new_tokens, config.seed
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir / f"teacher-text-{key}"


def _write(file: Path, responses: Sequence[np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two jobs may make the same text; not the process id: containers that share a cache repeat it.
    unfinished = file.with_name(f"{file.stem}.{secrets.token_hex(8)}.unfinished")
    try:
        with unfinished.open("wb") as out:
            np.savez(out, tokens=np.concatenate(responses).astype(np.int32), lengths=[len(text) for text in responses])
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(file: Path, count: int) -> list[np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            tokens, lengths = stored["tokens"], stored["lengths"]
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise ValueError(
            f"{file} with the teacher's text cannot be read ({error}); delete it, it is made again"
        ) from error
    if len(lengths) != count or lengths.sum() != len(tokens):
        raise ValueError(
            f"{file} holds {len(lengths)} texts of {lengths.sum()} tokens, of which {len(tokens)} are there, and "
            f"{count} texts are wanted; delete it, it is made again"
        )
    return np.split(tokens, np.cumsum(lengths)[:-1])
