"""What the pools' ranks run for the tests of adapters. Nothing here is a test."""

from pathlib import Path
from unittest import mock

import deepspeed
import numpy as np
import torch

from tests.run.run_cases import run_tiny
from toolkit.batch import Example, TokenBatch
from toolkit.models import build_student, choose_dtype, load_tokenizer, objective_of, shared_vocabulary
from toolkit.pruning.made import materialize
from toolkit.rollout.local import SeededSampling, whole_model
from toolkit.run.loop import DistillationLoop
from toolkit.settings import RunConfig


def run_with_last_words(overrides, prompts, ids):
    """(logits of the token ids by the gathered student, greedy texts by generation mode) at the end of a run."""
    original, found = DistillationLoop.run, {}

    def run(self):
        result = original(self)
        rollout = self.parts.rollout
        with whole_model(self.parts.student.engine) as model, torch.no_grad():
            found["logits"] = model(ids).logits
        kept = rollout.gather
        for mode in ("always", "never"):
            rollout.gather = mode
            sampling = SeededSampling(12, temperature=0.0, seeds=range(len(prompts)))
            found[mode] = [example.response.tolist() for example in rollout.complete(prompts, sampling)]
            found[mode, "ran"] = rollout.last.mode
        rollout.gather = kept
        return result

    with mock.patch.object(DistillationLoop, "run", run):
        run_tiny(overrides)
    return found


def held_after_a_step(overrides):
    """What this rank holds of a student after one step: elements by kind, dtypes, and the adapters it began with."""
    config = RunConfig().with_overrides(overrides)
    path = materialize(config.student, Path(config.cache_dir))
    tokenizer = load_tokenizer(config.student, path)
    vocabulary = shared_vocabulary(tokenizer, tokenizer)
    student = build_student(config, path, choose_dtype(config.precision, torch.device("cpu")), vocabulary)
    engine, named = student.engine, dict(student.model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values()), modifier_rank=None):
        start = {name: p.detach().float().clone() for name, p in trained.items()}
    drawn = torch.rand(())
    batch = TokenBatch.from_examples([Example(np.arange(5, 25), 4)], 0)
    for _ in range(engine.gradient_accumulation_steps()):
        found = student.loss(batch, None, None, objective_of(config.loss))
        engine.backward(found.loss)
        engine.step()
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        masters, gradients = optimizer.fp32_partitioned_groups_flat, optimizer.grad_partitions_flat_buffer.numel()
    else:
        masters, gradients = optimizer.single_partition_of_fp32_groups, None
    states = [
        value.numel() for state in optimizer.optimizer.state.values() for value in state.values() if value.dim() == 1
    ]
    return {
        "start": start, "drawn": drawn, "dtypes": {p.dtype for p in named.values()},
        "master_dtypes": {flat.dtype for flat in masters},
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in trained.values()),
        "frozen": sum(getattr(p, "ds_numel", p.numel()) for name, p in named.items() if name not in trained),
        "frozen_here": sum(
            p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel()
            for name, p in named.items() if name not in trained
        ),
        "masters": sum(flat.numel() for flat in masters), "states": sum(states), "gradients": gradients,
        "frozen_with_gradient": [name for name, p in named.items() if name not in trained and p.grad is not None],
    }  # fmt: skip
