"""When this process last made progress. Long work on one rank says so here, and the watchdog reads it."""

import time

_last_s = time.monotonic()


def beat() -> None:
    """Progress was made: a row read, a layer written, a file hashed. Costs a clock reading."""
    global _last_s
    _last_s = time.monotonic()


def idle_s() -> float:
    """Seconds since the last progress."""
    return time.monotonic() - _last_s
