"""What the pools' ranks run for the teacher cache's tests. Nothing here is a test."""

import functools
import os
import signal
from pathlib import Path
from unittest import mock


def run_counting_teachers(overrides):
    """How many teachers a whole run has put behind an engine on this rank."""
    from tests.run.run_cases import run_tiny
    from toolkit.run import build as building
    from toolkit.teachers.live import Teacher

    build, built = building.build_teacher, []

    def counting(*args):
        built.append(build(*args))
        assert isinstance(built[-1], Teacher)
        return built[-1]

    with mock.patch.object(building, "build_teacher", counting):
        run_tiny(overrides)
    return len(built)


def stopped_command(arguments, after_rounds):
    """A command of which rank 1 gets a real SIGTERM once so many rounds of shards are written."""
    import importlib

    from tests.evaluation.evaluation_cases import command
    from toolkit.ranks import collectives

    build = importlib.import_module("toolkit.teachers.cache.build")

    write, written = build._write, []

    def signalling(*args):
        write(*args)
        written.append(args[0])
        if len(written) == after_rounds and collectives.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(build, "_write", signalling):
        return command(arguments)


def command_that_cannot_rename(arguments, target):
    """A command that cannot give a folder its last name, as where somebody made another folder of that name."""
    from pathlib import Path

    from tests.evaluation.evaluation_cases import command

    rename = Path.rename

    def refusing(self, to):
        if str(to) == target:
            raise OSError("no place for it")
        return rename(self, to)

    with mock.patch.object(Path, "rename", refusing):
        return command(arguments)


def error_of_build(folders):
    """What `build` raises here where each rank has a folder of its own."""
    from toolkit.ranks import collectives
    from toolkit.teachers.cache import build

    short = functools.partial(collectives.check_shared, within_s=0.5)
    try:
        with mock.patch.object(collectives, "check_shared", short):
            build(folders[collectives.rank()], {}, [[]], None, None, None)
    except ValueError as error:
        return str(error)


def command_of_a_late_node(arguments, folder):
    """A command of which rank 1 sees nothing in `folder`, as over NFS for a while after another node made it."""
    from tests.evaluation.evaluation_cases import command
    from toolkit.ranks import collectives

    is_file = Path.is_file

    def seen(self):
        return is_file(self) and not (collectives.rank() == 1 and str(self.parent) == folder)

    with mock.patch.object(Path, "is_file", seen):
        return command(arguments)
