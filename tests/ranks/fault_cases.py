"""What the pools' ranks run for the tests of faults: runs with a loss or memory that goes wrong.

Nothing here is a test.
"""

import contextlib
import hashlib
from unittest import mock

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.allocations import MemoryLimit
from tests.run.run_cases import run_saying, signalled
from toolkit.models import Student, engines
from toolkit.models.shards import pieces
from toolkit.ranks import collectives
from toolkit.rollout import local
from toolkit.run.loop import DistillationLoop

POISONS = {
    "loss": lambda found: found._replace(
        loss=found.loss * float("nan"), divergence_nats=found.divergence_nats * float("inf")
    ),
    "gradient": lambda found: found._replace(loss=found.loss * float("nan")),
    "spike": lambda found: found._replace(loss=found.loss * 1e3, divergence_nats=found.divergence_nats * 1e3),
}


def run_poisoned(overrides, poison, steps, ranks=(1,)):
    """(exit code, stdout, stderr, digest of this rank's weights after each step) of a run whose loss or gradient goes
    wrong on these ranks at these steps (counted from 1)."""
    step_of, loss_of, digests, now = DistillationLoop.step, Student.loss, [], []

    def step(self, index):
        now[:] = [index + 1]
        record = step_of(self, index)
        digest = hashlib.sha256()
        for piece in pieces(self.parts.student.engine):
            digest.update(piece.tensor.numpy().tobytes())
        digests.append(digest.hexdigest())
        return record

    def loss(self, *args, **kwargs):
        found = loss_of(self, *args, **kwargs)
        is_training = torch.is_grad_enabled() and now
        return POISONS[poison](found) if is_training and now[0] in steps and collectives.rank() in ranks else found

    with mock.patch.object(DistillationLoop, "step", step), mock.patch.object(Student, "loss", loss):
        return *run_saying(overrides), digests


def run_poisoned_until(overrides, poison, steps, stop_after, number):
    """As `run_poisoned`, with a signal to rank 0 while step `stop_after` runs."""
    with signalled(number, stop_after):
        return run_poisoned(overrides, poison, steps)


def run_short_of_memory(overrides, limits):
    """(exit code, stderr, the largest result in bytes of each part) of a run whose teacher layers, generation or loss
    on this rank may make no tensor above `limits` (bytes, by part; a part that is not named has no limit)."""
    parts = {
        "loss": (engines, "fused_linear_divergence", lambda *args, **kwargs: torch.is_grad_enabled()),
        "teacher": (LlamaDecoderLayer, "forward", lambda layer, *args, **kwargs: kwargs.get("past_key_values") is None
                    and not torch.is_grad_enabled() and not layer.training),
        "generation": (local, "decode", lambda *args, **kwargs: True),
    }  # fmt: skip
    watched = {part: MemoryLimit(limits.get(part, float("inf"))) for part in parts}

    def within(limit, is_meant, call):
        def limited(*args, **kwargs):
            with limit if is_meant(*args, **kwargs) else contextlib.nullcontext():
                return call(*args, **kwargs)

        return limited

    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in parts.values()]
    for (part, (owner, name, is_meant)), (*_, call) in zip(parts.items(), kept, strict=True):
        setattr(owner, name, within(watched[part], is_meant, call))
    try:
        code, _, said = run_saying(overrides)
    finally:
        for owner, name, call in kept:
            setattr(owner, name, call)
    return code, said, {part: limit.most_bytes for part, limit in watched.items()}


def run_short_on_last_rank(overrides, limits):
    return run_short_of_memory(overrides, limits if collectives.rank() == collectives.world() - 1 else {})
