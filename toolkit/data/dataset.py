"""Which rows an optimizer step trains on: a pure function of (seed, step), with no state to save."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from toolkit.batch import Example


class PromptDataset:
    """Training examples in a seeded order, a new permutation each epoch.

    The order is one endless sequence of rows; step s takes rows [s * batch, (s + 1) * batch) of it, where batch is
    world * per_rank. So a step's rows, and their order over all ranks, do not depend on the number of ranks or on the
    micro-batch size, a batch that passes the end of an epoch goes on with the next one, and a resumed run needs only
    the step. Raises ValueError for no examples or a negative seed.
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        if not examples:
            raise ValueError("a data set of 0 examples; check data.source and the counts of skipped rows")
        if seed < 0:
            raise ValueError(f"seed = {seed}; give 0 or more")
        self.examples, self.seed = examples, seed
        self._order = lru_cache(maxsize=2)(self._permutation)  # a batch touches two epochs at most

    def __len__(self) -> int:
        return len(self.examples)

    def window_examples(self, step: int, rank: int, world: int, per_rank: int) -> list[Example]:
        """The `per_rank` examples of `rank` at `step` (from 0); ranks 0, 1, ... joined: the global batch. Raises
        ValueError if the global batch is larger than the data set, and for a step, rank or size out of range."""
        if step < 0 or per_rank < 1 or not 0 <= rank < world:
            raise ValueError(
                f"step = {step}, rank = {rank}, world = {world}, per_rank = {per_rank}; "
                "step is 0 or more, per_rank 1 or more, and rank below world"
            )
        if world * per_rank > len(self):
            raise ValueError(
                f"a global batch of {world * per_rank} rows ({world} ranks x {per_rank}) with {len(self)} training "
                "rows; use more data, fewer ranks, or a smaller batch"
            )
        start = (step * world + rank) * per_rank
        return [self._at(position) for position in range(start, start + per_rank)]

    def _at(self, position: int) -> Example:
        epoch, index = divmod(position, len(self))
        return self.examples[self._order(epoch)[index]]

    def _permutation(self, epoch: int) -> np.ndarray:
        seeds = np.random.SeedSequence([self.seed, epoch])
        return np.random.Generator(np.random.Philox(seeds)).permutation(len(self))
