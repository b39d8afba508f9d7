"""Seconds of each phase of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Seconds per named phase of a step, in order; phases do not nest.

    sync: runs at each edge of a phase, torch.cuda.synchronize for instance. Without it on a GPU, a phase
        holds the time to queue its kernels, and the wait falls into a later one.
    watch: told the name of each phase as it begins, "other" as it ends.
    totals: seconds by phase over all steps so far, added to in place; those of a run that goes on, for instance.
    """

    def __init__(
        self,
        sync: Callable[[], None] | None = None,
        watch: Callable[[str], None] = lambda name: None,
        totals: dict[str, float] | None = None,
    ) -> None:
        self.sync, self.watch = sync or (lambda: None), watch
        self.totals = {} if totals is None else totals
        self.step_s: dict[str, float] = {}
        self.current: str | None = None
        self.step_started_s = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds of the `with` block to `name`, also if the block raises."""
        assert self.current is None, f"phase {name!r} inside phase {self.current!r}"
        assert name != "other", "'other' is the time outside all phases"
        self.watch(name)
        self.current, started_s = name, self._now()
        try:
            yield
        finally:
            self.step_s[name] = self.step_s.get(name, 0.0) + self._now() - started_s
            self.current = None
            self.watch("other")

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last take, with `other` for the rest; they sum to the wall time."""
        assert self.current is None, f"take() inside phase {self.current!r}"
        now_s = self._now()
        wall_s = now_s - self.step_started_s
        taken = self.step_s | {"other": max(0.0, wall_s - sum(self.step_s.values()))}
        for name, seconds in taken.items():
            self.totals[name] = self.totals.get(name, 0.0) + seconds
        self.step_s, self.step_started_s = {}, now_s
        return taken

    def _now(self) -> float:
        self.sync()
        return time.perf_counter()
