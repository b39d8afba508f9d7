"""Ranks that hang: each tells the others what it does, and a job that stands still is ended with the rank to blame."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed import TCPStore

from toolkit.ranks import collectives, heartbeat
from toolkit.ranks.output import last_words, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Exit code of a run that its watchdog ended (sysexits' EX_SOFTWARE): starting it again may hang again.
EXIT_STUCK = 70
#: seconds between two looks at a rank, at most
LOOK_EVERY_S = 10.0
#: in the store once a rank has told why the job ends
IS_TOLD = "watchdog/is told"


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

    def __init__(self, limit_s: float, end: Callable[[str, int], None] = last_words):
        self.limit_s, self.look_s = limit_s, min(LOOK_EVERY_S, limit_s / 4)
        self.end, self.sign = end, Sign()
        self._store: TCPStore | None = None
        self._rank, self._world = 0, 1
        self._over = threading.Event()
        self._main = threading.main_thread().ident or 0
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        heartbeat.beat()
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and heartbeat.idle_s() > self.limit_s:
            # A rank that this watch has ended just now broke off the collective that this one hung in: end alike.
            self._thread.join(5 * self.look_s)
        self._over.set()
        self._thread.join(2 * self.look_s)
        faulthandler.cancel_dump_traceback_later()

    def progress(self, phase: str, step: int | None = None) -> None:
        """This rank now does `phase`, of `step` where that changed."""
        self.sign.phase, self.sign.changes = phase, self.sign.changes + 1
        self.sign.step = self.sign.step if step is None else step
        heartbeat.beat()

    def count_passes(self, model: PreTrainedModel) -> None:
        """Each pass of `model` is progress as well: generation and evaluation make many in one phase. Every pass enters
        its input embeddings. It is no new phase: ranks make as many passes as their texts are long."""
        model.get_input_embeddings().register_forward_pre_hook(lambda *_: heartbeat.beat())

    def _watch(self) -> None:
        while self._look():
            if heartbeat.idle_s() > self.limit_s:
                self._conclude()

    def _look(self) -> bool:
        """Wait, tell the others of this rank, and end where one of them has told why; False once the watch is over."""
        if self._over.wait(self.look_s):
            return False
        # A collective in C++ that never lets Python run again stops this thread too; this switch needs no Python.
        faulthandler.dump_traceback_later(self.limit_s + 4 * self.look_s, exit=True, file=sys.__stderr__ or 2)
        self._rank, self._world = collectives.started_as()
        if self._store is None and self._world > 1 and torch.distributed.is_initialized():
            self._store = _own_store(self.look_s)

        # The sign says what this rank does now.
        self.sign.beat += 1
        self.sign.idle_s = heartbeat.idle_s()
        self.sign.where, self.sign.waits = _where(self._main)

        # The others read it in the store, where one of them may have said that the job is over.
        if self._store is not None:
            is_told = False
            with suppress(Exception):  # its keeper, rank 0, is gone: what is known of the others is all there is
                self._store.set(f"watchdog/{self._rank}", json.dumps(asdict(self.sign)))
                is_told = self._store.check([IS_TOLD])
            if is_told:
                self.end("", EXIT_STUCK)
        return True

    def _conclude(self) -> None:
        """This rank has stood still for too long: end the job unless another one works."""
        rank, world = self._rank, self._world
        if self._store is None and world > 1:
            limit = f"within {self.limit_s:g} s (faults.hang_s), {self.sign.where}"
            self.end(f"watchdog: rank {rank} of {world} found no other rank {limit}", EXIT_STUCK)
            return

        # A living rank tells something new within two looks; the others count as silent.
        first = self._read()
        if not (self._look() and self._look()):
            return
        signs = self._read()
        if heartbeat.idle_s() <= self.limit_s:
            return  # it went on meanwhile
        beats = [{r: sign.beat for r, sign in part.items()} for part in (first, signs)]
        silent = {r for r in range(world) if r != rank and (r not in signs or beats[0].get(r) == beats[1][r])}

        # If another rank still works, this one waits for it. Else the lowest rank that is not silent speaks.
        if any(sign.idle_s <= self.limit_s for r, sign in signs.items() if r not in silent | {rank}):
            return
        if rank != min(set(range(world)) - silent):
            return
        text = verdict(signs | {rank: self.sign}, silent, self.limit_s)
        if self._store is not None:
            say(text, sys.stderr)
            text = ""
            with suppress(Exception):
                self._store.set(IS_TOLD, "")
            # Rank 0 keeps the store: without it the others could not hear this.
            self._over.wait(2 * self.look_s)
        self.end(text, EXIT_STUCK)

    def _read(self) -> dict[int, Sign]:
        """What each rank told last, as far as the store can be reached."""
        found: dict[int, Sign] = {}
        if self._store is None:
            return found
        for rank in range(self._world):
            try:
                if self._store.check([f"watchdog/{rank}"]):
                    found[rank] = Sign(**json.loads(self._store.get(f"watchdog/{rank}")))
            except Exception:
                break
        return found


def verdict(signs: Mapping[int, Sign], silent: set[int], limit_s: float) -> str:
    """Which rank the others wait for, and what each does."""
    # A rank is behind if it is in an earlier phase, or in the same one and in no collective.
    heard = {rank: sign for rank, sign in signs.items() if rank not in silent}
    last = min((sign.step, sign.changes) for sign in heard.values())
    behind = [rank for rank, sign in heard.items() if (sign.step, sign.changes) == last]
    if len(behind) == len(heard):  # all in the same phase: whoever is in no collective holds the others up
        behind = [rank for rank in behind if not heard[rank].waits] or behind

    # The first line says whom the others wait for, and each further one what a rank does.
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
        waiting = ", waiting for other ranks" if sign.waits else ""
        lines.append(f"  rank {rank}: {heard_of}in phase {sign.phase} of step {sign.step}{waiting}, {sign.where}")
    return "\n".join(lines)


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _where(thread: int) -> tuple[str, bool]:
    """(the innermost line of this package that a thread is in, and where that has led; whether it is a collective)"""
    frame = sys._current_frames().get(thread)
    package, inner, waits, line = str(Path(__file__).resolve().parents[1]), "", False, ""
    while frame is not None:
        file = frame.f_code.co_filename
        inner = inner or f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
        # There a rank also waits for what rank 0 does, without any collective of torch.
        is_ours = file == collectives.__file__
        waits = waits or is_ours or "torch/distributed/" in file or "deepspeed/comm/" in file
        # Not the one place that all collectives go through: who called it says what is waited for.
        if file.startswith(package) and not is_ours:
            line = f"at {Path(file).relative_to(Path(package).parent)}:{frame.f_lineno} {frame.f_code.co_name}"
            break
        frame = frame.f_back
    return (f"{line}, in {inner}" if line and not line.endswith(inner) else line or f"at {inner}"), waits


def _own_store(timeout_s: float) -> TCPStore | None:
    """A connection of its own to the process group's store: the main thread may hold the other one for minutes."""
    host, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), max(1.0, timeout_s)
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
    except Exception as error:
        say(f"watchdog: rank {collectives.rank()} cannot reach the others ({error})", sys.stderr)
        return None
