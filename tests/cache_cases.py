"""What the pools' ranks run for the teacher cache's tests. Nothing here is a test."""

import os
import signal


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

    run.build_teacher = counting
    try:
        run_tiny(overrides)
    finally:
        run.build_teacher = build
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

    build._write = signalling
    try:
        return command(arguments)
    finally:
        build._write = write


def command_that_cannot_rename(arguments, target):
    """A command that cannot give a folder its last name, as where somebody made another folder of that name."""
    from pathlib import Path

    from tests.evaluation_cases import command

    rename = Path.rename

    def refusing(self, to):
        if str(to) == target:
            raise OSError("no place for it")
        return rename(self, to)

    Path.rename = refusing
    try:
        return command(arguments)
    finally:
        Path.rename = rename
