"""The teacher's own text in place of the data's responses: sequence-level distillation (arXiv 1606.07947).

It is generated once and kept in files of some hundred rows each. A run that is stopped while it generates loses the
rows of one file at most.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from toolkit.batch import Example
from toolkit.models.identity import RunIdentity
from toolkit.ranks import collectives
from toolkit.rollout.local import GatheredRollout, SeededSampling, sequence_seed
from toolkit.settings import RunConfig, SamplingSettings
from toolkit.storage.appear import new_file

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
    found: list[Example] = []
    for first in range(0, len(examples), FILE_ROWS):
        rows, file = examples[first : first + FILE_ROWS], folder / f"{first:09d}.npz"
        if collectives.everywhere(file.is_file()):
            responses = collectives.together(partial(_read, file, len(rows)))
        else:
            between_files()
            responses = _answered([row.prompt for row in rows], first, rollout, config)
            collectives.from_main_rank(partial(_write, file, responses))
        found += [
            Example(np.concatenate([row.prompt, response]), row.prompt_length)
            for row, response in zip(rows, responses, strict=True)
        ]
    return found


def text_folder(cache_dir: Path, identity: RunIdentity, config: RunConfig) -> Path:
    """Where the text of this teacher, data and sampling is kept: its name is a hash of all that decides the text."""
    sampling = {field.name: getattr(config.rollout, field.name) for field in dataclasses.fields(SamplingSettings)}
    data_sha256 = identity["data_sha256"].split()[0]  # the second hash, if any, is that of plain text learned beside it
    teacher = identity["teacher_sha256"], identity["precision"]
    parts = [*teacher, data_sha256, sampling, config.max_new_tokens, config.seed]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir / f"teacher-text-{key}"


def _answered(
    prompts: Sequence[np.ndarray], first: int, rollout: GatheredRollout, config: RunConfig
) -> list[np.ndarray]:
    """The responses' ids [T] to these prompts, of which `first` is the row of the first one. Collective."""
    rank, world = collectives.rank(), collectives.world()
    # Rows are dealt over the ranks like cards, so that all ranks have about as much to do.
    own = range(rank, len(prompts), world)
    seeds = [sequence_seed(config.seed, 0, first + row) for row in own]
    sampling = SeededSampling.of(config.rollout, config.max_new_tokens, seeds)
    answers = [example.response for example in rollout.complete([prompts[row] for row in own], sampling)]
    dealt = collectives.gather_objects(answers)
    return [dealt[row % world][row // world] for row in range(len(prompts))]


def _write(file: Path, responses: Sequence[np.ndarray]) -> None:
    # Two jobs may make the same text at once. A text that a power cut spoils is noticed when it is read.
    with new_file(file, durable=False, is_shared=True) as unfinished, unfinished.open("wb") as out:
        np.savez(out, tokens=np.concatenate(responses).astype(np.int32), lengths=[len(text) for text in responses])


def _read(file: Path, count: int) -> list[np.ndarray]:
    """The responses in `file`. Raises ValueError where it is damaged or does not hold `count` of them."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            tokens, lengths = stored["tokens"], stored["lengths"]
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{file}, teacher's text, cannot be read ({error}); delete it, it is made again") from error
    if len(lengths) != count or lengths.sum() != len(tokens):
        raise ValueError(
            f"{file} holds {len(lengths)} texts of {lengths.sum()} tokens, of which {len(tokens)} are there, and "
            f"{count} texts are wanted; delete it, it is made again"
        )
    return np.split(tokens, np.cumsum(lengths)[:-1])
