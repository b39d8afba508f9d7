"""What the pools' ranks run: whole runs, and what was said. Nothing here is a test."""

import contextlib
import importlib
import io
import os
from unittest import mock

import torch

from toolkit.models import build
from toolkit.ranks import collectives, launch
from toolkit.run import sharding
from toolkit.run.loop import DistillationLoop
from toolkit.run.recipe import main
from toolkit.settings import RunConfig


def run_tiny(overrides, recipe=None):
    """The summary of a whole run through `main`."""
    try:
        with mock.patch.object(launch, "stop", lambda: None):  # the pool goes on using its group
            return main(recipe or RunConfig(name="tiny"), overrides)
    finally:
        torch.distributed.barrier()


def run_with_own(overrides_by_rank):
    """(exit code, what was said on stderr) of a run that is started on each rank with settings of its own."""
    return run_expecting_exit(overrides_by_rank[collectives.rank()])


def run_recipe(name, overrides):
    """The summary of a file of recipes/ with changed settings."""
    return run_tiny(overrides, importlib.import_module(f"recipes.{name}").RECIPE)


def run_expecting_exit(overrides, recipe=None):
    """(exit code, what was said on stderr) of a run that has to fail."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            run_tiny(overrides, recipe)
    except SystemExit as exit_:
        return exit_.code, said.getvalue()
    return 0, said.getvalue()


def run_saying(overrides, recipe=None):
    """(exit code, stdout, stderr) of a run."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code, err = run_expecting_exit(overrides, recipe)
    return code, out.getvalue(), err


def run_with_free(overrides, free_bytes):
    """As `run_saying`, on ranks that have so much free memory; a run that is refused has read no weights."""
    with (
        mock.patch.object(sharding, "free_bytes", lambda: free_bytes),
        mock.patch.object(build, "load_model", side_effect=build.load_model) as loaded,
    ):
        code, out, err = run_saying(overrides)
    assert loaded.called == (code == 0)
    return code, out, err


def run_until(overrides, stop_after, number, ranks=(0,), recipe=None):
    """(exit code, stdout, stderr) of a run in which these ranks get a real signal while step `stop_after` runs."""
    with signalled(number, stop_after, ranks):
        return run_saying(overrides, recipe)


@contextlib.contextmanager
def choosing(choose):
    """`choose(loop, step, choose_examples)` in the place of the loop's `choose_examples`."""
    original = DistillationLoop.choose_examples
    with mock.patch.object(DistillationLoop, "choose_examples", lambda self, step: choose(self, step, original)):
        yield


@contextlib.contextmanager
def signalled(number, step_number, ranks=(0,)):
    """These ranks get a real signal while this step (counted from 1) runs."""

    def choose(loop, step, choose_examples):
        if step + 1 == step_number and collectives.rank() in ranks:
            os.kill(os.getpid(), number)
        return choose_examples(loop, step)

    with choosing(choose):
        yield
