"""Files and folders that are whole or absent: they are made under another name, and one rename gives them their own.

| the writer | what is there already | function |
| --- | --- | --- |
| this job alone | is replaced | `new_file`, `new_folder` |
| several jobs that share a cache | stays (folder) or is replaced by an equal one (file) | `made_once`, `new_file(is_shared=True)` |
| all ranks of this job, into one folder | as `give_name` is told | `unfinished_name`, and `give_name` at the end |

`durable` says whether the result outlives a power cut, too. A kill of the process never leaves half of it under its name.
What a kill leaves beside it ends with `UNFINISHED` or `DELETING`, and the next job that makes the same thing removes it.
"""  # noqa: E501 (a row of a table is one line)

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

UNFINISHED, DELETING = ".unfinished", ".deleting"


def to_disk(*paths: Path) -> None:
    """Waits until these files' contents, or these folders' names, would outlive a power cut.

    Raises OSError where a file's contents cannot be written. A folder that may not be read, or whose file system cannot
    promise this for folders, is passed over.
    """
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError:
            if not path.is_dir():
                raise


def unfinished_name(path: Path, is_shared: bool = False) -> Path:
    """Where `path` is made. `is_shared`: several jobs may make it at once, and each gets a name of its own."""
    # A process id would not do: containers that share a cache have the same ids.
    own = f".{secrets.token_hex(8)}" if is_shared else ""
    return path.with_name(f"{path.name}{own}{UNFINISHED}")


def give_name(made: Path, final: Path, *, durable: bool, replaces: bool = True) -> None:
    """Renames the file or folder `made`, which is complete, to `final` on the same file system.

    durable: all of `made` is on disk before it has its name, and the name is on disk when this returns.
    replaces: False leaves a folder with files in it as it is, and raises OSError.
    """
    if durable:
        to_disk(*made.rglob("*"), made)  # a file has nothing below it
    # A folder cannot be renamed onto another one: the old one loses its name first, and between the two renames there
    # is none of this name.
    old = _put_aside(final) if replaces and made.is_dir() else None
    made.rename(final)
    if durable:
        to_disk(final.parent, *final.parent.parents[:2])  # the folders above may be as new as `final`
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def emptied(folder: Path) -> Path:
    """`folder`, made anew without the files that a killed job left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def remove(folder: Path) -> None:
    """Deletes `folder` if it is there. A kill may leave a part of it, but not under its name."""
    shutil.rmtree(_put_aside(folder), ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool, is_shared: bool = False) -> Iterator[Path]:
    """Yields the name to write the file under; after the block it becomes `path`, in place of an older file.

    If the block raises, the older file stays and nothing is left beside it. durable, is_shared: as above.
    """
    unfinished = unfinished_name(path, is_shared)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        give_name(unfinished, path, durable=durable)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, durable: bool, is_shared: bool = False) -> Iterator[Path]:
    """Yields an empty folder to fill; after the block it becomes `path`, in place of an older one. Where several jobs
    may make it (`is_shared`) the first one's stays, and the others get an OSError.

    If the block raises, the older folder stays and nothing is left beside it.
    """
    unfinished = unfinished_name(path, is_shared)
    try:
        yield emptied(unfinished)
        give_name(unfinished, path, durable=durable, replaces=not is_shared)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """The folder `path`, which `make` fills (it gets an empty folder) unless it is there already. Any number of jobs
    may call this at once: the first one's folder stays, and all of them use it."""
    if not path.is_dir():
        try:
            with new_folder(path, durable=False, is_shared=True) as unfinished:
                make(unfinished)
        except OSError:
            if not path.is_dir():  # else another job has made it meanwhile
                raise
    return path


def _put_aside(folder: Path) -> Path:
    """Renames `folder` if it is there, in place of what a kill left under that other name, which is returned."""
    doomed = folder.with_name(folder.name + DELETING)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
    return doomed
