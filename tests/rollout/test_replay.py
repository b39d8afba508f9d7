import io
import math

import numpy as np
import pytest

from toolkit.batch import Example
from toolkit.rollout.replay import ReplayBuffer, deal, local_capacity


def example(number):
    """Ragged, and different for every number: tokens number, number + 1, ..."""
    length = 3 + number % 5
    return Example(tokens=np.arange(number, number + length, dtype=np.int32), prompt_length=1 + number % 2)


def make(capacity=10, rank=0, world=1, seed=0, **fields):
    return ReplayBuffer(capacity, rank, world, seed, **fields)


def numbers(examples):
    return [int(item.tokens[0]) for item in examples]


def held(buffer):
    return [(int(entry.example.tokens[0]), entry.step) for entry in buffer.entries]


def shards(capacity, world, pushes, per_push=2):
    """Every rank pushes per_push sequences at steps 10, 20, ...; numbers are unique over ranks."""
    buffers = [make(capacity, rank, world) for rank in range(world)]
    for push in range(pushes):
        for rank, buffer in enumerate(buffers):
            first = (push * world + rank) * per_push
            buffer.push([example(first + i) for i in range(per_push)], step=10 * (push + 1))
    return buffers


def redeal(buffers, capacity, world):
    states = [buffer.state_dict() for buffer in buffers]
    dealt = [make(capacity, rank, world) for rank in range(world)]
    for rank, buffer in enumerate(dealt):
        buffer.load_state_dict(deal(states, capacity, rank, world))
    return dealt


@pytest.mark.parametrize("capacity, world, parts", [(10, 1, [10]), (10, 4, [3, 3, 2, 2]), (1000, 3, [334, 333, 333])])
def test_capacity_is_over_all_ranks(capacity, world, parts):
    assert [local_capacity(capacity, rank, world) for rank in range(world)] == parts
    buffers = shards(capacity, world, pushes=600)
    assert [len(buffer) for buffer in buffers] == parts


def test_oldest_goes_first():
    buffer = make(capacity=3)
    for step in range(5):
        buffer.push([example(step)], step)
    assert held(buffer) == [(2, 2), (3, 3), (4, 4)]
    buffer.push([example(number) for number in range(10, 15)], 5)  # more than fits: the last ones stay
    assert held(buffer) == [(12, 5), (13, 5), (14, 5)]


def test_what_is_sampled_is_what_was_pushed():
    buffer, tokens_BT = make(), np.arange(40, dtype=np.int32).reshape(4, 10)
    buffer.push([Example(tokens=row[:7], prompt_length=3) for row in tokens_BT], step=1)
    tokens_BT[:] = -1  # the buffer holds copies
    for drawn in buffer.sample(4, step=2):
        assert drawn.tokens.dtype == np.int32 and drawn.prompt_length == 3
        assert drawn.tokens.tolist() == list(range(drawn.tokens[0], drawn.tokens[0] + 7)) and drawn.tokens[0] % 10 == 0
        with pytest.raises(ValueError, match="read-only"):
            drawn.tokens[0] = 0


def test_sample_is_without_replacement_then_even():
    buffer = make(capacity=7)
    buffer.push([example(number) for number in range(7)], step=0)
    for step in range(50):
        assert len(set(numbers(buffer.sample(5, step)))) == 5
        assert sorted(numbers(buffer.sample(7, step))) == list(range(7))
        counts = np.bincount(numbers(buffer.sample(17, step)), minlength=7)
        assert counts.sum() == 17 and set(counts) == {2, 3}
    assert buffer.sample(0, step=1) == []


def test_sample_is_even_over_steps():
    buffer, steps, count = make(capacity=20), 4000, 5
    buffer.push([example(number) for number in range(20)], step=0)
    drawn = np.array([numbers(buffer.sample(count, step)) for step in range(steps)])
    for column in (drawn.ravel(), drawn[:, 0]):  # each entry equally often, and equally often first
        expected = len(column) / 20
        chi_square = ((np.bincount(column, minlength=20) - expected) ** 2 / expected).sum()
        assert chi_square < 50, chi_square  # 19 degrees of freedom: p about 1e-4


def test_sample_is_a_function_of_seed_step_and_rank():
    def draws(seed, rank, step):
        buffer = make(capacity=200, rank=rank, world=2, seed=seed)
        buffer.push([example(number) for number in range(100)], step=0)
        np.random.seed(rank)
        buffer.sample(3, step=99)  # an earlier sample leaves no trace
        return numbers(buffer.sample(20, step))

    assert draws(0, 0, 5) == draws(0, 0, 5)
    assert len({tuple(draws(*key)) for key in [(0, 0, 5), (1, 0, 5), (0, 1, 5), (0, 0, 6)]}) == 4


def test_staleness_is_the_mean_age_of_the_last_sample():
    buffer = make()
    assert math.isnan(buffer.staleness(3))
    for step in (10, 20, 60):
        buffer.push([example(step)], step)
    buffer.sample(3, step=70)
    assert buffer.staleness(70) == 70 - 30 and buffer.staleness(75) == 75 - 30
    only = numbers(buffer.sample(1, step=71))[0]
    assert buffer.staleness(71) == 71 - only


