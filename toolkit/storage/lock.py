"""One job at a time in a folder."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from toolkit.ranks import collectives

LOCK = "lock"
#: a little longer than deepspeed's launcher gives ranks that it ends: a job in its last seconds is waited for
LOCK_WAIT_S = 40.0


@contextlib.contextmanager
def sole_use(
    folder: Path,
    wait_s: float = LOCK_WAIT_S,
    name: str = LOCK,
    instead: str = "give this run a name of its own (name=...)",
) -> Iterator[None]:
    """Inside the `with` block no other job works in `folder`: rank 0 holds a lock on its file `name`. Collective.

    The kernel, over NFS the server, frees the lock when the process ends, however it ends, so no lock is ever left
    behind. Raises ValueError, naming the other job and what to do `instead`, if that one has not ended within `wait_s`
    seconds. Where a file system has no locks the run goes on, with a warning.
    """
    handle = collectives.together(lambda: _lock(folder / name, wait_s, instead) if collectives.rank() == 0 else None)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path, wait_s: float, instead: str) -> int | None:
    """The open file descriptor that holds the lock; None where no file can be made."""
    # Where no file can be made, in a finished run's archive for instance, no other job can overwrite one either.
    path.parent.mkdir(parents=True, exist_ok=True)
    what = path.parent if path.name == LOCK else path.with_suffix("")
    deadline_s, is_told = time.monotonic() + wait_s, False
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None

    # This job asks for the lock until it is free or the wait is over. The file says who holds it.
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            owner = os.pread(handle, 1000, 0).decode(errors="replace").strip()
            if time.monotonic() > deadline_s:
                os.close(handle)
                wait = f"which has not ended within {wait_s:g} s"
                raise ValueError(
                    f"{what} is in use by another job ({owner}), {wait}: stop that one, or {instead}"
                ) from None
            if not is_told:
                print(f"{what} is in use by another job ({owner}); waiting for its end", flush=True)
                is_told = True
            time.sleep(min(1.0, wait_s))
        except OSError as error:
            print(f"warning: {path} cannot be locked ({error}): make sure that no two jobs work there", flush=True)
            break

    # Say who holds it, to jobs that wait.
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n".encode(), 0)
    return handle
