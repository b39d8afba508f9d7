"""What goes wrong from outside: signals, steps that are not finite, ranks that hang, memory that runs out."""

from __future__ import annotations

import faulthandler
import gc
import json
import math
import os
import select
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from toolkit import distributed, heartbeat
from toolkit.config import FaultsConfig

Result = TypeVar("Result")
#: Exit code of a run that saved itself and wants to be started again with the same command (sysexits' EX_TEMPFAIL).
EXIT_LATER = 75
#: Exit code of a run that its watchdog ended (sysexits' EX_SOFTWARE): starting it again may hang again.
EXIT_STUCK = 70
#: Exit code of a run that was stopped before it had saved anything, as of other errors: a repetition would do the same.
EXIT_IN_VAIN = 2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
END_OF_WATCH = 0  # no signal has this number
#: signals this soon after the first are the same request: on Ctrl-C, a terminal and a launcher both send one
SAME_REQUEST_S = 2.0
#: seconds between two looks at the launcher
LAUNCHER_LOOK_S = 1.0
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
#: seconds between two looks at a rank, at most
LOOK_EVERY_S = 10.0


class GoOnLater(Exception):
    """The run was asked to stop, and what it needs to go on is saved; `main` exits with EXIT_LATER."""


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 set `received`; ranks agree on it where a step ends. So does the end of the
    `deepspeed` command above this process, which hands no signal on. A later signal exits at once, and so does the time
    `grace_s` after the first one: the newest checkpoint is whole at any moment.

    A thread times the signals by the pipe into which C code writes their numbers: a handler in Python would wait for a
    main thread that hangs in a collective.
    """

    _watched: StopSignals | None = None

    def __init__(self, grace_s: float):
        self.grace_s, self.received = grace_s, False
        self.in_vain = False  # steps were done and nothing of them was saved: the next start would only repeat them
        self._previous: dict[int, Any] = {}

    @contextmanager
    def watched(self) -> Iterator[StopSignals]:
        """Handles the signals inside the `with` block, in the main thread; elsewhere it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        thread = threading.Thread(target=self._watch, args=(told, _launchers()), daemon=True, name="stop signals")
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        previous_fd = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        StopSignals._watched = self
        thread.start()
        try:
            yield self
        finally:
            StopSignals._watched = None
            signal.set_wakeup_fd(previous_fd)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            os.write(tell, bytes([END_OF_WATCH]))
            thread.join()
            os.close(told)
            os.close(tell)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; alike on all ranks. Collective."""
        return distributed.anywhere(self.received)

    def _handle(self, number: int, frame: Any) -> None:
        self.received = True

    def _watch(self, told: int, launchers: list[psutil.Process]) -> None:
        asked_s, poll = None, select.poll()
        poll.register(told, select.POLLIN)
        while True:
            numbers = os.read(told, 256) if poll.poll(1000 * LAUNCHER_LOOK_S) else b""
            if END_OF_WATCH in numbers:
                return
            reasons = [signal.Signals(number).name for number in numbers if number in STOP_SIGNALS]
            if any(map(_is_gone, launchers)):
                reasons, launchers = [*reasons, "the deepspeed command was ended"], []
            now_s = time.monotonic()
            if reasons and asked_s is None:
                self.received, asked_s = True, now_s
                if distributed.rank() == 0:
                    _say(f"{reasons[0]}: the run saves and stops where its step ends; a second signal exits at once")
            elif reasons and now_s - asked_s > SAME_REQUEST_S:
                _last_words(f"{reasons[0]} again: rank {distributed.rank()} exits at once", EXIT_LATER)
            if asked_s is not None and now_s - asked_s > self.grace_s:
                late = f"no step ended within faults.grace_s = {self.grace_s:g} s of the signal, rank "
                late += f"{distributed.rank()} exits; "
                if self.in_vain:
                    _last_words(f"{late}nothing was saved since the start: set checkpoint.every_steps", EXIT_IN_VAIN)
                _last_words(f"{late}the newest checkpoint stands", EXIT_LATER)


def _forget_signals() -> None:
    """In a forked child, of data loading for instance: its signals are its own."""
    if StopSignals._watched is not None:
        signal.set_wakeup_fd(-1)
        for number, handler in StopSignals._watched._previous.items():
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_forget_signals)


def _launchers() -> list[psutil.Process]:
    """The processes of a `deepspeed` command above this one: the one that started the ranks, and the command itself."""
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        for process in psutil.Process().parents()[:2]:
            words = process.cmdline()[:4]
            if any(Path(word).name == "deepspeed" or word.startswith("deepspeed.launcher") for word in words):
                found.append(process)
            else:
                break
    return found


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


@dataclass
class StepGuard:
    """Which optimizer steps are not taken. Its numbers are of all ranks together, so every rank decides alike."""

    config: FaultsConfig
    skipped: int = 0
    skipped_in_row: int = 0
    losses: list[float] = field(default_factory=list)  # of the last steps that were taken

    def objection(self, loss: float) -> str | None:
        """Why a step with this loss must not be taken, or None."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if self.config.spike_factor is not None and len(self.losses) >= self.config.spike_window:
            limit = self.config.spike_factor * statistics.median(self.losses)
            if loss > limit:
                return f"its loss is {loss:.4g}, above {self.config.spike_factor:g} medians = {limit:.4g}"
        return None

    def record(self, loss: float, taken: bool) -> None:
        if taken:
            self.skipped_in_row = 0
            self.losses = [*self.losses, loss][-self.config.spike_window :]
        else:
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1

    @property
    def gives_up(self) -> bool:
        return self.skipped_in_row >= self.config.max_skipped_steps

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row, "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.skipped_in_row, self.losses = state["skipped"], state["skipped_in_row"], state["losses"]


