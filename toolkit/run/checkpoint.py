"""Checkpoints that are whole or absent, and what may change between a run and its continuation.

A checkpoint is a folder `step-00000123` of one safetensors file a rank, `state.json`, and `manifest.json` with the size
and SHA-256 of each. Ranks write beside it (`.unfinished`), read back what they wrote, and one rename makes it the
newest. Nothing in it is pickled. All ranks have to see the same folder.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from toolkit.models.identity import file_hashes
from toolkit.models.shards import WEIGHTS, Piece, load_pieces, optimizer_scalars, pieces
from toolkit.ranks import collectives
from toolkit.rollout.replay import ReplayBuffer, deal
from toolkit.run.random_state import load_rng_state, rng_state
from toolkit.seeds import philox
from toolkit.settings import RunConfig, free_settings
from toolkit.storage.appear import to_disk
from toolkit.storage.manifest import MANIFEST, check_files, read_json, sha256, write_checked, write_json

FORMAT = 1
STATE = "state.json"
NAME = re.compile(r"step-(\d{8})")
REPLAY, RNG = "replay", "rng"
MICRO_BATCH = ("train.micro_rows", "train.micro_tokens")


class Checkpoints:
    """The checkpoints in `folder`, of which the newest `keep` stay. Every method is collective.

    A failure, a full disk for instance, is a ValueError on every rank, and leaves the older checkpoints as they are.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, step: int, engine: Any, replay: ReplayBuffer, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`: the student, its optimizer, replay and RNGs of every rank, and `state` (of
        rank 0, plain JSON types). Older ones are pruned after this one was read back and renamed."""
        final = self.folder / f"step-{step:08d}"
        unfinished = final.with_name(final.name + ".unfinished")
        is_main, own = collectives.rank() == 0, rank_file(collectives.rank())
        try:
            collectives.together(lambda: _empty_folder(unfinished) if is_main else None)
            tensors = [(piece.key, piece.tensor) for piece in pieces(engine)]
            tensors += [(f"{REPLAY}/{name}", torch.from_numpy(a)) for name, a in replay.state_dict().items()]
            tensors += [(f"{RNG}/{name}", value) for name, value in rng_state().items()]
            entry = collectives.together(lambda: write_checked(unfinished / own, tensors))
            files = dict(collectives.gather_objects((own, entry)))
            scalars = optimizer_scalars(engine)
            collectives.together(
                lambda: _finish(unfinished, final, step, files, {**state, "optimizer": scalars}) if is_main else None
            )
        except ValueError as error:
            if is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise collectives.Told(f"no checkpoint of step {step} in {self.folder}: {error}") from error
        collectives.together(lambda: self._prune(step) if is_main else None)
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and what was wrong with newer ones. Files are hashed, dealt over the ranks.

        Raises ValueError where there are checkpoints and none is whole.
        """
        passed_over: list[str] = []
        listed = collectives.together(lambda: sorted(self._steps(), reverse=True))
        for step in collectives.gather_objects(listed)[0]:  # a network file system may show ranks different folders
            found = Checkpoint(self.folder / f"step-{step:08d}")
            try:
                collectives.together(lambda found=found: found.check(collectives.rank(), collectives.world()))
                return found, passed_over
            except ValueError as error:
                passed_over.append(str(error))
        if passed_over:
            raise ValueError(
                "no whole checkpoint to resume from:\n  "
                + "\n  ".join(passed_over)
                + "\nset resume=never to start over"
            )
        return None, passed_over

    def clear(self) -> None:
        """Delete all of them: the run starts over."""
        collectives.together(lambda: self._delete(self._steps()) if collectives.rank() == 0 else None)

    def _steps(self) -> list[int]:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [int(match[1]) for name in names if (match := NAME.fullmatch(name))]

    def _prune(self, newest: int) -> None:
        """Keeps `newest` and the ones before it; what lies after it is of a future that was passed over."""
        kept = sorted((step for step in self._steps() if step <= newest), reverse=True)[: self.keep]
        self._delete([step for step in self._steps() if step not in kept])

    def _delete(self, steps: Iterable[int]) -> None:
        for step in steps:
            doomed = self.folder / f"step-{step:08d}.deleting"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(self.folder / f"step-{step:08d}", doomed)  # a kill may not leave half a checkpoint under its name
        for ending in ("deleting", "unfinished"):  # what a kill left behind
            for leftover in self.folder.glob(f"step-*.{ending}"):
                shutil.rmtree(leftover, ignore_errors=True)


class Checkpoint:
    """One checkpoint on disk. `check` it before anything else is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}

    def check(self, share: int = 0, shares: int = 1) -> None:
        """Raises ValueError, naming file and both values, unless the files are those of the manifest. Sizes are
        compared for all files, hashes for every `shares`-th. No communication."""
        manifest = self._json(MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{self.folder} has format {manifest.get('format')!r}, this version reads {FORMAT}")
        try:
            wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.folder / MANIFEST} does not list files, bytes and hashes: it is damaged"
            ) from error
        needed = dict.fromkeys((STATE, rank_file(0)), (None, None))
        check_files(self.folder, needed | wanted, share, shares)

    @property
    def state(self) -> dict[str, Any]:
        return self._json(STATE)

    @property
    def world(self) -> int:
        """Ranks of the run that wrote it."""
        return sum(name.startswith("rank-") for name in self._json(MANIFEST)["files"])

    def load_student(self, engine: Any) -> None:
        """Weights and optimizer states, whatever the ranks and the ZeRO stage were. Collective.

        Raises ValueError for a parameter that is missing or of another size.
        """
        index: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        kinds: set[str] = set()

        def make_index() -> None:
            for rank in range(self.world):
                name = rank_file(rank)
                for key in self._open(name).keys():  # noqa: SIM118 (safe_open is not a dict)
                    kind, _, rest = key.partition("/")
                    parameter, at, start = rest.rpartition("@")
                    if at:
                        (length,) = self._open(name).get_slice(key).get_shape()
                        index.setdefault((kind, parameter), []).append((int(start), length, name, key))
                        kinds.add(kind)
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    found = sum(length for _, length, *_ in index.get((WEIGHTS, name), []))
                    wanted = getattr(parameter, "ds_numel", parameter.numel())
                    if found != wanted:
                        raise ValueError(
                            f"{self.folder} holds {found} elements of the student's {name}, which has {wanted}: "
                            "the checkpoint is of another model"
                        )

        def read(piece: Piece) -> None:
            end = piece.start + len(piece.tensor)
            for start, length, file, key in index.get((piece.kind, piece.name), []):
                first, last = max(start, piece.start), min(start + length, end)
                if first < last:
                    part = self._open(file).get_slice(key)[first - start : last - start]
                    piece.tensor[first - piece.start : last - piece.start].copy_(part)

        collectives.together(make_index)
        with torch.no_grad():
            load_pieces(engine, sorted(kinds - {WEIGHTS}), self.state["optimizer"], read)

    def load_replay(self, replay: ReplayBuffer) -> None:
        """This rank's shard, or its part of all shards dealt out again. No communication."""
        if self.world == replay.world:
            replay.load_state_dict(self._group(replay.rank, REPLAY))
        else:
            states = [self._group(rank, REPLAY) for rank in range(self.world)]
            replay.load_state_dict(deal(states, replay.capacity, replay.rank, replay.world))

    def load_rng(self, seed: int, step: int) -> None:
        """The generators as they were on this rank; on another number of ranks, seeded anew for each from the step."""
        rank, world = collectives.rank(), collectives.world()
        if self.world == world:
            load_rng_state({name: torch.from_numpy(a) for name, a in self._group(rank, RNG).items()})
        else:
            drawn = int(philox(seed, step, rank).random_raw())
            torch.manual_seed(drawn)
            np.random.seed(drawn % 2**32)
            random.seed(drawn)

    def _group(self, rank: int, group: str) -> dict[str, np.ndarray]:
        file = self._open(rank_file(rank))
        names = [key for key in file.keys() if key.startswith(group + "/")]  # noqa: SIM118 (safe_open is not a dict)
        return {name.removeprefix(group + "/"): file.get_tensor(name).numpy().copy() for name in names}

    def close(self) -> None:
        """Let go of its files: while they are mapped, a checkpoint that is pruned keeps its room on the disk."""
        self._files.clear()

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.folder / name} is not a safetensors file: {error}") from error
        return self._files[name]

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name)


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def identity(teacher_path: str, data_sha256: str, dtype: torch.dtype, base_path: str = "") -> dict[str, Any]:
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


def compare(saved: Mapping[str, Any], config: RunConfig, found: Mapping[str, Any]) -> list[str]:
    """What changed since the checkpoint whose state is `saved`, a line each, where it may change: places, layout,
    limits, how often to save. Where such settings name a model or data, what is there is compared by its contents.

    Raises ValueError, with every such difference, where a change would make the run a different one.
    """
    free, refused = [], []
    written = RunConfig.with_present_names(saved["config"])
    before, now, default = (_flat(part) for part in (written, config.to_dict(), RunConfig().to_dict()))
    for name in sorted(before.keys() | now.keys()):
        old = before.get(name, _value_before(name, before, default))
        new = now.get(name)
        if old != new:
            # alpha_per_sequence holds each text against the others of its micro-batch
            is_free = name in free_settings() and not (name in MICRO_BATCH and config.loss.alpha_per_sequence)
            (free if is_free else refused).append(f"{name} was {old!r}, is {new!r}")
    old = saved["identity"]
    if old["precision"] != found["precision"]:
        refused.append(f"precision was {old['precision']}, is {found['precision']}")
    if old["data_sha256"] != found["data_sha256"]:
        refused.append(
            f"the tokens of {config.data.source} had SHA-256 {old['data_sha256'][:16]}..., have "
            f"{found['data_sha256'][:16]}...: rows, tokenizer or template are others"
        )
    caches = old.get("teacher_cache"), found.get("teacher_cache")
    if caches[0] != caches[1]:
        refused.append(f"the teacher cache had SHA-256 {str(caches[0])[:16]}, has {str(caches[1])[:16]}")
    for part, label in (("teacher", "the teacher's"), ("base", "the student's before training:")):
        files, files_now = old.get(f"{part}_sha256", {}), found[f"{part}_sha256"]
        if part == "base" and not files:
            continue  # an older checkpoint of a student without adapters, or one that began at random
        for name in sorted(files.keys() | files_now.keys()):
            if files.get(name) != files_now.get(name):
                refused.append(
                    f"{label} {name} had SHA-256 {str(files.get(name))[:16]}, has {str(files_now.get(name))[:16]} "
                    f"({old[f'{part}_path']} before, {found[f'{part}_path']} now)"
                )
    if refused:
        raise ValueError(
            "the run cannot go on from its checkpoint, it would become a different one:\n  "
            + "\n  ".join(refused)
            + "\nset these back, give the new run a name of its own (name=...), or start over with resume=never"
        )
    return free


def _value_before(name: str, before: Mapping[str, Any], default: Mapping[str, Any]) -> Any:
    """What a setting that is newer than a checkpoint was in the run that wrote it: mostly what is its default now."""
    if name == "loss.student_text_cross_entropy_weight" and before.get("schedule.policy") != "off":
        return before.get("loss.cross_entropy_weight", default[name])  # one weight was that of both texts
    return default.get(name)


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(unfinished: Path, final: Path, step: int, files: dict[str, Any], state: dict[str, Any]) -> None:
    write_json(unfinished / STATE, state)
    files[STATE] = {"bytes": (unfinished / STATE).stat().st_size, "sha256": sha256(unfinished / STATE)}
    write_json(unfinished / MANIFEST, {"format": FORMAT, "step": step, "files": files})
    to_disk(unfinished)
    if final.exists():  # the damaged one that this run was resumed before
        doomed = final.with_name(final.name + ".deleting")
        shutil.rmtree(doomed, ignore_errors=True)
        final.rename(doomed)
    unfinished.rename(final)
    to_disk(final.parent, *final.parent.parents[:2])  # the run's folder may be new as well


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        # A model's shape is one setting: its keys are not ours.
        found |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and name != "shape" else {prefix + name: value}
        )
    return found
