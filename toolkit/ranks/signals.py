"""Signals that stop a run where a step ends."""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from toolkit.ranks import collectives
from toolkit.ranks.output import last_words, say

#: Exit code of a run that saved itself and wants to be started again with the same command (sysexits' EX_TEMPFAIL).
EXIT_LATER = 75
#: Exit code of a run that was stopped before it had saved anything, as of other errors: a repetition would do the same.
EXIT_IN_VAIN = 2
#: starts in a row that faults.grace_s may end with nothing saved: one was preempted early, two have too little time
MOST_VAIN_STARTS = 2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
END_OF_WATCH = 0  # no signal has this number
#: signals this soon after the first are the same request: on Ctrl-C, a terminal and a launcher both send one
SAME_REQUEST_S = 2.0
#: seconds between two looks at the launcher
LAUNCHER_LOOK_S = 1.0


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
        self._starts: Path | None = None
        self.vain_starts = 0  # of which nothing was saved, in a row, this one included
        self._previous: dict[int, Any] = {}

    @contextmanager
    def watched(self) -> Iterator[StopSignals]:
        """Handles the signals inside the `with` block, in the main thread; elsewhere it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        # The numbers of signals go through a pipe to a thread, which END_OF_WATCH ends.
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

    def count_start(self, file: Path) -> None:
        """Counts, in `file`, the starts of a run of which nothing is saved; `kept` ends the count. Collective."""
        self._starts = file

        def count() -> int:
            text = file.read_text().strip() if file.is_file() else ""
            before = int(text) if text.isdigit() else 0
            with suppress(OSError):  # a finished run's archive
                file.write_text(f"{before + 1}\n")
            return before + 1

        self.vain_starts = collectives.from_main_rank(count)

    def kept(self) -> None:
        """What this start did is saved."""
        self.in_vain, self.vain_starts = False, 0
        if self._starts is not None and collectives.rank() == 0:
            self._starts.unlink(missing_ok=True)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; alike on all ranks. Collective."""
        return collectives.anywhere(self.received)

    def stop_if_asked(self, where: str) -> None:
        """Raises GoOnLater where a signal came to any rank. Collective."""
        if self.agreed():
            raise GoOnLater(f"stopped by a signal {where}")

    def _handle(self, number: int, frame: Any) -> None:
        self.received = True

    def _watch(self, told: int, launchers: list[psutil.Process]) -> None:
        asked_s, poll = math.inf, select.poll()
        poll.register(told, select.POLLIN)
        while True:
            # Since the last look a signal may have come, or the launcher may have ended.
            numbers = os.read(told, 256) if poll.poll(1000 * LAUNCHER_LOOK_S) else b""
            if END_OF_WATCH in numbers:
                return
            reasons = [signal.Signals(number).name for number in numbers if number in STOP_SIGNALS]
            if any(map(_is_gone, launchers)):
                reasons, launchers = [*reasons, "the deepspeed command was ended"], []

            # The first signal is a request; a later one ends this process.
            now_s = time.monotonic()
            if reasons and asked_s == math.inf:
                self.received, asked_s = True, now_s
                if collectives.rank() == 0:
                    how = "the run saves and stops where its step ends; a second signal exits at once"
                    say(f"{reasons[0]}: {how}", sys.stderr)
            elif reasons and now_s - asked_s > SAME_REQUEST_S:
                last_words(f"{reasons[0]} again: rank {collectives.rank()} exits at once", EXIT_LATER)

            # The process also ends when no step does in time. Its exit code asks for another start if that helps.
            if now_s - asked_s > self.grace_s:
                late = f"no step ended within faults.grace_s = {self.grace_s:g} s of the signal, rank "
                late += f"{collectives.rank()} exits; "
                if self.in_vain:
                    last_words(f"{late}nothing was saved since the start: set checkpoint.every_steps", EXIT_IN_VAIN)
                if self.vain_starts >= MOST_VAIN_STARTS:
                    starts = f"{self.vain_starts} starts in a row have saved nothing: give the job more time"
                    last_words(late + starts, EXIT_IN_VAIN)
                last_words(f"{late}the newest checkpoint stands", EXIT_LATER)


def _forget_signals() -> None:
    """A forked child, of data loading for instance, handles signals as this process did before the run."""
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
