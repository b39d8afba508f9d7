"""Start the ranks, stop them, and tell wrong input once."""

import itertools
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from toolkit.ranks import builds, memory, slurm
from toolkit.ranks.collectives import Told, rank, started_as, world
from toolkit.ranks.output import say
from toolkit.ranks.signals import EXIT_LATER, GoOnLater

#: what a launcher says to each of its ranks; of a process that none has started, `start` says it
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MAIN_RANK_TELLS_S = 3.0  # other ranks keep an error to themselves where rank 0 has one within this time
_entered = itertools.count()


def start(hang_s: float = 1800.0) -> None:
    """Join the process group: a launcher's variables as set, else srun's tasks, else a group of one.

    hang_s: the watchdog's limit, see FaultsConfig. Collectives wait longer than that, so that it is the watchdog that
    ends a job and says why. Raises ValueError where SLURM's tasks and GPUs do not fit together.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if torch.distributed.is_initialized():
        return

    # The variables say who this rank is. Without them deepspeed would ask for mpi4py.
    if "RANK" not in os.environ:
        os.environ.update(slurm.launcher_variables() or _alone())

    if not torch.cuda.is_available():
        memory.keep_freed_memory()

    # The device is set before the first message, or all ranks would send theirs from GPU 0.
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if local_size := os.environ.get("LOCAL_SIZE"):  # the deepspeed launcher's name for it
        os.environ.setdefault("LOCAL_WORLD_SIZE", local_size)
    builds.outlive_killed_builds()
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=min(hang_s, 1e8) + 600))
    if torch.distributed.get_backend() == "gloo":
        from toolkit.ranks.gathers import gather_by_broadcasts  # imports deepspeed

        gather_by_broadcasts()


@contextmanager
def joined(hang_s: float) -> Iterator[None]:
    """Inside the `with` block this process is in the group that `start` joins, or in the one that it was in before.

    A process that is alone leaves its group at the end, and has its environment and its excepthook back. A group of
    several ranks stays: its ranks would come back one by one, and meet others that have not yet left.
    """
    was_joined, before, hook = torch.distributed.is_initialized(), dict(os.environ), sys.excepthook
    start(hang_s)
    try:
        yield
    finally:
        if not was_joined and world() == 1:
            stop()
            sys.excepthook = hook  # torch has put the rank in front of every traceback's lines
            for name in LAUNCHER_VARIABLES:
                os.environ.pop(name, None)
                os.environ.update({name: before[name]} if name in before else {})


def _alone() -> dict[str, str]:
    """The launcher's variables of a group of one, on a port that is free; those that are set stay."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {name: os.environ.get(name, value) for name, value in alone.items()}


@contextmanager
def one_message() -> Iterator[None]:
    """Wrong input (ValueError) ends every rank with exit code 2 and one message, a run that a signal has stopped
    (GoOnLater) with EXIT_LATER and another.

    Ranks leave the group only where all of them do: after an error of one rank alone, leaving would wait for the
    others, which wait for it.
    """
    key = f"error {next(_entered)}"
    try:
        yield
    except ValueError as error:
        if _is_told_here(error, key):
            place = f" on rank {rank()}" if rank() else ""
            say(f"error{place}: {error}", sys.stderr)
        if os.environ.get("DISTILL_TRACEBACK"):
            raise
        if isinstance(error, Told) or world() == 1:
            stop()
        sys.exit(2)
    except GoOnLater as stopped:
        if rank() == 0:
            say(f"{stopped}; the same command goes on from there (exit code {EXIT_LATER})")
        stop()
        sys.exit(EXIT_LATER)
    except SystemExit:
        stop()
        raise
    else:
        stop()


def _is_told_here(error: ValueError, key: str) -> bool:
    """Whether this rank prints it: rank 0 does, and another one whose error rank 0 does not share."""
    if not torch.distributed.is_initialized():
        is_first_of_node = "RANK" not in os.environ and os.environ.get("SLURM_LOCALID") == "0"  # nodes may differ
        return is_first_of_node or started_as()[0] == 0

    # Where only some ranks may have an error, rank 0 says through the store that it has told its own.
    if world() == 1 or isinstance(error, Told):
        return rank() == 0
    store = torch.distributed.distributed_c10d._get_default_store()
    if rank() == 0:
        store.set(key, "told")
        return True
    until_s = time.monotonic() + MAIN_RANK_TELLS_S
    while time.monotonic() < until_s:
        try:
            if store.check([key]):
                return False
        except RuntimeError:  # rank 0, which keeps the store, has told its error and gone
            return False
        time.sleep(0.1)
    return True


def stop() -> None:
    """Leave the process group, if this process is in one; it may join another."""
    if torch.distributed.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()  # with the groups that deepspeed has made in it
