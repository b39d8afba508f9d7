"""Ranks on CPUs: gathers by broadcasts, and what DeepSpeed leaves in shared memory."""

import os
from pathlib import Path

import pytest
import torch

from toolkit.ranks import collectives
from toolkit.ranks.cpus import LEAST_BYTES, all_gather_by_broadcasts
from toolkit.ranks.memory import keep_freed_memory

pytestmark = pytest.mark.multiprocess


def check_gathers():
    import deepspeed

    assert deepspeed.comm.comm.cdb.all_gather_function is all_gather_by_broadcasts, "DeepSpeed gathers so"
    rank, world = collectives.rank(), collectives.world()
    for numel, dtype in ((LEAST_BYTES // 4, torch.float32), (LEAST_BYTES, torch.bfloat16), (3, torch.float32)):
        share = torch.arange(numel, dtype=dtype) + 100 * rank
        wanted = torch.cat([torch.arange(numel, dtype=dtype) + 100 * other for other in range(world)])
        for is_async, in_place in ((False, False), (True, False), (False, True)):
            whole = torch.full((numel * world,), -1, dtype=dtype)
            part = whole.chunk(world)[rank] if in_place else share
            part.copy_(share)
            handle = all_gather_by_broadcasts(whole, part, async_op=is_async)
            if is_async:
                handle.wait()
                assert handle.is_completed()
            assert torch.equal(whole, wanted), (numel, dtype, is_async, in_place)


def left_in_shared_memory():
    return [path.name for path in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")]


def test_gathers_by_broadcasts_give_what_an_all_gather_gives(ranks2):
    ranks2.run(check_gathers)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory as a folder")
def test_nothing_is_left_in_shared_memory(ranks2):
    assert ranks2.run(left_in_shared_memory) == [[], []]


def page_faults_of_a_block():
    """How many pages the system hands out where a block of 48 MiB is filled, and one of 192 was freed before."""
    from resource import RUSAGE_SELF, getrusage

    torch.ones(48 * 2**20)
    before = getrusage(RUSAGE_SELF).ru_minflt
    torch.ones(12 * 2**20)
    return getrusage(RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc")
def test_memory_that_a_rank_frees_is_used_again_without_new_pages(ranks1):
    assert ranks1.run(page_faults_of_a_block)[0] < 48 * 2**20 / 4096 / 10
