"""Checkpoints that are whole or absent, and what may change between a run and its continuation.

A checkpoint is a folder `step-00000123` of one safetensors file for each rank, `state.json`, and `manifest.json` with
the size and SHA-256 of each. The ranks write into a folder beside it and read back what they wrote; rank 0 renames it,
and it is the newest checkpoint. Nothing in it is pickled. All ranks have to see the same folder.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.models.identity import RunIdentity, file_hashes
from toolkit.models.shards import WEIGHTS, Piece, load_pieces, optimizer_scalars, pieces
from toolkit.models.zero import whole_numel
from toolkit.ranks import collectives
from toolkit.rollout.replay import ReplayBuffer, deal
from toolkit.run.random_state import load_rng_state, rng_state
from toolkit.seeds import philox
from toolkit.settings import RunConfig, free_settings
from toolkit.storage import manifest
from toolkit.storage.appear import DELETING, UNFINISHED, emptied, give_name, remove, unfinished_name
from toolkit.storage.differences import HASHES, differences, refuse
from toolkit.storage.manifest import MANIFEST, Entry, read_manifest
from toolkit.storage.tensors import mapped

FORMAT = 1
STATE = "state.json"
NAME = re.compile(r"step-(\d{8})")
#: prefixes of tensors' names in a rank's file, beside those of `Piece.key`
REPLAY, RNG = "replay/", "rng/"
MICRO_BATCH = ("train.rows_per_micro_batch", "train.tokens_per_micro_batch")


class Checkpoints:
    """The checkpoints in `folder`, of which the newest `keep` stay. Every method is collective.

    A failure, a full disk for instance, is a ValueError on every rank, and leaves the older checkpoints as they are.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, step: int, engine: Any, replay: ReplayBuffer, state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of `step` and returns its folder: the student, its optimizer, the replay buffer and
        random generators of every rank, and `state` (of rank 0, plain JSON types). Older ones are deleted after that.
        """
        final = self._folder(step)
        unfinished, own = unfinished_name(final), rank_file(collectives.rank())
        try:
            # Every rank writes a file of its own, and reads it back.
            collectives.from_main_rank(partial(emptied, unfinished))
            tensors = [(piece.key, piece.tensor) for piece in pieces(engine)]
            tensors += [(REPLAY + name, torch.from_numpy(array)) for name, array in replay.state_dict().items()]
            tensors += [(RNG + name, value) for name, value in rng_state().items()]
            entry = collectives.together(lambda: manifest.write_checked(unfinished / own, tensors))

            # Rank 0 adds what is alike on all ranks and gives the folder its name.
            files = dict(collectives.gather_objects((own, entry)))
            whole_state = {**state, "optimizer": optimizer_scalars(engine)}
            collectives.from_main_rank(partial(_finish, unfinished, final, step, files, whole_state))
        except ValueError as error:
            if collectives.rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise collectives.Told(f"no checkpoint of step {step} in {self.folder}: {error}") from error
        collectives.from_main_rank(partial(self._prune, step))
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and what was wrong with newer ones. Files are hashed, dealt over the ranks.

        Raises ValueError where there are checkpoints and none is whole.
        """
        passed_over: list[str] = []
        listed = collectives.together(lambda: sorted(self._steps(), reverse=True))
        for step in collectives.gather_objects(listed)[0]:  # a network file system may show ranks different folders
            found = Checkpoint(self._folder(step))
            try:
                collectives.together(partial(found.check, collectives.rank(), collectives.world()))
                return found, passed_over
            except ValueError as error:
                passed_over.append(str(error))
        refuse("no whole checkpoint to resume from", passed_over, "set resume=never to start over")
        return None, passed_over

    def clear(self) -> None:
        """Deletes all of them: the run starts over."""
        collectives.from_main_rank(lambda: self._delete(self._steps()))

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [int(match[1]) for name in names if (match := NAME.fullmatch(name))]

    def _prune(self, newest: int) -> None:
        """Keeps `newest` and the ones before it. Later ones are damaged: the run went on from an older one."""
        kept = sorted((step for step in self._steps() if step <= newest), reverse=True)[: self.keep]
        self._delete([step for step in self._steps() if step not in kept])

    def _delete(self, steps: Iterable[int]) -> None:
        """Deletes these, and what jobs that were killed left of others."""
        for step in steps:
            remove(self._folder(step))
        for ending in (DELETING, UNFINISHED):
            for leftover in self.folder.glob(f"step-*{ending}"):
                shutil.rmtree(leftover, ignore_errors=True)


