import numpy as np
import pytest
import torch

from toolkit.batch import EncoderDecoder, Example, TokenBatch, make_window

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


def test_windows_hold_the_same_rows_for_every_micro_size_longest_first():
    examples = [example([n], [n] * (n + 1)) for n in (3, 0, 6, 1, 7, 2, 5, 4)]
    flat = [n for n in range(7, -1, -1) for _ in range(n + 1)]
    for micro_size in (1, 2, 4, 8):
        window = make_window(examples, micro_size, PAD)
        assert [len(b.input_ids_BT) for b in window] == [micro_size] * (8 // micro_size)
        assert [t for b in window for t in b.targets_N.tolist()] == flat


def texts_of(batch):
    """(tokens, predicted or not) of every text in a batch, found by where positions start over; padding is none."""
    found = []
    for ids_T, real_T, predicts_T, positions_T in zip(
        batch.input_ids_BT, batch.attention_mask_BT, batch.predicts_BT, batch.position_ids_BT, strict=True
    ):
        starts = [t for t in range(len(ids_T)) if positions_T[t] == 0]
        for first, end in zip(starts, [*starts[1:], len(ids_T)], strict=True):
            assert positions_T[first:end].tolist() == list(range(end - first))
            if count := int(real_T[first:end].sum()):
                end = first + count
                assert real_T[first:end].all()
                found.append((tuple(ids_T[first:end].tolist()), tuple(predicts_T[first:end].tolist())))
    return sorted(found)


@pytest.mark.parametrize("micro_size", [1, 2, 4, 12])
def test_packing_keeps_every_text_whole_and_the_number_of_micro_batches(micro_size):
    rng = np.random.default_rng(micro_size)
    examples = [Example(rng.integers(0, 50, n), int(rng.integers(1, n))) for n in rng.integers(2, 60, 12)]
    window = make_window(examples, micro_size, PAD, pack_to=64)
    assert len(window) == 12 // micro_size
    assert all(len(batch.input_ids_BT) >= 1 and batch.input_ids_BT.shape[1] <= 64 for batch in window)
    plain = [
        (tuple(e.tokens.tolist()), (*(n + 1 >= e.prompt_length for n in range(len(e.tokens) - 1)), False))
        for e in examples
    ]
    assert sorted(text for batch in window for text in texts_of(batch._with_positions())) == sorted(plain)
    tokens = [batch.num_tokens for batch in window]
    assert max(tokens) - min(tokens) <= max(len(e.tokens) for e in examples)


def ragged(count, longest=60, seed=0):
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(0, 50, n), int(rng.integers(1, n))) for n in rng.integers(2, longest, count)]


def area(batch):
    ids = [tensor for name, tensor in batch.model_inputs().items() if name.endswith("input_ids")]
    return sum(tensor.numel() for tensor in ids)


@pytest.mark.parametrize("layout", [{}, {"pack_to": 64}, {"layout": EncoderDecoder(0)}])
@pytest.mark.parametrize("micro_tokens", [80, 128, 300, 10_000])
def test_a_token_budget_holds_however_many_micro_batches_the_other_ranks_need(layout, micro_tokens):
    examples = ragged(24)
    targets = sorted(tuple(e.response.tolist()) for e in examples)
    own = make_window(examples, 0, PAD, micro_tokens=micro_tokens, **layout)
    for count in (len(own), len(own) + 1, len(own) + 5, 24):
        window = make_window(examples, 0, PAD, micro_tokens=micro_tokens, agree=lambda _, n=count: n, **layout)
        assert len(window) == max(count, len(own)) and all(area(batch) <= micro_tokens for batch in window)
        found = []
        for batch in window:
            rest = batch.targets_N.tolist()
            if layout.get("pack_to"):
                found += [tuple(np.array(ids[1:])[list(told[:-1])].tolist()) for ids, told in
                          texts_of(batch._with_positions())]  # fmt: skip
                continue
            for count_of_row in batch.predicts_BT.sum(1).tolist():
                found.append(tuple(rest[:count_of_row]))
                rest = rest[count_of_row:]
        assert sorted(found) == targets


def test_a_token_budget_is_used_up_and_an_example_beyond_it_is_alone():
    examples = [example([1], [2] * n) for n in (39, 15, 15, 7, 7, 7, 7, 3)]
    window = make_window(examples, 0, PAD, micro_tokens=32)
    assert [tuple(batch.input_ids_BT.shape) for batch in window] == [(1, 40), (2, 16), (4, 8), (1, 8)]
    window = make_window(examples, 0, PAD, micro_tokens=32, pack_to=32)
    assert window[0].input_ids_BT.shape == (1, 40) and len(window) < 5 and all(area(b) <= 32 for b in window[1:])
    real = sum(len(e.tokens) for e in ragged(64))
    assert len(make_window(ragged(64), 0, PAD, micro_tokens=600, pack_to=64)) == -(-real // 600)  # no more is possible


def test_packing_leaves_less_padding_and_an_overlong_example_has_its_own_width():
    examples = [example([1], [2] * n) for n in (39, 19, 9, 9, 4, 3, 3, 3)]

    def padded(window):
        return sum(b.input_ids_BT.numel() for b in window)

    real = sum(len(e.tokens) for e in examples)
    assert real <= padded(make_window(examples, 8, PAD, pack_to=40)) < 1.3 * real
    assert padded(make_window(examples, 8, PAD)) > 3 * real
    (batch,) = make_window(examples, 8, PAD, pad_to_multiple=1, pack_to=16)
    assert batch.input_ids_BT.shape[1] == 40


def test_micro_batches_sorted_by_length_leave_less_padding():
    rng = np.random.default_rng(0)
    examples = [example([1], [2] * int(n)) for n in rng.integers(1, 200, 32)]
    in_order = sum(TokenBatch.from_examples(examples[i : i + 4], PAD).input_ids_BT.numel() for i in range(0, 32, 4))
    assert sum(b.input_ids_BT.numel() for b in make_window(examples, 4, PAD)) < 0.85 * in_order


def test_texts_of_a_block_are_apart_and_their_first_tokens_not_predicted():
    block = Example(np.arange(10), 1, text_starts=(4, 5))
    batch = TokenBatch.from_examples([block], PAD, pad_to_multiple=12)
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 0, 1]]
    assert batch.targets_N.tolist() == [1, 2, 3, 6, 7, 8, 9]
    assert batch.model_inputs().keys() == {"input_ids", "position_ids"}
    assert (batch.num_targets, batch.num_tokens) == (7, 10)


@pytest.mark.parametrize("starts, prompt_length, message", [
    ((0,), 1, "text_starts"), ((3, 2), 1, "text_starts"), ((5,), 1, "text_starts"), ((2,), 2, "text_starts"),
    ((1, 2, 3, 4), 1, "nothing in it is predicted"),
])  # fmt: skip
def test_text_starts_out_of_range(starts, prompt_length, message):
    with pytest.raises(ValueError, match=message):
        Example(np.arange(5), prompt_length, starts)


def test_batches_with_and_without_positions_are_joined_and_moved():
    packed = TokenBatch.from_rows([[example([1], [2]), example([3], [4, 5])]], PAD, 1)
    alone = TokenBatch.from_examples([example([6, 7], [8])], PAD, 1)
    joined = TokenBatch.concatenate([alone, packed])
    assert joined.position_ids_BT.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 1, 2]]
    assert joined.targets_N.tolist() == [8, 2, 4, 5]
    assert TokenBatch.concatenate([alone, alone]).position_ids_BT is None
    assert joined.to("meta").position_ids_BT.device.type == "meta" and alone.to("cpu").position_ids_BT is None


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
