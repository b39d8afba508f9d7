"""What the pools' ranks run for the loop's tests: runs and one step, observed. Nothing here is a test."""

import contextlib
import hashlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.allocations import LargestTensor
from tests.rollout.local_cases import failing
from tests.run.run_cases import choosing, run_saying, run_tiny
from tests.tiny import tiny_overrides
from toolkit.batch import Example
from toolkit.divergences.tiles import Tiles
from toolkit.models import build_student, load_tokenizer, objective_of, row_layout, shared_vocabulary
from toolkit.pruning.made import materialize
from toolkit.rollout.local import GatheredRollout, SeededSampling
from toolkit.run import inputs
from toolkit.settings import RunConfig
from toolkit.teachers.live import build_teacher


def run_recording_sources(overrides):
    """For each step (source, hash of this rank's examples)."""
    seen = []

    def choose(loop, step, choose_examples):
        source, examples = choose_examples(loop, step)
        digest = hashlib.sha256(b"".join(e.tokens.tobytes() for e in examples)).hexdigest()
        seen.append((source.value, digest))
        return source, examples

    with choosing(choose):
        run_tiny(overrides)
    return seen


def run_recording_texts(overrides):
    """For each call of a training step that generates: its prompts, the seeds of its texts, and these, on this rank.
    And what each step learns from."""
    calls, learned, original = [], [], GatheredRollout.complete

    def choose(loop, step, choose_examples):
        def complete(self, prompts, sampling):
            found = original(self, prompts, sampling)
            texts = [example.tokens.tolist() for example in found]
            calls.append(([prompt.tolist() for prompt in prompts], list(sampling.seeds), texts))
            return found

        with mock.patch.object(GatheredRollout, "complete", complete):
            source, examples = choose_examples(loop, step)
        learned.append([example.tokens.tolist() for example in examples])
        return source, examples

    with choosing(choose):
        run_tiny(overrides)
    return calls, learned


def run_generating_aside(overrides, fail=False):
    """A run that generates before every step and throws the text away; with `fail`, generation raises half-way."""

    def choose(loop, step, choose_examples):
        prompts = [example.prompt for example in loop.dataset.examples[:3]]
        try:
            with failing("choose_tokens", call=3) if fail else contextlib.nullcontext():
                loop.parts.rollout.complete(prompts, SeededSampling(5, seeds=range(len(prompts))))
        except RuntimeError as error:
            assert fail and "made to fail" in str(error)
        else:
            assert not fail
        return choose_examples(loop, step)

    with choosing(choose):
        return run_tiny(overrides)


def run_with_a_tokenizer_that_cannot_be_saved(overrides):
    """(exit code, stdout, stderr) of a run whose tokenizer holds a setting that is not of JSON's types."""
    load = inputs.load_tokenizer

    def loaded(model, path):
        tokenizer = load(model, path)
        tokenizer.init_kwargs["made_by"] = object()
        return tokenizer

    with mock.patch.object(inputs, "load_tokenizer", loaded):
        return run_saying(overrides)


def loss_step(folder, memory_budget_mib):
    """Of one micro-batch through teacher and student: the most elements of any tensor that was made, targets times
    vocabulary, tiles of the loss, and how often each head was put away (after each gather once)."""
    overrides = tiny_overrides(folder, loss__memory_budget_mib=memory_budget_mib)
    config = RunConfig().with_overrides(overrides)
    paths = [materialize(model, Path(config.cache_dir)) for model in (config.teacher, config.student)]
    tokenizer = load_tokenizer(config.student, paths[1])
    vocabulary = shared_vocabulary(tokenizer, tokenizer)._replace(layout=row_layout(config.student, paths[1]))
    teacher = build_teacher(config, paths[0], torch.float32, vocabulary)
    student = build_student(config, paths[1], torch.float32, vocabulary)
    draw = np.random.default_rng(5)
    batch = vocabulary.layout.batch([Example(draw.integers(5, 300, 96), 10) for _ in range(16)], 0)
    heads = {
        "teacher": teacher.model.get_output_embeddings().weight,
        "student": student.model.get_output_embeddings().weight,
    }
    gathers = dict.fromkeys(heads, 0)

    def counted(name, partition):
        def call(*args, **kwargs):
            gathers[name] += 1
            return partition(*args, **kwargs)

        return call

    for name, head in heads.items():
        head.partition = counted(name, head.partition)
    tiles, project = [], Tiles._project

    def counting(self, tile, columns):
        tiles.append((tile, columns))
        return project(self, tile, columns)

    with mock.patch.object(Tiles, "_project", counting), LargestTensor() as largest:
        hidden_NT = teacher.signals([batch])[0]
        with teacher.head() as head:
            found = student.loss(batch, hidden_NT, head, objective_of(config.loss), 1e-4)
            student.engine.backward(found.loss)
        student.engine.step()
    return largest.numel, batch.num_targets * vocabulary.size, len(tiles), gathers
