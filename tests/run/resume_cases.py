"""What the pools' ranks run for the tests of checkpoints: runs that cannot write, or are read along.

Nothing here is a test.
"""

import contextlib
import io
import resource
import signal
from unittest import mock

from tests.run.run_cases import run_expecting_exit, run_saying, signalled
from toolkit.ranks import collectives
from toolkit.run import build
from toolkit.run.checkpoint import Checkpoints
from toolkit.storage import manifest


def run_telling(overrides, file):
    """The exit code of a run whose rank 0 writes what it says to `file`, at once."""
    opened = file.open("w", buffering=1) if collectives.rank() == 0 else io.StringIO()
    with opened, contextlib.redirect_stdout(opened):
        return run_expecting_exit(overrides)[0]


def run_with_failing_writes(overrides, steps):
    """A run whose last rank cannot write more than 4 KiB at these steps: a limit that the kernel enforces, as it does
    that of a full disk."""
    write = manifest.write_safetensors

    def limited(path, tensors):
        fails = int(path.parent.name[5:13]) in steps and collectives.rank() == collectives.world() - 1
        with no_room_for_files() if fails else contextlib.nullcontext():
            return write(path, tensors)

    with mock.patch.object(manifest, "write_safetensors", limited):
        return run_saying(overrides)


def run_until_with_failing_writes(overrides, stop_after, number, steps):
    """As `run_until`, with signals to rank 0 and checkpoints of these steps that cannot be written."""
    with signalled(number, stop_after):
        return run_with_failing_writes(overrides, steps)


def run_with_failing_exports(overrides, names):
    """(exit code, stdout, stderr) of a run in which there is no room for the exports into folders of these names."""
    export = build.export_student

    def limited(student, tokenizer, folder):
        with no_room_for_files() if folder.name in names else contextlib.nullcontext():
            return export(student, tokenizer, folder)

    with mock.patch.object(build, "export_student", limited):
        return run_saying(overrides)


@contextlib.contextmanager
def no_room_for_files(most_bytes=4096):
    """No file of this process may grow above this: the kernel refuses the write, as it does on a full disk."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def newest_checkpoint(folders):
    """The name of the one to resume from, where each rank sees a folder of its own."""
    return Checkpoints(folders[collectives.rank()], keep=2).newest()[0].folder.name