class Checkpoint:
    """One checkpoint on disk. `check` it before anything else is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[int, dict[str, Tensor]] = {}

    def check(self, share: int = 0, shares: int = 1) -> None:
        """Raises ValueError, naming file and both values, unless the files are those of the manifest. Sizes are
        compared for all files, hashes for every `shares`-th from `share` on. No communication."""
        listed = read_manifest(self.folder, FORMAT)
        try:
            files = manifest.entries(listed)
            if not files.keys() >= {STATE, rank_file(0)}:
                raise KeyError(STATE)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.folder / MANIFEST} lists no files, bytes and hashes: it is damaged") from error
        manifest.check_files(self.folder, files, share, shares)

    @property
    def state(self) -> dict[str, Any]:
        """What `save` was given, with what the optimizer knows beside its tensors. Raises ValueError if unreadable."""
        return manifest.read_json(self.folder / STATE)

    @property
    def world(self) -> int:
        """Ranks of the run that wrote it."""
        return sum(name.startswith("rank-") for name in manifest.read_json(self.folder / MANIFEST)["files"])

    def load_student(self, engine: Any) -> None:
        """Weights and optimizer states, whatever the ranks and the ZeRO stage were. Collective.

        Raises ValueError for a parameter that is missing or of another size.
        """

        # All ranks look at all files first: a checkpoint of another model is refused before anything is loaded.
        def saved_pieces() -> dict[tuple[str, str], list[tuple[int, Tensor]]]:
            found = self._pieces()
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    held = sum(len(tensor) for _, tensor in found.get((WEIGHTS, name), []))
                    wanted = whole_numel(parameter)
                    if held != wanted:
                        of = f"{held} elements of the student's {name}, which has {wanted}"
                        raise ValueError(f"{self.folder} holds {of}: the checkpoint is of another model")
            return found

        saved = collectives.together(saved_pieces)

        # The ranges of a piece that was saved may differ from this one's: it takes what they have in common.
        def read(piece: Piece) -> None:
            end = piece.start + len(piece.tensor)
            for start, tensor in saved.get((piece.kind, piece.name), []):
                first, last = max(start, piece.start), min(start + len(tensor), end)
                if first < last:
                    part = tensor[first - start : last - start]
                    piece.tensor[first - piece.start : last - piece.start].copy_(part)

        with torch.no_grad():
            load_pieces(engine, sorted({kind for kind, _ in saved} - {WEIGHTS}), self.state["optimizer"], read)

    def load_replay(self, replay: ReplayBuffer) -> None:
        """This rank's shard, or its part of all shards dealt out again. No communication."""
        if self.world == replay.world:
            replay.load_state_dict(self._arrays(replay.rank, REPLAY))
        else:
            states = [self._arrays(rank, REPLAY) for rank in range(self.world)]
            replay.load_state_dict(deal(states, replay.capacity, replay.rank, replay.world))

    def load_rng(self, seed: int, step: int) -> None:
        """The generators as they were on this rank; on another number of ranks, seeded anew for each from the step."""
        rank, world = collectives.rank(), collectives.world()
        if self.world == world:
            load_rng_state({name: torch.from_numpy(array) for name, array in self._arrays(rank, RNG).items()})
        else:
            drawn = int(philox(seed, step, rank).random_raw())
            torch.manual_seed(drawn)
            np.random.seed(drawn % 2**32)
            random.seed(drawn)

    def close(self) -> None:
        """Lets go of its files: while they are mapped, a checkpoint that is deleted keeps its room on the disk."""
        self._files.clear()

    def _pieces(self) -> dict[tuple[str, str], list[tuple[int, Tensor]]]:
        """(kind, parameter) -> its pieces in all ranks' files: where each starts, and its elements."""
        found: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        for rank in range(self.world):
            for key, tensor in self._tensors(rank).items():
                kind, _, rest = key.partition("/")
                parameter, at, start = rest.rpartition("@")
                if at:  # replay buffer and generators have no @ in their names
                    found.setdefault((kind, parameter), []).append((int(start), tensor))
        return found

    def _arrays(self, rank: int, prefix: str) -> dict[str, np.ndarray]:
        """Copies of the tensors of that rank whose names begin with `prefix`, by the rest of their names."""
        tensors = self._tensors(rank)
        return {key.removeprefix(prefix): t.numpy().copy() for key, t in tensors.items() if key.startswith(prefix)}

    def _tensors(self, rank: int) -> dict[str, Tensor]:
        if rank not in self._files:
            self._files[rank] = mapped(self.folder / rank_file(rank))
        return self._files[rank]


