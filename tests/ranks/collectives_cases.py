"""What the pools' ranks run for the tests of what ranks do together. Nothing here is a test."""

import contextlib
import io
from unittest import mock

import torch

from toolkit.ranks import collectives, launch


def error_of_one_rank(kind, failing_rank):
    """What `together` raises here where its work raises `kind` on this one rank."""

    def work():
        if collectives.rank() == failing_rank:
            raise kind("no room")

    try:
        collectives.together(work)
    except Exception as error:
        return type(error), str(error)


def words_of_one_message(failing_ranks, is_told):
    """(exit code, stderr) of this rank where a ValueError of these ranks meets `one_message`."""
    said = io.StringIO()
    try:
        with (
            mock.patch.object(launch, "stop", lambda: None),
            contextlib.redirect_stderr(said),
            launch.one_message(),
        ):
            if collectives.rank() in failing_ranks:
                raise (collectives.Told if is_told else ValueError)("this is wrong")
    except SystemExit as exit_:
        return exit_.code, said.getvalue()
    finally:
        torch.distributed.barrier()
    return 0, said.getvalue()


def error_of_folders(folders):
    """What `check_shared` raises here where each rank has a folder of its own."""
    try:
        collectives.check_shared(folders[collectives.rank()], within_s=0.5)
    except ValueError as error:
        return str(error)
