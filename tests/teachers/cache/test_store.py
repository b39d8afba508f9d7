"""A cache's files, without a model: made by hand, finished, read back."""

import dataclasses
import os
import resource
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

from toolkit.batch import Example, TokenBatch
from toolkit.models import Vocabulary
from toolkit.ranks import heartbeat
from toolkit.storage.manifest import entry_of
from toolkit.teachers.cache import Form, TeacherCache, plan
from toolkit.teachers.cache.build import _finish, _name, _write
from toolkit.teachers.cache.store import IDENTITY, texts_of

FORM, V = Form(top_k=2), 50


def example(number):
    return Example(np.array([1, 2, number]), 1)


def log_probs(number):
    return torch.randn(2, V, generator=torch.Generator().manual_seed(number)).log_softmax(-1)


def unfinished(folder, shards):
    """The shards of a cache, a text in each, and their entries of its manifest."""
    folder.mkdir()
    for number in range(shards):
        (text,) = texts_of(TokenBatch.from_examples([example(number)], 0), 1.0)
        index = {"keys": np.array([text.key]), "targets": np.array([text.targets])}
        _write(folder / _name(number), [FORM.arrays(log_probs(number), None) | index], Vocabulary(V, (0,), 0), FORM)
    return {_name(number): entry_of(folder / _name(number)) for number in range(shards)}


def identity():
    return dict.fromkeys(IDENTITY, "") | {"vocabulary_size": V, "form": dataclasses.asdict(FORM)}


@contextmanager
def open_files(more):
    """This process may open so many files beside those that it has open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_shards_than_a_process_may_open(tmp_path):
    shards = 40
    files = unfinished(tmp_path / "cache.unfinished", shards)
    with open_files(8):
        _finish(tmp_path / "cache.unfinished", tmp_path / "cache", identity(), files)
        cache = TeacherCache(tmp_path / "cache")
        cache.check()
        cache.read_index()
        signal = cache.signal(TokenBatch.from_examples([example(number) for number in range(shards)], 0), 1.0)
    assert (cache.manifest["texts"], cache.manifest["positions"]) == (shards, 2 * shards)
    wanted, ids = torch.cat([log_probs(number) for number in range(shards)]).topk(2)
    assert torch.equal(signal.ids_NK, ids) and (signal.log_probs_NK - wanted).abs().max() < 5e-3


def test_the_watchdog_hears_of_each_text_planned_and_each_shard_checked_and_read(tmp_path):
    with mock.patch.object(heartbeat, "beat") as beat:
        plan([([example(number) for number in range(5)], 1.0)], 0, 2, 4)
        assert beat.call_count == 5
    _finish(tmp_path / "made", tmp_path / "cache", identity(), unfinished(tmp_path / "made", 3))
    cache = TeacherCache(tmp_path / "cache")
    for work in (cache.check, cache.read_index):
        with mock.patch.object(heartbeat, "beat") as beat:
            work()
        assert beat.call_count == 3, work
