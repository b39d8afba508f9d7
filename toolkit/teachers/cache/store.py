"""A cache on disk: memory-mapped shards, an index from text to place, and a manifest that says what it belongs to.

A folder of `shard-000012.safetensors` files and `manifest.json`. What is found is a text: its tokens, which of them are
predicted, and the temperature are its key. So rows may be sorted, packed or dealt over ranks as they like.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from transformers import PreTrainedTokenizerBase

from toolkit.batch import TokenBatch
from toolkit.divergences import TopKTeacher
from toolkit.models import Vocabulary
from toolkit.ranks import heartbeat
from toolkit.settings import ModelConfig
from toolkit.storage.differences import differences, refuse
from toolkit.storage.manifest import MANIFEST, check_files, entries, read_manifest
from toolkit.storage.tensors import mapped
from toolkit.teachers.cache.forms import Arrays, Form

FORMAT = 1
#: Shards that stay mapped: to open one takes 0.2 ms, to read a text of an open one 5 microseconds. There is a limit
#: because a kernel that promises no memory which it does not have counts them as memory (vm.overcommit_memory = 2).
OPEN_SHARDS = 1024


class CacheIdentity(TypedDict, total=False):
    """What a manifest says of the run that the cache is for. teacher_random: shape, layers and seed of a teacher of
    random weights, which has no files."""

    data_sha256: str
    vocabulary_size: int
    vocabulary_sha256: str
    temperature: float
    teacher_path: str
    teacher_sha256: dict[str, str]
    teacher_random: dict[str, Any] | None
    precision: str


IDENTITY = tuple(CacheIdentity.__annotations__)


class Text(NamedTuple):
    """key: 64 bits, so that two of ten million texts share one with a chance of 3e-6. targets: its predicted tokens."""

    key: int
    targets: int


def texts_of(batch: TokenBatch, temperature: float) -> list[Text]:
    """The texts of a batch in the order of its targets, without those in which nothing is predicted."""
    parts = batch.input_ids_BT, batch.attention_mask_BT, batch.predicts_BT
    ids_BT, mask_BT, predicts_BT = (tensor.cpu().numpy() for tensor in parts)
    positions_BT = None if batch.position_ids_BT is None else batch.position_ids_BT.cpu().numpy()
    # A row may hold several texts: positions begin anew with each. The key is a hash of what the answer depends on.
    found = []
    for b, length in enumerate(mask_BT.sum(1)):
        starts = [0] if positions_BT is None else np.flatnonzero(positions_BT[b, :length] == 0).tolist()
        for start, end in itertools.pairwise([*starts, int(length)]):
            predicts = predicts_BT[b, start:end]
            if targets := int(predicts.sum()):
                head = f"{float(temperature)!r} {end - start} {predicts.argmax()} {targets} "
                content = head.encode() + ids_BT[b, start:end].astype(np.int32).tobytes()
                digest = hashlib.blake2b(content, digest_size=8).digest()
                found.append(Text(int.from_bytes(digest, "little", signed=True), targets))
    return found


class TeacherCache:
    """A finished cache: its manifest, and once `read_index` was called, its answers. The last `OPEN_SHARDS` shards that
    were read stay mapped; processes of a machine share the pages.

    Raises ValueError where `folder` holds none, or its manifest is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not self.is_in(folder):
            raise ValueError(
                f"no finished teacher cache in {folder}; make one with: python -m toolkit cache-teacher RECIPE "
                f"--top-k 64 --out {folder}"
            )

        # Whatever is wrong with the manifest, the message is the same.
        self.manifest = read_manifest(folder, FORMAT)
        try:
            self.identity = self.manifest["identity"]
            self.form = Form(**self.identity["form"])
            self._files = entries(self.manifest)
            if lacking := [name for name in IDENTITY if name not in self.identity]:
                raise KeyError(lacking[0])
            sums = [self.manifest[name] for name in ("texts", "positions", "bytes")]
            if not self._files or not all(isinstance(value, int) for value in sums):
                raise TypeError(f"{len(self._files)} files; texts, positions, bytes = {sums}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / MANIFEST} does not say what a teacher cache's says ({type(error).__name__}: {error}): it "
                "is damaged; delete the folder and make the cache again"
            ) from error

        # Shards are opened when a text of theirs is asked for.
        self.vocabulary_size = self.identity["vocabulary_size"]
        self._paths = [folder / name for name in sorted(self._files)]
        self._shard = functools.lru_cache(OPEN_SHARDS)(read_shard)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether it is there and finished."""
        return (folder / MANIFEST).is_file()

    def check(self, share: int = 0, shares: int = 1) -> None:
        """Raises ValueError, naming file and both values, for a file that is not the manifest's. Sizes of all files,
        hashes of every `shares`-th from `share` on. No communication."""
        check_files(self.folder, self._files, share, shares)

    def read_index(self) -> None:
        """Reads the keys of all texts, so that `signal` finds them. Raises ValueError for a file that is no shard."""
        keys, shards, rows = [], [], []
        for number, path in enumerate(self._paths):
            own = read_shard(path)["keys"].copy()  # so that no shard stays mapped
            keys.append(own)
            shards.append(np.full(len(own), number, np.int32))
            rows.append(np.arange(len(own), dtype=np.int32))
        joined = np.concatenate(keys)
        # Sorted, a key is found by bisection: in memory for each text are its key, its shard and its row, 16 bytes.
        order = np.argsort(joined, kind="stable")
        self._keys = joined[order]
        self._shard_of, self._row_of = np.concatenate(shards)[order], np.concatenate(rows)[order]

    @property
    def sha256(self) -> str:
        """Of all that is in it: equal for two copies, however they were built."""
        content = {name: entry["sha256"] for name, entry in self._files.items()}
        return hashlib.sha256(json.dumps([self.identity["form"], content], sort_keys=True).encode()).hexdigest()

    def check_belongs(self, found: Mapping[str, Any]) -> None:
        """Raises ValueError, with both values, unless what is known of a run is as the manifest says.

        found: an identity as far as it is known, for instance from `identity_of`. Of a teacher that is not loaded some
        files may not be here; those that are have to be the cache's.
        """
        theirs = {name: value for name, value in self.identity.items() if name in found and name != "teacher_sha256"}
        ours = {name: value for name, value in found.items() if name != "teacher_sha256"}
        lines = list(differences(theirs, ours, "{}: {!r} in the cache, {!r} in the run").values())
        files = found.get("teacher_sha256", {})
        teacher = {name: self.identity["teacher_sha256"].get(name) for name in files}
        for line in differences(teacher, files, "{}: {!s:.16} in the cache, {!s:.16} in the run").values():
            lines.append(f"the teacher's {line} (of {self.identity['teacher_path']!r} in the cache)")
        refuse(
            f"the teacher cache {self.folder} is another run's",
            lines,
            'set these back, make a cache for this run, or train without one (teacher.cache="")',
        )

    def signal(self, batch: TokenBatch, temperature: float) -> TopKTeacher:
        """The teacher at the batch's targets, on its device.

        Raises ValueError for a text that is not in the cache.
        """
        # Bisection finds where each text lies.
        texts = texts_of(batch, temperature)
        wanted = np.array([text.key for text in texts], np.int64)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        missing = np.flatnonzero(self._keys[at] != wanted)
        if len(missing):
            where = f"the teacher cache {self.folder} at temperature {temperature}"
            raise ValueError(f"{len(missing)} of {len(texts)} texts of a micro-batch are not in {where}")

        # The loss takes their answers one after the other.
        parts = [self._answer(self._shard_of[i], self._row_of[i]) for i in at]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        signal = self.form.signal(joined, self.vocabulary_size)
        assert len(signal.ids_NK) == batch.num_targets
        device = batch.input_ids_BT.device
        return signal.map(lambda x: x.to(device, non_blocking=True))

    def _answer(self, shard: int, row: int) -> Arrays:
        """Copies of what is stored of one text: its positions, and ("U_...") the ids of all of them together."""
        arrays = self._shard(self._paths[shard])
        first, first_id = (0, 0) if row == 0 else (arrays["ends"][row - 1], arrays["U_ends"][row - 1])
        end, end_id = arrays["ends"][row], arrays["U_ends"][row]
        return {
            name: np.array(array[first_id:end_id] if name.startswith("U_") else array[first:end])
            for name, array in arrays.items()
            if name not in ("keys", "ends", "U_ends")
        }


class CachedTeacher:
    """Stands where a Teacher would for texts that are in a cache. It communicates with nobody."""

    kind = "cache"

    def __init__(self, cache: TeacherCache, temperature: float):
        self.cache, self.temperature = cache, temperature

    def signals(self, window: list[TokenBatch]) -> list[TopKTeacher]:
        """For each micro-batch its stored top k or draws, in the order of `targets_N`.

        Raises ValueError for a text that is not in the cache."""
        return [self.cache.signal(batch, self.temperature) for batch in window]

    @contextmanager
    def head(self) -> Iterator[None]:
        """Of a live teacher this is the gathered output projection. Stored answers need none."""
        yield None


def read_shard(path: Path) -> Arrays:
    """The arrays of a shard by name, mapped and not read. The watchdog hears of each. Raises ValueError for another
    file."""
    heartbeat.beat()
    try:
        return {name: tensor.numpy() for name, tensor in mapped(path).items()}
    except ValueError as error:
        raise ValueError(f"{path} is no shard of a teacher cache: {error}; delete it, it is made again") from error


def identity_of(
    teacher: ModelConfig, seed: int, teacher_sha256: Mapping[str, str], data_sha256: str,
    tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, temperature: float,
) -> CacheIdentity:  # fmt: skip
    """What a cache and a run that reads it have to share; plain JSON types. seed: the run's, which random weights are
    drawn by. Of a teacher that is not named, or whose files are not here, it says nothing."""
    found: CacheIdentity = {
        "data_sha256": data_sha256,
        "vocabulary_size": vocabulary.size,
        "vocabulary_sha256": vocabulary_sha256(tokenizer),
        "temperature": float(temperature),
    }
    if teacher_sha256 or teacher.random_weights:
        found["teacher_sha256"] = dict(sorted(teacher_sha256.items()))
        drawn = {"shape": teacher.shape, "num_layers": teacher.num_layers, "seed": seed}
        found["teacher_random"] = drawn if teacher.random_weights else None
    return found


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of every entry and its id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
