"""One job at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from toolkit.ranks import collectives

LOCK = "lock"


#: longer than deepspeed's launcher gives ranks that it ends
LOCK_WAIT_S = 40.0


@contextlib.contextmanager
def sole_use(
    folder: Path,
    wait_s: float = LOCK_WAIT_S,
    name: str = LOCK,
    instead: str = "give this run a name of its own (name=...)",
) -> Iterator[None]:
    """No other job works in this run's `folder` inside the `with` block: rank 0 holds a lock on its file `name`.

    The kernel frees the lock with the process, however that ends, so there is none to clear away; over NFS the server
    does. A job that ends just now is waited for. Collective. Raises ValueError, naming the other job and what to do
    `instead`, after `wait_s`. Where a file system has no locks the run goes on, with a warning.
    """
    handle = collectives.together(lambda: _lock(folder / name, wait_s, instead) if collectives.rank() == 0 else None)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path, wait_s: float, instead: str) -> int | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    what = path.parent if path.name == LOCK else path.with_suffix("")
    deadline_s, is_told = time.monotonic() + wait_s, False
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None  # it takes no files: a finished run's archive, or the run itself says so when it writes
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            owner = os.pread(handle, 1000, 0).decode(errors="replace").strip()
            if time.monotonic() > deadline_s:
                os.close(handle)
                raise ValueError(
                    f"{what} is in use by another job ({owner}), which has not ended within {wait_s:g} s: two would "
                    f"overwrite each other's files. Stop that one, or {instead}"
                ) from None
            if not is_told:
                print(f"{what} is in use by another job ({owner}); waiting for its end", flush=True)
                is_told = True
            time.sleep(min(1.0, wait_s))
        except OSError as error:
            print(
                f"warning: {path} cannot be locked ({error}): see to it that no two jobs work in this folder",
                flush=True,
            )
            break
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n".encode(), 0)
    return handle
