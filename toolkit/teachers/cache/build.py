"""Making a cache: shards are planned from the data alone, dealt over the ranks, and kept across interruptions.

The plan, and so every byte, does not depend on the number of ranks. A folder `OUT.unfinished` holds the shards that are
done and `plan.json`, which says of what they are shards. Once all are there the folder gets its manifest and is renamed
to OUT.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from toolkit.batch import Example, TokenBatch
from toolkit.divergences import Head
from toolkit.models import Vocabulary
from toolkit.ranks import collectives, heartbeat
from toolkit.seeds import philox
from toolkit.storage.appear import UNFINISHED, give_name, new_file, unfinished_name
from toolkit.storage.differences import differences, refuse
from toolkit.storage.lock import LOCK, sole_use
from toolkit.storage.manifest import MANIFEST, Entry, entry_of, read_json, write_checked, write_json
from toolkit.teachers.cache.forms import Arrays, Form, log_prob_tiles
from toolkit.teachers.cache.store import FORMAT, Text, read_shard, texts_of
from toolkit.teachers.live import Teacher

PLAN = "plan.json"


class Pass(NamedTuple):
    """Examples of one text each that the teacher reads at once, at one temperature."""

    examples: list[Example]
    temperature: float


def plan(
    parts: Sequence[tuple[Sequence[Example], float]], pad_id: int, rows_per_pass: int, shard_tokens: int
) -> list[list[Pass]]:
    """The passes of each shard, of `rows_per_pass` texts at most; a shard ends with the pass that brings it to
    `shard_tokens` predicted tokens.

    parts: examples, and the temperature that the teacher is asked at. A block of several texts is taken apart, as none
    of them sees another, and a text that comes again is left out.
    """
    seen: set[int] = set()
    shards: list[list[Pass]] = []
    for examples, temperature in parts:
        kept: list[Example] = []
        for example in itertools.chain.from_iterable(map(_single_texts, examples)):
            heartbeat.beat()
            (text,) = texts_of(TokenBatch.from_examples([example], pad_id, 1), temperature)
            if text.key not in seen:
                seen.add(text.key)
                kept.append(example)
        # Sorted there is little padding, and shards that ranks work on side by side take about as long.
        kept.sort(key=lambda e: len(e.tokens))
        tokens = shard_tokens  # so that each part begins a shard of its own
        for start in range(0, len(kept), rows_per_pass):
            if tokens >= shard_tokens:
                shards.append([])
                tokens = 0
            rows = kept[start : start + rows_per_pass]
            shards[-1].append(Pass(rows, temperature))
            tokens += sum(len(example.response) for example in rows)
    return shards


def _single_texts(example: Example) -> list[Example]:
    """A block's texts as examples of their own, without those of one token, in which nothing is predicted."""
    if not example.text_starts:
        return [example]
    bounds = itertools.pairwise((0, *example.text_starts, len(example.tokens)))
    return [Example(example.tokens[start:end], 1) for start, end in bounds if end - start > 1]


def build(
    folder: Path, identity: Mapping[str, Any], shards: Sequence[Sequence[Pass]], teacher: Teacher,
    vocabulary: Vocabulary, form: Form, between_shards: Callable[[int, int, float], None] = lambda *_: None,
) -> None:  # fmt: skip
    """Writes the cache of `shards` to `folder`, or what is missing of it. Collective.

    identity: of text, teacher and form; plain JSON types. between_shards(done, all, tokens a second) is called on every
    rank before each round of shards; what it raises passes through, and the next call goes on from there.
    Raises ValueError on every rank for a folder that is there, that another build has begun, or that not all ranks see,
    and where files cannot be written.
    """
    folder = folder.absolute()
    unfinished = unfinished_name(folder)
    collectives.together(partial(refuse_existing, folder))
    with sole_use(unfinished):
        collectives.check_shared(unfinished)
        collectives.from_main_rank(partial(_begin, unfinished, identity))

        # All ranks look at what an earlier start has done, and what rank 0 sees counts: a network file system may show
        # ranks different folders.
        seen = collectives.together(lambda: [not _is_done(unfinished, number) for number in range(len(shards))])
        missing = list(itertools.compress(itertools.count(), collectives.gather_objects(seen)[0]))
        _make(unfinished, shards, missing, teacher, vocabulary, form, between_shards)

        # Each rank hashes a part of the files.
        own = [_name(number) for number in range(collectives.rank(), len(shards), collectives.world())]
        hashes = collectives.together(lambda: {name: entry_of(unfinished / name) for name in own})
        files = {name: entry for part in collectives.gather_objects(hashes) for name, entry in part.items()}
        collectives.from_main_rank(partial(_finish, unfinished, folder, identity, files))


def _make(
    unfinished: Path, shards: Sequence[Sequence[Pass]], missing: Sequence[int], teacher: Teacher,
    vocabulary: Vocabulary, form: Form, between_shards: Callable[[int, int, float], None],
) -> None:  # fmt: skip
    """Writes the shards whose numbers are `missing`, in rounds of one shard for each rank. Collective."""
    rank, world, tokens, started_s = collectives.rank(), collectives.world(), 0.0, time.monotonic()
    spare = TokenBatch.from_examples(shards[0][0].examples[:1], vocabulary.pad_id).to(collectives.device())
    for start in range(0, len(missing), world):
        done = len(shards) - len(missing) + start
        # Each rank makes one shard in a round; in the last one some ranks may have none.
        between_shards(done, len(shards), tokens / max(1e-9, time.monotonic() - started_s))
        numbers = missing[start : start + world]
        own = shards[numbers[rank]] if rank < len(numbers) else []
        found: list[Arrays] = []
        for index in range(max(len(shards[number]) for number in numbers)):
            if index < len(own):
                found.append(_answers(own[index], teacher, vocabulary, form))
            else:
                # The other ranks' all-gathers need every rank: one that has no pass left makes one for nothing.
                teacher.signals([spare])
                with teacher.head():
                    pass

        # A failure on one rank ends all of them before the next round.
        path = unfinished / _name(numbers[rank]) if own else None
        collectives.together(partial(_write, path, found, vocabulary, form) if path else lambda: None)
        tokens += collectives.sum_over_ranks([sum(len(part["targets"]) for part in found)])[0]


