"""What the pools' ranks run: whole runs, observed. Nothing here is a test."""

import hashlib

import torch

from toolkit.config import RunConfig
from toolkit.loop import DistillationLoop
from toolkit.run import main


def run_tiny(overrides):
    """The summary of a whole run through `main`."""
    return _main(overrides)


def run_expecting_exit(overrides):
    """The exit code of a run that has to fail."""
    try:
        _main(overrides)
    except SystemExit as exit_:
        return exit_.code
    return 0


def run_recording_sources(overrides):
    """For each step (source, hash of this rank's examples)."""
    seen, original = [], DistillationLoop.choose_examples

    def choose(self, step):
        source, examples = original(self, step)
        digest = hashlib.sha256(b"".join(e.tokens.tobytes() for e in examples)).hexdigest()
        seen.append((source.value, digest))
        return source, examples

    return _observed(choose, overrides, seen)


def run_generating_aside(overrides, fail=False):
    """A run that generates before every step and throws the text away; with `fail`, generation raises half-way."""
    from toolkit.rollout.engine import SeededSampling

    original = DistillationLoop.choose_examples

    def choose(self, step):
        prompts = [example.prompt for example in self.dataset.examples[:3]]
        if fail:
            prompts = [prompts[0], prompts[1] + 10**6]  # not in the embedding: raises inside the model
        try:
            self.rollout.complete(prompts, SeededSampling(5, seeds=range(len(prompts))))
        except IndexError:
            assert fail
        else:
            assert not fail
        return original(self, step)

    return _observed(choose, overrides, None)


def _observed(choose, overrides, result):
    original = DistillationLoop.choose_examples
    DistillationLoop.choose_examples = choose
    try:
        summary = _main(overrides)
    finally:
        DistillationLoop.choose_examples = original
    return summary if result is None else result


def _main(overrides):
    from toolkit import distributed

    keep, distributed.stop = distributed.stop, lambda: None  # the pool goes on using its group
    try:
        return main(RunConfig(name="tiny"), overrides)
    finally:
        distributed.stop = keep
        torch.distributed.barrier()
