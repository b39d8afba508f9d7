"""Student text kept for later steps: one shard a rank, oldest out, sampling without a state (arXiv 2402.03898)."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from toolkit.batch import Example
from toolkit.seeds import philox


class Entry(NamedTuple):
    """A sequence, and the optimizer step whose weights generated it."""

    example: Example
    step: int


class ReplayBuffer:
    """This rank's shard of a replay buffer that holds `capacity` sequences over all ranks.

    The paper's capacity is 1,000 in all (the released code gives every rank that much). Tokens are int32, 4 bytes each.
    An entry older than `max_age_steps` is never sampled, and leaves at the next `sample`. Raises ValueError for a
    capacity below world, a rank outside 0..world-1, a max_age_steps below 0, or a seed outside [0, 2**64).
    """

    def __init__(self, capacity: int, rank: int, world: int, seed: int, max_age_steps: int | None = None):
        philox(seed)  # a seed out of range fails here, not at the first sample
        if max_age_steps is not None and max_age_steps < 0:
            raise ValueError(f"max_age_steps is {max_age_steps}: give a number of steps, 0 or more, or None")
        self.capacity, self.rank, self.world, self.seed = capacity, rank, world, seed
        self.max_age_steps = max_age_steps
        self.local_capacity = local_capacity(capacity, rank, world)
        self.entries: deque[Entry] = deque(maxlen=self.local_capacity)  # oldest first
        self.sampled_steps: list[int] = []

    def __len__(self) -> int:
        """Sequences in this shard, those included that the next `sample` will drop for their age."""
        return len(self.entries)

    def push(self, examples: Iterable[Example], step: int) -> None:
        """Add what the student of `step` generated; the oldest entries leave when the shard is full. Tokens are copied.
        Raises ValueError for a step before that of the newest entry: push in order of steps."""
        if self.entries and step < self.entries[-1].step:
            raise ValueError(
                f"push of step {step} after one of step {self.entries[-1].step}: push in order of steps, "
                "or load the buffer's state from the checkpoint that training went back to"
            )
        for example in examples:
            self.entries.append(_entry(example.tokens, example.prompt_length, step))

    def is_ready(self, count: int, step: int) -> bool:
        """Whether `sample(count, step)` has `count` different entries to draw from, or as many as the smallest shard
        holds. Where ranks may have pushed differently they have to agree: take the minimum of the answers."""
        fresh = sum(not self._expired(entry, step) for entry in self.entries)
        return fresh >= max(1, min(count, self.capacity // self.world))

    def sample(self, count: int, step: int) -> list[Example]:
        """Draw `count` sequences evenly, as a pure function of (seed, step, rank) and the entries. A second call at the
        same step draws the same: draw a whole window at once.

        Without replacement while count <= len; beyond it every entry comes floor or ceil of count / len times. Raises
        ValueError if there is nothing to draw from, or for a count below 0.
        """
        while self.entries and self._expired(self.entries[0], step):
            self.entries.popleft()
        if count < 0 or not self.entries:
            raise ValueError(
                f"sample of {count} from {len(self)} sequences at step {step} (max_age_steps="
                f"{self.max_age_steps}): ask is_ready first, and generate where it says no"
            )
        # Each round puts all entries in the order of random keys. The draw is the front of these orders, one by one.
        size = len(self.entries)
        rounds = max(1, math.ceil(count / size))
        keys = philox(self.seed, step, self.rank).random_raw(rounds * size).reshape(rounds, size)
        return self._take([self.entries[i] for i in np.argsort(keys, axis=1, kind="stable").ravel()[:count]])

    def newest(self, count: int, skip: int) -> list[Example]:
        """The `count` sequences that were pushed before the newest `skip`, oldest first. Raises ValueError where there
        are not as many."""
        end = len(self.entries) - skip
        if count > end:
            raise ValueError(f"{count} sequences before the newest {skip} asked of {len(self)}")
        return self._take(list(self.entries)[end - count : end])

    def _take(self, entries: list[Entry]) -> list[Example]:
        self.sampled_steps = [entry.step for entry in entries]
        return [entry.example for entry in entries]

    def staleness(self, step: int) -> float:
        """Mean age in steps of this rank's last sample, seen from `step`; nan before the first one."""
        return step - sum(self.sampled_steps) / len(self.sampled_steps) if self.sampled_steps else math.nan

    def state_dict(self) -> dict[str, np.ndarray]:
        """The shard as arrays that `np.savez` stores without pickle, oldest entry first. tokens int32 [sum of lengths];
        lengths, prompt_lengths, steps int64 [N]; shard int64 [3]: rank, world, capacity."""
        return _pack(self.entries, self.rank, self.world, self.capacity)

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over this rank's `state_dict`, all but its last sample: `staleness` is nan until the next one. Raises
        ValueError for another rank, world or capacity: `deal` first."""
        shard, own = tuple(int(value) for value in state["shard"]), (self.rank, self.world, self.capacity)
        if shard != own:
            told = f"replay state is of (rank, world, capacity) {shard}, this shard is {own}"
            raise ValueError(f"{told}: pass the states of all ranks through deal() first")
        self.entries = deque(_unpack(state), maxlen=self.local_capacity)
        self.sampled_steps = []

    def _expired(self, entry: Entry, step: int) -> bool:
        return self.max_age_steps is not None and step - entry.step > self.max_age_steps


def local_capacity(capacity: int, rank: int, world: int) -> int:
    """This rank's part of `capacity`; the parts of all ranks sum to it. Raises ValueError where one would be empty."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of world {world}: give a rank from 0 to world - 1")
    if capacity < world:
        told = f"replay capacity {capacity} is below the number of ranks {world}"
        raise ValueError(f"{told}: capacity counts sequences over all ranks, so give at least one a rank")
    return capacity // world + (rank < capacity % world)


