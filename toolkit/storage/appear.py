"""Folders that appear whole, by one rename, and files that outlive a power cut."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path


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


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, whole or absent: `make` fills another one, which is renamed. One that is there is taken as it is."""
    if not folder.is_dir():
        # Not the process id: containers share a cache and repeat ids, and a killed run leaves its folder behind.
        unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.unfinished")
        unfinished.mkdir(parents=True)
        try:
            make(unfinished)
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have made it meanwhile
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