@torch.no_grad()
def _answers(part: Pass, teacher: Teacher, vocabulary: Vocabulary, form: Form) -> Arrays:
    """What is kept of one pass, and the `keys` of its texts with their numbers of `targets`."""
    batch = TokenBatch.from_examples(part.examples, vocabulary.pad_id)
    texts = texts_of(batch, part.temperature)
    (hidden_NH,) = teacher.signals([batch.to(collectives.device())])
    uniforms_ND = _uniforms(texts, form) if form.draws else None
    with teacher.head() as head:
        tiles = _tiles(hidden_NH, head, vocabulary, part.temperature, form, uniforms_ND)
    joined = {name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}
    return joined | {
        "keys": np.array([t.key for t in texts], np.int64),
        "targets": np.array([t.targets for t in texts]),
    }


def _tiles(
    hidden_NH: torch.Tensor, head: Head, vocabulary: Vocabulary, temperature: float, form: Form,
    uniforms_ND: np.ndarray | None,
) -> list[Arrays]:  # fmt: skip
    """What is kept of each tile of positions."""
    found, at = [], 0
    for log_p_nV in log_prob_tiles(hidden_NH, head, vocabulary.size, temperature):
        end = at + len(log_p_nV)
        found.append(form.arrays(log_p_nV, None if uniforms_ND is None else uniforms_ND[at:end]))
        at = end
    return found


def _uniforms(texts: Sequence[Text], form: Form) -> np.ndarray:
    """[N, draws], a function of the seed and each text, whatever it is computed with."""
    return np.concatenate([
        np.random.Generator(philox(form.seed, text.key % 2**64, 0)).random((text.targets, form.draws))
        for text in texts
    ])  # fmt: skip


def _write(path: Path, passes: Sequence[Arrays], vocabulary: Vocabulary, form: Form) -> None:
    """Writes one shard: what is kept of its positions and ids, and an index by text: the texts' `keys`, and where the
    positions (`ends`) and the ids (`U_ends`) of each end."""
    joined = {name: np.concatenate([part[name] for part in passes]) for name in passes[0]}
    ends = joined.pop("targets").cumsum()
    ids_per_position = joined.get("distinct", np.full(ends[-1], form.top_k, np.int64))
    index = {"keys": joined.pop("keys"), "ends": ends, "U_ends": ids_per_position.cumsum()[ends - 1]}
    arrays = index | form.packed(joined, vocabulary.size)
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)  # each array lies at a multiple of its items
    with new_file(path, durable=True) as unfinished:
        write_checked(unfinished, [(name, torch.from_numpy(np.ascontiguousarray(array))) for name, array in ordered])


def refuse_existing(folder: Path) -> None:
    """Raises ValueError where the cache could not take its place in the end."""
    if folder.exists():
        raise ValueError(f"{folder} is there already and is no finished cache; delete it, or give another --out")


def _begin(unfinished: Path, identity: Mapping[str, Any]) -> None:
    """Writes down of what the folder will hold shards. Raises ValueError where it holds others."""
    identity = {"format": FORMAT, **identity}
    if not (unfinished / PLAN).is_file():
        if shards := sorted(unfinished.glob("shard-*.safetensors")):
            raise ValueError(
                f"{unfinished} holds {len(shards)} shards and no {PLAN}, which would say whose they are; delete it, or "
                "give another --out"
            )
        write_json(unfinished / PLAN, identity, durable=True, indent=2)
        return
    refuse(
        f"{unfinished} holds another cache, of which a part is done",
        differences(read_json(unfinished / PLAN), identity, "{}: {!r} there, {!r} now").values(),
        "set these back to go on with it, delete it, or give another --out",
    )


def _is_done(unfinished: Path, number: int) -> bool:
    """Whether the shard is there. Raises ValueError where it is damaged."""
    path = unfinished / _name(number)
    return path.is_file() and bool(read_shard(path))


def _finish(unfinished: Path, folder: Path, identity: Mapping[str, Any], files: Mapping[str, Entry]) -> None:
    """Completes the folder, in which all shards are, and gives it its name."""
    # The manifest has sums over all shards.
    sums = [(len(shard["keys"]), int(shard["ends"][-1])) for shard in (read_shard(unfinished / name) for name in files)]
    manifest = {
        "format": FORMAT,
        "identity": identity,
        "texts": sum(texts for texts, _ in sums),
        "positions": sum(positions for _, positions in sums),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "files": dict(sorted(files.items())),
    }
    write_json(unfinished / MANIFEST, manifest, durable=False, indent=1)  # the folder as a whole goes to disk below
    # The lock's file has to go before the folder is brought to disk: a process that opens and closes it loses the lock.
    for leftover in (*unfinished.glob(f"*{UNFINISHED}"), unfinished / LOCK):
        leftover.unlink(missing_ok=True)
    give_name(unfinished, folder, durable=True, replaces=False)
    (folder / PLAN).unlink(missing_ok=True)  # not before: shards without it belong to nobody


def _name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"
