"""Where the time of a step goes, from a trace of torch.profiler: what the GPU did in each phase, and what the host did
while the GPU had nothing to do.

A trace is the "traceEvents" of `export_chrome_trace`. Times are microseconds. An interval is (start, end); a list of
intervals that is "merged" is in order and without overlaps.
"""

import functools
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

Interval = tuple[float, float]
PHASE = "phase "  # a user annotation of this name and the phase's
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CALLS = ("cuda_runtime", "cuda_driver")
#: what the host does while the GPU idles -> calls of CUDA; the first kind that fits takes the time
KINDS = {
    "allocator": re.compile(
        r"^cu(da)?(Malloc|Free|HostAlloc|HostRegister|MemCreate|MemMap|MemUnmap|MemRelease|MemAddr)"
    ),
    "synchronisation": re.compile(r"Synchronize"),
    "copies": re.compile(r"Memcpy|Memset"),
    "launches": re.compile(r"Launch"),
    "loading kernels": re.compile(r"ModuleLoad|LibraryLoad|GetFunction|FuncGetAttributes|FuncSetAttribute"),
}
OPERATIONS, OUTSIDE = "torch's operators", "Python and other code"
IDLE_KINDS = (*KINDS, OPERATIONS, OUTSIDE)


class Phase(NamedTuple):
    """One phase of a step: all of its stretches together, milliseconds."""

    wall_ms: float
    busy_ms: float  # the GPU has at least one kernel, copy or fill
    idle_ms: dict[str, float]  # the rest of wall_ms, by what the host did meanwhile
    kernels: int
    calls: dict[str, int]  # of CUDA, by kind
    copied_mib: dict[str, float]  # by direction, as "HtoD"


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """In order, those that touch joined."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif end > start:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Of merged intervals."""
    return sum(end - start for start, end in intervals)


def common(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """What lies in both, which are merged."""
    found, i, j = [], 0, 0
    if a and b:  # what lies before the other's first is passed over at once
        i = max(0, bisect_left(a, (b[0][0],)) - 1)
        j = max(0, bisect_left(b, (a[0][0],)) - 1)
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """What lies in `a` and not in `b`; both are merged."""
    edges = [float("-inf"), *(edge for interval in b for edge in interval), float("inf")]
    return common(a, list(zip(edges[::2], edges[1::2], strict=True)))


def of(events: Iterable[dict], *categories: str) -> list[dict]:
    """Events that take time, of these categories."""
    return [event for event in events if event.get("ph") == "X" and event.get("cat") in categories]


def span(event: dict) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def phases(events: list[dict]) -> dict[str, Phase]:
    """Name -> what happened in it; "step" is everything from the first phase's begin to the last one's end.

    A phase begins and ends with a synchronisation, so the GPU's work in its time is its own."""
    stretches = defaultdict(list)
    for event in sorted(of(events, "user_annotation"), key=span):
        if event["name"].startswith(PHASE):
            stretches[event["name"].removeprefix(PHASE)].append(span(event))
    if stretches:
        bounds = merged(interval for intervals in stretches.values() for interval in intervals)
        stretches["step"] = [(bounds[0][0], bounds[-1][1])]
    work, calls = in_order(of(events, *GPU_WORK)), in_order(of(events, *HOST_CALLS))
    operations = merged(span(event) for event in of(events, "cpu_op"))
    busy = merged(map(span, work))
    by_kind: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for event in calls:
        if kind := kind_of(event["name"]):
            by_kind[kind].append(event)
    hosts = {kind: merged(map(span, found)) for kind, found in by_kind.items()} | {OPERATIONS: operations}
    idle, left = {}, without(stretches.get("step", []), busy)
    for kind, intervals in hosts.items():
        idle[kind], left = common(left, intervals), without(left, intervals)
    idle[OUTSIDE] = left
    return {name: _phase(merged(intervals), busy, idle, work, by_kind) for name, intervals in stretches.items()}


def in_order(events: list[dict]) -> list[dict]:
    """By their begin."""
    return sorted(events, key=lambda event: event["ts"])


def inside(events: list[dict], time: list[Interval]) -> list[dict]:
    """Those that begin in these intervals; `events` are in order."""
    begins = [event["ts"] for event in events]
    return [event for start, end in time for event in events[bisect_left(begins, start) : bisect_left(begins, end)]]


@functools.cache
def kind_of(call: str) -> str | None:
    """Of a call of CUDA."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(call)), None)


def _phase(
    time: list[Interval], busy: list[Interval], idle: dict[str, list[Interval]], work: list[dict],
    by_kind: dict[str, list[dict]],
) -> Phase:  # fmt: skip
    here, copied = inside(work, time), defaultdict(float)
    for event in here:
        if event["cat"] == "gpu_memcpy" and (direction := re.search(r"Memcpy (\w+)", event["name"])):
            copied[direction[1]] += event.get("args", {}).get("bytes", 0) / 2**20
    return Phase(
        wall_ms=length(time) / 1e3, busy_ms=length(common(time, busy)) / 1e3,
        idle_ms={kind: length(common(time, intervals)) / 1e3 for kind, intervals in idle.items()},
        kernels=sum(event["cat"] == "kernel" for event in here),
        calls={kind: len(inside(events, time)) for kind, events in by_kind.items()}, copied_mib=dict(copied),
    )  # fmt: skip


def top_kernels(events: list[dict], count: int) -> list[tuple[str, int, float]]:
    """(name, how often, milliseconds) of the GPU's work, most of the time first; names of templates are cut."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in of(events, *GPU_WORK):
        times[short(event["name"])].append(event["dur"] / 1e3)
    found = [(name, len(ms), sum(ms)) for name, ms in times.items()]
    return sorted(found, key=lambda row: -row[2])[:count]


def short(name: str, most: int = 70) -> str:
    """A kernel's name without namespaces, arguments and what else makes it long."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|^void |std::", "", name)
    return name if len(name) <= most else name[: most - 3] + "..."


def top_operations(events: list[dict], count: int) -> list[tuple[str, int, float]]:
    """(name, how often, milliseconds of the host without the operators that it calls) of torch's operators and CUDA's
    calls, most of the time first."""
    by_thread = defaultdict(list)
    for event in of(events, "cpu_op", *HOST_CALLS):
        by_thread[event.get("tid")].append(event)
    own_ms: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for found in by_thread.values():
        open_events: list[dict] = []
        for event in sorted(found, key=lambda event: (event["ts"], -event["dur"])):
            while open_events and span(open_events[-1])[1] <= event["ts"]:
                open_events.pop()
            if open_events:  # its time is no longer that of the operator around it
                own_ms[open_events[-1]["name"]] -= event["dur"] / 1e3
            own_ms[event["name"]] += event["dur"] / 1e3
            calls[event["name"]] += 1
            open_events.append(event)
    rows = [(name, calls[name], ms) for name, ms in own_ms.items()]
    return sorted(rows, key=lambda row: -row[2])[:count]
