import numpy as np
import pytest
import torch

from toolkit.batch import Example, TokenBatch, make_window

PAD = 9


def example(prompt, response):
    return Example(np.array(prompt + response), len(prompt))


def test_positions_predict_the_response_and_nothing_else():
    batch = TokenBatch.from_examples([example([1, 2, 3], [4, 5]), example([6], [7])], PAD, pad_to_multiple=1)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, 5], [6, 7, PAD, PAD, PAD]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.predicts_BT.tolist() == [
        [False, False, True, True, False],
        [True, False, False, False, False],
    ]
    assert batch.targets_N.tolist() == [4, 5, 7]
    assert (batch.num_targets, batch.num_tokens) == (3, 7)
    assert (batch.input_ids_BT.dtype, batch.predicts_BT.dtype) == (torch.int64, torch.bool)


def test_targets_are_in_the_order_of_boolean_indexing():
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(1, 9)), int(rng.integers(1, 9))) for _ in range(6)]
    examples = [Example(rng.integers(0, 50, p + r), p) for p, r in sizes]
    batch = TokenBatch.from_examples(examples, PAD)
    assert batch.targets_N.tolist() == np.concatenate([e.response for e in examples]).tolist()
    next_ids_BT = batch.input_ids_BT.roll(-1, dims=1)
    assert batch.targets_N.tolist() == next_ids_BT[batch.predicts_BT].tolist()
    assert batch.num_targets == len(batch.targets_N) == sum(r for _, r in sizes)


def test_pad_equal_to_eos_changes_nothing_but_the_padding():
    eos = 5
    examples = [example([1, eos, 3], [4, eos]), example([6], [eos])]
    one, other = (TokenBatch.from_examples(examples, pad) for pad in (PAD, eos))
    assert torch.equal(one.attention_mask_BT, other.attention_mask_BT)
    assert torch.equal(one.predicts_BT, other.predicts_BT)
    assert one.targets_N.tolist() == other.targets_N.tolist() == [4, eos, eos]
    assert other.num_tokens == 7


@pytest.mark.parametrize("multiple, length", [(1, 9), (8, 16), (9, 9)])
def test_padding_is_to_a_multiple(multiple, length):
    batch = TokenBatch.from_examples([example([1] * 8, [2])], PAD, multiple)
    assert batch.input_ids_BT.shape == batch.attention_mask_BT.shape == batch.predicts_BT.shape == (1, length)


def test_to_keeps_all_three_tensors():
    batch = TokenBatch.from_examples([example([1], [2])], PAD).to("meta")
    assert {t.device.type for t in (batch.input_ids_BT, batch.attention_mask_BT, batch.predicts_BT)} == {"meta"}


def test_windows_hold_the_same_rows_for_every_micro_size():
    examples = [example([n], [n] * (n + 1)) for n in range(8)]
    flat = [row for e in examples for row in e.response.tolist()]
    for micro_size in (1, 2, 4, 8):
        window = make_window(examples, micro_size, PAD)
        assert [len(b.input_ids_BT) for b in window] == [micro_size] * (8 // micro_size)
        assert [t for b in window for t in b.targets_N.tolist()] == flat


@pytest.mark.parametrize("tokens, prompt_length", [([1, 2], 0), ([1, 2], 2), ([1, 2], 3), ([], 0), ([1], 1)])
def test_an_example_needs_a_prompt_and_a_response(tokens, prompt_length):
    with pytest.raises(ValueError, match=f"prompt_length = {prompt_length} with {len(tokens)} tokens"):
        Example(np.array(tokens, dtype=np.int32), prompt_length)


def test_an_example_refuses_what_is_not_ids():
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        Example(np.array([[1, 2]]), 1)
    with pytest.raises(ValueError, match="dtype float64"):
        Example(np.array([1.0, 2.0]), 1)
    with pytest.raises(ValueError, match="id -100"):
        Example(np.array([1, -100]), 1)
    assert Example(np.array([1, 2], dtype=np.int64), 1).tokens.dtype == np.int32


def test_empty_and_uneven_batches_are_refused():
    with pytest.raises(ValueError, match="0 examples"):
        TokenBatch.from_examples([], PAD)
    with pytest.raises(ValueError, match="pad_id = None"):
        TokenBatch.from_examples([example([1], [2])], None)
    with pytest.raises(ValueError, match="3 examples in micro-batches of 2"):
        make_window([example([1], [2])] * 3, 2, PAD)
    with pytest.raises(ValueError, match="0 examples"):
        make_window([], 2, PAD)
