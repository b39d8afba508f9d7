"""What the pools' ranks run for the teacher cache's tests. Nothing here is a test."""

import os
import signal
from unittest import mock


def run_counting_teachers(overrides):
    """How many teachers a whole run has put behind an engine on this rank."""
    from tests.engine_cases import run_tiny
    from toolkit import run
    from toolkit.models import Teacher

    build, built = run.build_teacher, []

    def counting(*args):
        built.append(build(*args))
        assert isinstance(built[-1], Teacher)
        return built[-1]

    with mock.patch.object(run, "build_teacher", counting):
        run_tiny(overrides)
    return len(built)


def stopped_command(arguments, after_rounds):
    """A command of which rank 1 gets a real SIGTERM once so many rounds of shards are written."""
    import importlib

    from tests.evaluation_cases import command
    from toolkit import distributed

    build = importlib.import_module("toolkit.teacher_cache.build")

    write, written = build._write, []

    def signalling(*args):
        write(*args)
        written.append(args[0])
        if len(written) == after_rounds and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(build, "_write", signalling):
        return command(arguments)


def command_that_cannot_rename(arguments, target):
    """A command that cannot give a folder its last name, as where somebody made another folder of that name."""
    from pathlib import Path

    from tests.evaluation_cases import command

    rename = Path.rename

    def refusing(self, to):
        if str(to) == target:
            raise OSError("no place for it")
        return rename(self, to)

    with mock.patch.object(Path, "rename", refusing):
        return command(arguments)