def test_max_age_drops_the_old_and_never_samples_them():
    buffer = make(max_age_steps=10)
    for step in (0, 5, 8):
        buffer.push([example(step)], step)
    assert buffer.is_ready(3, step=10) and not buffer.is_ready(3, step=11) and buffer.is_ready(2, step=11)
    assert len(buffer) == 3  # asking drops nothing
    assert sorted(numbers(buffer.sample(3, step=10))) == [0, 5, 8]
    assert set(numbers(buffer.sample(6, step=15))) == {5, 8} and len(buffer) == 2
    assert not buffer.is_ready(1, step=19)
    with pytest.raises(ValueError, match="sample of 1 from 0 sequences at step 19"):
        buffer.sample(1, step=19)


@pytest.mark.parametrize("capacity, world", [(10, 1), (10, 3), (11, 3), (8, 4)])
def test_ranks_agree_when_ready(capacity, world):
    for count in range(capacity // world + 3):
        for pushes in range(8):
            answers = {buffer.is_ready(count, step=100) for buffer in shards(capacity, world, pushes, per_push=1)}
            assert answers == {pushes >= max(1, min(count, capacity // world))}


def test_state_round_trip_through_npz():
    buffer = shards(capacity=9, world=2, pushes=6)[1]
    file = io.BytesIO()
    np.savez(file, **buffer.state_dict())
    file.seek(0)
    resumed = make(capacity=9, rank=1, world=2)
    resumed.load_state_dict(dict(np.load(file, allow_pickle=False)))
    assert held(resumed) == held(buffer) and len(resumed) == 4
    for step in range(70, 80):
        expected, drawn = buffer.sample(3, step), resumed.sample(3, step)
        assert [item.tokens.tolist() for item in drawn] == [item.tokens.tolist() for item in expected]
        assert [item.prompt_length for item in drawn] == [item.prompt_length for item in expected]
        for each in (buffer, resumed):
            each.push([example(step)], step)
    assert held(resumed) == held(buffer)


def test_empty_state_round_trip():
    resumed = make()
    resumed.load_state_dict(make().state_dict())
    assert len(resumed) == 0
    assert [len(buffer) for buffer in redeal(shards(4, 2, pushes=0), 4, world=1)] == [0]


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 3), (3, 2), (4, 4)])
@pytest.mark.parametrize("pushes", [1, 3, 9])
def test_deal_loses_and_doubles_nothing(before, after, pushes):
    old = shards(25, before, pushes)
    new = redeal(old, 25, after)
    assert sorted(e for state in new for e in held(state)) == sorted(e for state in old for e in held(state))
    sizes = [len(buffer) for buffer in new]
    assert max(sizes) - min(sizes) <= 1
    for buffer in new:
        steps = [entry.step for entry in buffer.entries]
        assert steps == sorted(steps)  # oldest first, so that it is still the oldest that leaves
        for entry in buffer.entries:
            original = example(int(entry.example.tokens[0]))
            assert entry.example.tokens.tolist() == original.tokens.tolist()
            assert entry.example.prompt_length == original.prompt_length


def test_deal_to_the_same_world_changes_nothing():
    for pushes in (1, 4, 12):
        old = shards(11, 4, pushes)
        assert [held(buffer) for buffer in redeal(old[::-1], 11, 4)] == [held(buffer) for buffer in old]


def test_deal_to_a_smaller_capacity_keeps_the_newest():
    old = shards(24, 2, pushes=6)
    new = redeal(old, 7, world=3)
    assert [len(buffer) for buffer in new] == [3, 2, 2]
    kept = sorted(step for buffer in new for _, step in held(buffer))
    assert kept == [50] * 3 + [60] * 4
    state = deal([buffer.state_dict() for buffer in old], 7, rank=0, world=3)
    assert len(state["lengths"]) == 3  # trimmed in the state already, not only when it is loaded


def test_errors():
    with pytest.raises(ValueError, match="capacity 3 is below the number of ranks 4"):
        make(capacity=3, world=4)
    with pytest.raises(ValueError, match="rank 2 of world 2"):
        make(rank=2, world=2)
    with pytest.raises(ValueError, match="max_age_steps is -1"):
        make(max_age_steps=-1)
    with pytest.raises(ValueError, match="seed -1"):
        make(seed=-1)
    with pytest.raises(ValueError, match="is_ready first"):
        make().sample(1, step=0)
    buffer = make()
    buffer.push([example(0)], step=5)
    with pytest.raises(ValueError, match="sample of -1"):
        buffer.sample(-1, step=5)
    with pytest.raises(ValueError, match="step 4 after one of step 5"):
        buffer.push([example(1)], step=4)
    with pytest.raises(ValueError, match=r"\(0, 1, 10\), this shard is \(0, 2, 10\)"):
        make(world=2).load_state_dict(buffer.state_dict())
    one, two = (shard.state_dict() for shard in shards(10, 2, pushes=1))
    for states in ([], [one], [one, one], [one, two, two]):
        with pytest.raises(ValueError, match="every rank of one run"):
            deal(states, 10, 0, 1)
