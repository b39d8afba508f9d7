import numpy as np
import pytest

from toolkit.batch import Example
from toolkit.data import PromptDataset

ROWS = 22


def dataset(seed=0, rows=ROWS):
    return PromptDataset([Example(np.array([n, n]), 1) for n in range(rows)], seed)


def ids(examples):
    return [int(e.tokens[0]) for e in examples]


def global_batch(data, step, world, per_rank):
    return [i for rank in range(world) for i in ids(data.window_examples(step, rank, world, per_rank))]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_step_holds_the_same_rows_in_the_same_order_for_every_number_of_ranks(world):
    for step in range(7):  # crosses two epoch boundaries
        assert global_batch(dataset(), step, world, 8 // world) == global_batch(dataset(), step, 1, 8)


def test_every_epoch_has_every_row_once_and_an_order_of_its_own():
    stream = [i for step in range(33) for i in global_batch(dataset(), step, 2, 4)]
    epochs = [stream[start : start + ROWS] for start in range(0, 12 * ROWS, ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 12 and epochs[0] != list(range(ROWS))


def test_a_step_does_not_depend_on_what_was_asked_before():
    data = dataset()
    forwards = [global_batch(data, step, 2, 4) for step in range(9)]
    assert [global_batch(dataset(), step, 2, 4) for step in reversed(range(9))] == forwards[::-1]


def test_the_seed_matters():
    assert global_batch(dataset(0), 0, 1, 8) != global_batch(dataset(1), 0, 1, 8)


def test_the_order_of_a_seed_is_pinned():
    assert global_batch(dataset(7), 0, 1, 5) == PINNED


PINNED = [20, 21, 2, 7, 10]  # a change here changes every run


def test_a_batch_larger_than_the_data_is_refused():
    dataset(rows=8).window_examples(0, 3, 4, 2)
    with pytest.raises(ValueError, match=r"global batch of 8 rows \(4 ranks x 2\) with 7 training rows"):
        dataset(rows=7).window_examples(0, 3, 4, 2)


@pytest.mark.parametrize("step, rank, world, per_rank", [(-1, 0, 1, 1), (0, 2, 2, 1), (0, -1, 2, 1), (0, 0, 1, 0)])
def test_arguments_out_of_range(step, rank, world, per_rank):
    with pytest.raises(ValueError, match=f"step = {step}, rank = {rank}, world = {world}, per_rank = {per_rank}"):
        dataset().window_examples(step, rank, world, per_rank)


def test_no_examples_and_negative_seeds():
    with pytest.raises(ValueError, match="0 examples"):
        PromptDataset([], 0)
    with pytest.raises(ValueError, match="seed = -1"):
        dataset(seed=-1)
