"""Lines on a terminal or in a log that may be gone."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn


def say(text: str, stream: Any = None, write: Callable[..., None] = print) -> None:
    """Prints a line (on stdout by default). A reader that is gone, `| tee` after Ctrl-C, or a full disk is no reason to
    lose a run."""
    stream = stream or sys.stdout
    try:
        write(text, file=stream)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or the flush at exit would change the exit code
    except OSError:
        pass


def last_words(text: str, code: int) -> NoReturn:
    """Say `text` on stderr, if there is any, and end this process now, from any thread."""
    try:
        if text:
            say(text, sys.stderr)
    finally:
        os._exit(code)
