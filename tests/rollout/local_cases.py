"""What the pools' ranks run for the tests of generation by the student itself. Nothing here is a test."""

import contextlib
import operator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.tiny import tiny_overrides
from toolkit.models import build_student, load_tokenizer, row_layout, shared_vocabulary
from toolkit.pruning.made import materialize
from toolkit.ranks import collectives
from toolkit.rollout import decode, local
from toolkit.rollout.local import GatheredRollout, SeededSampling, sequence_seed
from toolkit.settings import RunConfig


def with_student(folder, work, **changes):
    """`work(config, student, tokenizer, vocabulary)` on a ZeRO-3 student of its own; changes: settings of its run."""
    overrides = tiny_overrides(folder, train__rows_per_micro_batch=8 // collectives.world(), **changes)
    config = RunConfig().with_overrides(overrides)
    path = materialize(config.student, Path(config.cache_dir))
    tokenizer = load_tokenizer(config.student, path)
    vocabulary = shared_vocabulary(tokenizer, tokenizer)
    vocabulary = vocabulary._replace(layout=row_layout(config.student, path))
    return work(config, build_student(config, path, torch.float32, vocabulary), tokenizer, vocabulary)


def with_engine(folder, work):
    """`work(rollout, tokenizer)` with the rollout of such a student."""
    return with_student(
        folder,
        lambda config, student, tokenizer, vocabulary: work(GatheredRollout(student.engine, vocabulary), tokenizer),
    )


def sampled_texts(folder, prompts, rows_at_once, gather="always", **sampling):
    """Token ids of the answers to `prompts`, dealt over the ranks and put together again."""
    return _sampled(folder, prompts, rows_at_once, gather, **sampling)[0]


def sampled_texts_and_mode(folder, prompts, gather, free_bytes=None, **sampling):
    """The same with the mode that ran; `free_bytes`: this rank's free memory, as far as the choice knows."""
    kept = local.free_bytes
    if free_bytes is not None:
        local.free_bytes = lambda: free_bytes[collectives.rank()]
    try:
        return _sampled(folder, prompts, None, gather, **sampling)
    finally:
        local.free_bytes = kept


def _sampled(folder, prompts, rows_at_once, gather, **sampling):
    def work(rollout, tokenizer):
        rollout.rows.size, rollout.gather = rows_at_once, gather
        rank, world = collectives.rank(), collectives.world()
        rows = range(rank, len(prompts), world)
        seeded = SeededSampling(seeds=[sequence_seed(7, 0, row) for row in rows], **sampling)
        found = rollout.complete([tokenizer(prompts[row])["input_ids"] for row in rows], seeded)
        dealt = collectives.gather_objects([example.response.tolist() for example in found])
        return [dealt[row % world][row // world] for row in range(len(prompts))], rollout.last.mode

    return with_engine(folder, work)


def texts_within_budget(folder, prompts, cache_mib, **sampling):
    """(token ids, what the engine says of the call) with a bound on the key-value cache; one rank."""

    def work(rollout, tokenizer):
        rollout.cache_mib = cache_mib
        seeded = SeededSampling(seeds=range(len(prompts)), **sampling)
        found = rollout.complete([tokenizer(prompt)["input_ids"] for prompt in prompts], seeded)
        return [example.response.tolist() for example in found], rollout.last

    return with_engine(folder, work)


def texts_around_a_failure(folder, prompts, gather, name, call, ranks):
    """(what was raised here, the texts afterwards, those of an engine that saw no failure)."""

    def work(rollout, tokenizer):
        rollout.gather, rollout.rows.size = gather, 2
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]

        def texts():
            found = rollout.complete(ids, SeededSampling(12, temperature=0.9, seeds=range(len(ids))))
            return [example.response.tolist() for example in found]

        said, wanted = None, texts()
        try:
            with failing(name, call, ranks):
                texts()
        except RuntimeError as error:
            said = str(error)
        return said, texts(), wanted

    return with_engine(folder, work)


@contextlib.contextmanager
def failing(name, call, ranks=(0, 1)):
    """The decode loop with the `call`-th call of its function `name` raising on these ranks."""
    *owners, name_there = name.split(".")
    owner = operator.attrgetter(*owners)(decode) if owners else decode
    original, calls = getattr(owner, name_there), []

    def work(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and collectives.rank() in ranks:
            raise MemoryError(f"made to fail in {name}")
        return original(*args, **kwargs)

    with mock.patch.object(owner, name_there, work):
        yield


def error_of_unknown_ids(folder):
    """What each rank raises where the prompts of the last one hold an id that the vocabulary does not have."""

    def work(rollout, tokenizer):
        highest = 10**6 if collectives.rank() == collectives.world() - 1 else 7
        try:
            rollout.complete([np.array([5, highest])], SeededSampling(3, seeds=[1]))
        except ValueError as error:
            return str(error)

    return with_engine(folder, work)
