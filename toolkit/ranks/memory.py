"""Memory of this rank: what is free, what was used at most, and work that is cut in halves where it does not fit."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from toolkit.ranks import collectives
from toolkit.ranks.output import say

Result = TypeVar("Result")

OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Halving:
    """A size, rows or MiB, that is halved where memory runs out, said each time, and stays at what fitted.

    size: what to begin with; None is all of the work, whose size `run` is told. It does not go below `least`.
    """

    def __init__(self, what: str, unit: str, size: float | None = None, least: float = 1):
        self.what, self.unit, self.size, self.least = what, unit, size, least

    def run(self, work: Callable[[float | None], Result], whole: float) -> Result:
        """`work(size)`, or of the largest half, quarter, ... that fits. It may not communicate: other ranks do not
        repeat it. Raises what `work` raised last where not even `least` fits."""
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                tried = whole if self.size is None else min(whole, self.size)
                if not is_out_of_memory(error) or tried <= self.least:
                    raise
                said = str(error).split("\n")[0][:200]
            # Outside the `except`: there, the error's traceback would keep the failed attempt's tensors alive.
            self.size = max(self.least, tried // 2)
            change = f"{tried:g} {self.unit} become {self.size:g} ({said})"
            say(f"rank {collectives.rank()}: out of memory in {self.what}; {change}", sys.stderr)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a class for GPUs; on the CPU its allocator says so in words, and so does cuBLAS."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def free_bytes() -> int:
    """Free memory where this rank's parameters are; on a CPU, its share of what the node and its cgroup have."""
    if torch.cuda.is_available() and collectives.device().type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return node_free_bytes()


def ranks_of_node() -> int:
    """Ranks on this rank's node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", collectives.world()))


def node_free_bytes() -> int:
    """This rank's share of the free memory that its node and its cgroup have."""
    return int(min(psutil.virtual_memory().available, cgroup_free_bytes()) // ranks_of_node())


def cgroup_free_bytes(mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """What the memory limits of containers and batch jobs leave to this process, inf without one.

    The least of limit - (usage - file pages that can be dropped) over its cgroup and all above it, v2 and v1. Psutil
    does not know these limits: it tells what the whole machine has free.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return float("inf")
    found = [float("inf")]
    for line in lines:
        # A line names the cgroup of a version: "0::/path", or "5:memory:/path".
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        below = root / path.strip("/")
        # A container may see its own cgroup as the root, under a path that only its host has.
        for folder in [below, *(parent for parent in below.parents if parent.is_relative_to(root))]:
            try:
                limit = float((folder / names[0]).read_text().strip().replace("max", "inf"))
                used = int((folder / names[1]).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            found.append(limit - used + min(used, int(stat.get(names[2], 0))))
    return max(0.0, min(found))


GIB = 2**30


def peak_rss_gib() -> float:
    """Most memory this process has had resident. Over ranks, shared pages are counted once per rank."""
    try:
        # Not ru_maxrss: on Linux a child starts with its parent's value, and a small rank would report that.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / GIB
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def peak_device_gib() -> float:
    """Most memory that tensors held on the current GPU since the start or torch's reset; 0.0 without."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def keep_freed_memory() -> bool:
    """Let glibc keep the blocks of memory that this process frees, and hand them out again; returns whether it does.

    By itself it gives a freed block above 32 MiB, and often smaller ones, back to the system, which clears each page of
    the next one when that is touched: on a CPU, where every tensor of a step is such a block, that is a third of the
    step's time. What a process has had at its peak it keeps in this way. Elsewhere than with glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # M_MMAP_MAX: no block is mapped by itself. M_TRIM_THRESHOLD: the heap's end is not given back (2 GiB is its most).
    # M_TOP_PAD: it grows by so much at once. M_ARENA_MAX: threads have no heaps of their own, which are given back.
    settings = ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20), (-8, 1))
    taken = [mallopt(name, value) for name, value in settings]
    return all(taken)