def rank_file(rank: int) -> str:
    """The name of that rank's file in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def identity(teacher_path: str, data_sha256: str, dtype: torch.dtype, base_path: str = "") -> RunIdentity:
    """What a run is made of beside its settings: the teacher's files, every token of the data (as its hash), the
    precision, and at `base_path` the files of the student that it starts from.

    The files are hashed, dealt over the ranks. Collective.
    """
    return {
        "teacher_path": teacher_path,
        "teacher_sha256": file_hashes(teacher_path),
        "base_path": base_path,
        "base_sha256": file_hashes(base_path),
        "data_sha256": data_sha256,
        "precision": str(dtype).removeprefix("torch."),
    }


def compare(saved: Mapping[str, Any], config: RunConfig, found: RunIdentity) -> list[str]:
    """What changed since the checkpoint whose state is `saved`, a line each, where it may change: places, layout,
    limits, how often to save. Where such settings name a model or data, what is there is compared by its contents.

    saved: with the run's "config" and "identity" as they were. Raises ValueError, with every such difference, where a
    change would make the run a different one.
    """
    # Settings that are newer than the checkpoint get the value that its run had without knowing of them.
    written = RunConfig.with_present_names(saved["config"])
    before, now, default = (_flat(part) for part in (written, config.to_dict(), RunConfig().to_dict()))
    newer = {name: _value_before(name, before, default) for name in now.keys() - before.keys()}

    # Each difference is allowed or refused. An alpha of each sequence depends on the size of its micro-batch.
    free: list[str] = []
    refused: list[str] = []
    for name, line in differences(before | newer, now).items():
        is_bound = config.loss.alpha_per_sequence and name in MICRO_BATCH
        (free if name in free_settings() and not is_bound else refused).append(line)
    refuse(
        "the run cannot go on from its checkpoint, it would become a different one",
        refused + _changed_contents(saved["identity"], found, config.data.source),
        "set these back, give the new run a name of its own (name=...), or start over with resume=never",
    )
    return free


def _changed_contents(old: RunIdentity, found: RunIdentity, source: str) -> list[str]:
    """What differs between the contents of two runs, a line each. source: the data's name."""

    def changed(name: str, before: object, now: object, form: str) -> list[str]:
        return list(differences({name: before}, {name: now}, form).values())

    lines = changed("precision", old["precision"], found["precision"], "{} was {}, is {}")
    lines += changed(
        f"the tokens of {source}", old["data_sha256"], found["data_sha256"],
        "{} had SHA-256 {:.16}..., have {:.16}...: rows, tokenizer or template are others",
    )  # fmt: skip
    lines += changed("the teacher cache", old.get("teacher_cache"), found.get("teacher_cache"), HASHES)
    paths = old.get("teacher_path"), found.get("teacher_path")
    for line in differences(old.get("teacher_sha256", {}), found["teacher_sha256"], HASHES).values():
        lines.append(f"the teacher's {line} ({paths[0]} before, {paths[1]} now)")
    # An older checkpoint may not say of which files its student began.
    if bases := old.get("base_sha256"):
        paths = old["base_path"], found["base_path"]
        for line in differences(bases, found["base_sha256"], HASHES).values():
            lines.append(f"the student's before training: {line} ({paths[0]} before, {paths[1]} now)")
    return lines


def _value_before(name: str, before: Mapping[str, Any], default: Mapping[str, Any]) -> Any:
    """What a setting that is newer than a checkpoint was in the run that wrote it: mostly what is its default now."""
    if name == "loss.student_text_cross_entropy_weight" and before.get("schedule.policy") != "off":
        return before.get("loss.cross_entropy_weight", default[name])  # one weight was that of both texts
    return default.get(name)


def _finish(unfinished: Path, final: Path, step: int, files: dict[str, Entry], state: Mapping[str, Any]) -> None:
    """Completes the folder that all ranks have written into, and gives it its name.

    An older folder of that name goes: it is the damaged one that this run was resumed before.
    """
    manifest.write_json(unfinished / STATE, state, durable=False)  # the folder as a whole goes to disk below
    listed = {**files, STATE: manifest.entry_of(unfinished / STATE)}
    manifest.write_json(unfinished / MANIFEST, {"format": FORMAT, "step": step, "files": listed}, durable=False)
    give_name(unfinished, final, durable=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} as {"train.steps": 3}. A model's shape is one setting: its keys are not ours."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, dict) and name != "shape"
        found |= _flat(value, f"{prefix}{name}.") if is_section else {prefix + name: value}
    return found