class Halving:
    """A size, rows or MiB, that is halved where memory runs out, said each time, and stays at what fitted.

    size: what to begin with; None is a whole of `whole`, which `run` is told each time. It does not go below `least`.
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
            _say(
                f"rank {distributed.rank()}: out of memory in {self.what}; {tried:g} {self.unit} become "
                f"{self.size:g} ({said})"
            )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a class for GPUs; on the CPU its allocator says so in words, and so does cuBLAS."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def to_disk(*paths: Path) -> None:
    """What was written to these files, or renamed in these folders, outlives a power cut. File systems that cannot
    promise it for a folder are left alone."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            if not path.is_dir():
                raise
        finally:
            os.close(handle)


@dataclass
class Sign:
    """What a rank last told of itself."""

    step: int = 0
    phase: str = "start"
    changes: int = 0  # of phase, since the start: the rank that is behind has fewer
    beat: int = 0
    waits: bool = False  # inside a collective: it is not the one that others wait for
    idle_s: float = 0.0  # since its last progress
    where: str = ""


class Watchdog:
    """Ends a job that stands still. A thread of each rank tells the others, through the process group's store, what the
    rank does; where no rank has begun a phase or a pass of a model, or told of other progress (heartbeat.py), for
    longer than `limit_s`, it says which rank is behind, where, and exits.

    The job is over `limit_s` + 10 looks (of 10 s at most) after the last progress, from before ranks have joined on.
    """

    def __init__(self, limit_s: float, end: Callable[[str, int], None] | None = None):
        self.limit_s, self.look_s = limit_s, min(LOOK_EVERY_S, limit_s / 4)
        self.end = end or _last_words
        self.sign = Sign()
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        heartbeat.beat()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join(2 * self.look_s)
        faulthandler.cancel_dump_traceback_later()

    def progress(self, phase: str, step: int | None = None) -> None:
        """This rank now does `phase`, of `step` where that changed."""
        self.sign.phase, self.sign.changes = phase, self.sign.changes + 1
        self.sign.step = self.sign.step if step is None else step
        heartbeat.beat()

    def count_passes(self, model: torch.nn.Module) -> None:
        """Each pass of `model` is progress as well: generation and evaluation make many in one phase. Every pass enters
        its input embeddings. It is no new phase: ranks make as many passes as their texts are long."""

        model.get_input_embeddings().register_forward_pre_hook(lambda *_: heartbeat.beat())

    def _watch(self) -> None:
        store = None
        while not self._over.wait(self.look_s):
            rank, world = distributed.started_as()
            # A collective in C++ that never lets Python run again stops this thread too; this switch needs no Python.
            faulthandler.dump_traceback_later(self.limit_s + 4 * self.look_s, exit=True, file=sys.__stderr__)
            if store is None and world > 1 and torch.distributed.is_initialized():
                store = _own_store(self.look_s)
            self._publish(store, rank)
            if heartbeat.idle_s() > self.limit_s:
                self._conclude(store, rank, world)

    def _conclude(self, store: Any, rank: int, world: int) -> None:
        if store is None and world > 1:
            self.end(
                f"watchdog: rank {rank} of {world} found no other rank within {self.limit_s:g} s (faults.hang_s), "
                f"{self.sign.where}",
                EXIT_STUCK,
            )
        first = self._read(store, world)
        for _ in range(2):  # time for a living rank to be heard
            if self._over.wait(self.look_s):
                return
            self._publish(store, rank)
        signs = self._read(store, world)
        if heartbeat.idle_s() <= self.limit_s:
            return  # it went on meanwhile
        beats = [{r: sign.beat for r, sign in part.items()} for part in (first, signs)]
        silent = {r for r in range(world) if r != rank and (r not in signs or beats[0].get(r) == beats[1][r])}
        if any(sign.idle_s <= self.limit_s for r, sign in signs.items() if r not in silent | {rank}):
            return  # another one works, and this one waits for it
        text = verdict(signs | {rank: self.sign}, silent, self.limit_s)
        if rank != min(set(range(world)) - silent):
            for _ in range(4):  # one rank speaks, gets the time to, and has to hear that this one lives
                self._over.wait(self.look_s)
                self._publish(store, rank)
            text = ""
        self.end(text, EXIT_STUCK)

    def _publish(self, store: Any, rank: int) -> None:
        self.sign.beat += 1
        self.sign.idle_s = heartbeat.idle_s()
        self.sign.where, self.sign.waits = _where(self._main)
        if store is not None:
            with suppress(Exception):  # its keeper, rank 0, is gone: what is known of the others is all there is
                store.set(f"watchdog/{rank}", json.dumps(asdict(self.sign)))

    def _read(self, store: Any, world: int) -> dict[int, Sign]:
        found = {}
        for rank in range(world if store is not None else 0):
            try:
                if store.check([f"watchdog/{rank}"]):
                    found[rank] = Sign(**json.loads(store.get(f"watchdog/{rank}")))
            except Exception:
                break
        return found