def deal(states: Sequence[dict[str, np.ndarray]], capacity: int, rank: int, world: int) -> dict[str, np.ndarray]:
    """The state of shard `rank` of `world`, from the states of all ranks of an earlier run, in any order.

    The newest `capacity` entries are dealt in turn, newest first, so that the new shards hold each exactly once, and
    dealing to the same world after equal pushes changes nothing. Raises ValueError unless every earlier rank is there
    once, or where `local_capacity` does.
    """
    local_capacity(capacity, rank, world)
    ranks = sorted((int(state["shard"][0]), int(state["shard"][1])) for state in states)
    if not states or ranks != [(i, len(states)) for i in range(len(states))]:
        raise ValueError(f"replay states of (rank, world) {ranks}: give the state of every rank of one run, once each")
    # By step, then by place in the shard, then by rank.
    ranked: list[tuple[tuple[int, int, int], Entry]] = []
    for state in states:
        entries = enumerate(reversed(_unpack(state)))
        ranked += [((-entry.step, place, int(state["shard"][0])), entry) for place, entry in entries]
    newest_first = [entry for _, entry in sorted(ranked, key=lambda item: item[0])]
    return _pack(newest_first[:capacity][rank::world][::-1], rank, world, capacity)


def _entry(tokens: np.ndarray, prompt_length: int, step: int) -> Entry:
    tokens = np.array(tokens, dtype=np.int32)  # a copy: a slice would keep its whole batch alive
    tokens.flags.writeable = False
    return Entry(Example(tokens=tokens, prompt_length=int(prompt_length)), int(step))


def _pack(entries: Iterable[Entry], rank: int, world: int, capacity: int) -> dict[str, np.ndarray]:
    entries = list(entries)
    tokens = [entry.example.tokens for entry in entries]
    return {
        "tokens": np.concatenate([np.zeros(0, np.int32), *tokens]),
        "lengths": np.array([len(row) for row in tokens], np.int64),
        "prompt_lengths": np.array([entry.example.prompt_length for entry in entries], np.int64),
        "steps": np.array([entry.step for entry in entries], np.int64),
        "shard": np.array([rank, world, capacity], np.int64),
    }


def _unpack(state: dict[str, np.ndarray]) -> list[Entry]:
    rows = np.split(state["tokens"], np.cumsum(state["lengths"])[:-1]) if len(state["lengths"]) else []
    return [_entry(*fields) for fields in zip(rows, state["prompt_lengths"], state["steps"], strict=True)]
