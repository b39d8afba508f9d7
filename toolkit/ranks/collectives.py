"""What ranks say to each other: sums, agreements, errors of one that end all, and turns that they take."""

import itertools
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

Result = TypeVar("Result")
SEEN_WITHIN_S = 60.0  # a file that another node made
PACE_LOOK_S = 1.0  # between two looks at whether the others are done, at most
_paces = itertools.count()


class Told(ValueError):
    """Raised on all ranks with the same message. Rank 0 alone prints it."""


def started_as() -> tuple[int, int]:
    """(rank, world) by the launcher's variables, before this process has joined as well: `start` translates srun's."""
    env = os.environ
    rank_text = env.get("RANK") or env.get("SLURM_PROCID") or 0
    return int(rank_text), int(env.get("WORLD_SIZE") or env.get("SLURM_STEP_NUM_TASKS") or 1)


def rank() -> int:
    """Of this process among all of them; 0 where it is alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world() -> int:
    """How many ranks there are; 1 for a process that is alone."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def device() -> torch.device:
    """Where this rank's models and batches are."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element by element, in float64; every rank calls it with as many numbers."""
    total = torch.tensor(values, dtype=torch.float64, device=device())
    if world() > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: int) -> int:
    """The largest of the ranks' numbers, on every rank. Collective."""
    largest = torch.tensor(value, dtype=torch.int64, device=device())
    if world() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def anywhere(value: bool) -> bool:
    """Whether it is true on any rank; alike on all of them. Collective."""
    return sum_over_ranks([value])[0] > 0


def everywhere(value: bool) -> bool:
    """Whether it is true on every rank; alike on all of them. Collective."""
    return not anywhere(not value)


def gather_objects(value: Result) -> list[Result]:
    """Every rank's value, in rank order, on every rank."""
    if world() == 1:
        return [value]
    values = [value] * world()
    torch.distributed.all_gather_object(values, value)
    return values


def together(work: Callable[[], Result]) -> Result:
    """Run `work`, which may not communicate, on every rank; if it fails on any, every rank raises `Told` with the
    first error. Errors of every kind are caught: no rank may wait here for one that has raised."""
    error = None
    try:
        result = work()
    except Exception as failure:
        error = failure
    texts = gather_objects(None if error is None else _told(error))
    first = next((text for text in texts if text is not None), None)
    if first is not None:
        raise Told(first) from error
    return result


def from_main_rank(work: Callable[[], Result]) -> Result:
    """Rank 0 does `work`, which may not communicate; every rank gets what came out, or the error of `together`."""
    return gather_objects(together(lambda: [work()] if rank() == 0 else []))[0][0]


def check_shared(folder: Path, within_s: float = SEEN_WITHIN_S) -> None:
    """Raises `Told` unless all ranks see this folder of rank 0's. One that rank 0 may not write is let pass: where it
    matters, the first thing written there fails. Collective."""
    if world() == 1:
        return

    # Rank 0 leaves a mark, which each rank has to see; network file systems take their time.
    mark, is_made = folder / f".seen-{gather_objects(secrets.token_hex(8))[0]}", True
    try:
        if rank() == 0:
            mark.touch()
    except OSError:
        is_made = False
    if not everywhere(is_made):
        return
    until_s = time.monotonic() + within_s
    while not (is_seen := mark.exists()) and time.monotonic() < until_s:
        time.sleep(0.2)

    # The message names the ranks that do not see it.
    blind = [text for text in gather_objects("" if is_seen else f"{rank()} on {socket.gethostname()}") if text]
    if rank() == 0:
        mark.unlink()
    if blind:
        after = f"after {within_s:g} s"
        raise Told(f"{folder} of rank 0 is not there for rank {', '.join(blind)} {after}: use a disk of all nodes")


def check_alike(what: str, value: object) -> None:
    """Raises `Told` unless all ranks have the same `value`, a hash for instance, of `what`. Collective."""
    values = gather_objects((value, socket.gethostname()))
    other = next((r for r, (theirs, _) in enumerate(values) if theirs != values[0][0]), None)
    if other is not None:
        raise Told(
            f"{what}: rank {other} on {values[other][1]} has {values[other][0]!r}, rank 0 on {values[0][1]} has "
            f"{values[0][0]!r}; what has this name is not the same everywhere: copy it anew, or use a disk of all nodes"
        )


def _told(error: Exception) -> str:
    """Its text; of a kind that was not made for users also the kind, the place, and the rank."""
    if isinstance(error, ValueError | OSError | SafetensorError):
        return f"{error}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"rank {rank()}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno} {place.name})"


def at_own_pace(work: Callable[[], Result]) -> Result:
    """As `together`, for work that may take a rank longer than a collective may last: ranks that are done wait for the
    others at the store, and it is the watchdog that ends them."""
    number = next(_paces)
    names = [f"pace {number} {r}" for r in range(world())]

    def wait() -> None:
        store, pause_s = torch.distributed.distributed_c10d._get_default_store(), 0.02
        store.set(names[rank()], "done")
        while not store.check(names):
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, PACE_LOOK_S)

    def paced() -> Result:
        try:
            return work()
        finally:
            wait() if world() > 1 else None

    return together(paced)


def on_main_rank(work: Callable[[], Result]) -> Result | None:
    """Rank 0 does `work` alone, at its own pace; None elsewhere. Errors are as those of `together`."""
    return at_own_pace(lambda: work() if rank() == 0 else None)


def main_rank_first(work: Callable[[], Result]) -> Result:
    """Rank 0 does `work` alone, the others after it: for results kept in files, which the others then only read."""
    own = at_own_pace(lambda: [work()] if rank() == 0 else [])
    return at_own_pace(lambda: own[0] if own else work())