def verdict(signs: Mapping[int, Sign], silent: set[int], limit_s: float) -> str:
    """Which rank the others wait for, and what each does."""
    heard = {rank: sign for rank, sign in signs.items() if rank not in silent}
    last = min((sign.step, sign.changes) for sign in heard.values())
    behind = [rank for rank, sign in heard.items() if (sign.step, sign.changes) == last]
    if len(behind) == len(heard):  # all in the same phase: whoever is in no collective holds the others up
        behind = [rank for rank in behind if not heard[rank].waits] or behind
    lines = [f"watchdog: no progress for {limit_s:g} s (faults.hang_s), the job is ended."]
    if silent:
        lines.append(f"rank {_listed(silent)} does not answer: its process is dead or stopped.")
    elif len(behind) < len(heard):
        sign = heard[behind[0]]
        lines.append(f"rank {_listed(behind)} holds the others up, in phase {sign.phase} of step {sign.step}.")
    elif len({sign.where for sign in heard.values()}) > 1:
        lines.append("The ranks wait in different calls: one of them is out of step.")
    else:
        lines.append("All ranks stand in the same place: network, file system, or a phase longer than the limit.")
    for rank, sign in sorted(signs.items()):
        heard_of = "last heard of " if rank in silent else ""
        lines.append(
            f"  rank {rank}: {heard_of}in phase {sign.phase} of step {sign.step}"
            f"{', waiting for other ranks' if sign.waits else ''}, {sign.where}"
        )
    return "\n".join(lines)


def _listed(ranks: Any) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _where(thread: int | None) -> tuple[str, bool]:
    """(the innermost line of this package that a thread is in, and where that has led; whether it is a collective)"""
    frame = sys._current_frames().get(thread)
    package, inner, waits, line = str(Path(__file__).resolve().parent), "", False, ""
    while frame is not None:
        file = frame.f_code.co_filename
        inner = inner or f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
        is_ours = file == f"{package}/distributed.py"  # which waits for rank 0 without a collective too
        waits = waits or is_ours or "torch/distributed/" in file or "deepspeed/comm/" in file
        # Not the one place that all collectives go through: who called it says what is waited for.
        if file.startswith(package) and not is_ours:
            line = f"at {Path(file).relative_to(Path(package).parent)}:{frame.f_lineno} {frame.f_code.co_name}"
            break
        frame = frame.f_back
    return (f"{line}, in {inner}" if line and not line.endswith(inner) else line or f"at {inner}"), waits


def _own_store(timeout_s: float) -> Any:
    """A connection of its own to the process group's store: the main thread may hold the other one for minutes."""
    from datetime import timedelta

    try:
        return torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=max(1.0, timeout_s)),
        )  # fmt: skip
    except Exception as error:
        _say(f"watchdog: rank {distributed.rank()} cannot reach the others ({error})")
        return None


def _say(text: str) -> None:
    """On stderr, if anyone still reads it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _last_words(text: str, code: int) -> None:
    try:
        if text:
            _say(text)
    finally:
        os._exit(code)
