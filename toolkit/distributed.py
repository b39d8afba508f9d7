"""Processes: start them, add numbers over them, and fail together so that none waits for one that stopped."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from toolkit import slurm

Result = TypeVar("Result")


def start() -> None:
    """Join the process group: a launcher's variables as set, else srun's tasks, else a group of one.

    Raises ValueError where SLURM's tasks and GPUs do not fit together.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if torch.distributed.is_initialized():
        return
    if "RANK" not in os.environ:  # deepspeed would ask for mpi4py
        os.environ.update(slurm.launcher_variables() or _alone())
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # or the first messages of all ranks use GPU 0
    deepspeed.init_distributed(verbose=False)


def _alone() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {name: os.environ.get(name, value) for name, value in alone.items()}


@contextmanager
def one_message() -> Iterator[None]:
    """Wrong input (ValueError) ends every rank with exit code 2 and one message; the group is left in any case."""
    try:
        yield
    except ValueError as error:
        before_start = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        if rank() == 0 and (torch.distributed.is_initialized() or before_start == "0"):
            say(f"error: {error}", sys.stderr)
        if os.environ.get("DISTILL_TRACEBACK"):
            raise
        sys.exit(2)
    finally:
        stop()


def say(text: str, stream: Any = None, write: Callable[..., None] = print) -> None:
    """Prints a line (on stdout by default). A reader that is gone, `| tee` after Ctrl-C, is no reason to lose a run."""
    stream = stream or sys.stdout
    try:
        write(text, file=stream)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or the flush at exit would change the exit code


def stop() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def device() -> torch.device:
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
    values: list = [None] * world()
    torch.distributed.all_gather_object(values, value)
    return values


def together(work: Callable[[], Result]) -> Result:
    """Run `work`, which may not communicate, on every rank; if it fails on any, every rank raises ValueError with the
    first error. No kind of error may leave alone the ranks that wait here for the one that has it."""
    result, error = None, None
    try:
        result = work()
    except Exception as failure:
        error = failure
    texts = gather_objects(None if error is None else _told(error))
    first = next((text for text in texts if text is not None), None)
    if first is not None:
        raise ValueError(first) from error
    return result


def _told(error: Exception) -> str:
    """Its text; of a kind that was not made for users also the kind, the place, and the rank."""
    if isinstance(error, ValueError | OSError | SafetensorError):
        return f"{error}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"rank {rank()}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno} {place.name})"


def main_rank_first(work: Callable[[], Result]) -> Result:
    """Rank 0 does `work` alone, the others after it: for results kept in files, which the others then only read."""
    result = together(lambda: work() if rank() == 0 else None)
    return together(lambda: result if rank() == 0 else work())
