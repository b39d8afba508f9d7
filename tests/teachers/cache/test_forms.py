"""What a cache keeps of a distribution, against the distribution itself in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from toolkit.batch import Example, TokenBatch, make_window
from toolkit.divergences import Divergence, Head, Hidden, Objective, fused_linear_divergence
from toolkit.teachers.cache import Form
from toolkit.teachers.cache.forms import SMALLEST_MASS, log_prob_tiles, pack_ids, unpack_ids
from toolkit.teachers.cache.store import texts_of


def peaked(n, v, seed=0):
    """Rows from flat to nearly certain."""
    torch.manual_seed(seed)
    return (torch.randn(n, v) * torch.linspace(0.1, 30, n).unsqueeze(-1)).log_softmax(-1)


def through_disk_format(form, log_p, uniforms=None):
    v = log_p.shape[1]
    packed = form.packed(form.arrays(log_p.clone(), uniforms), v)
    return form.signal(packed, v), packed


@pytest.mark.parametrize(("v", "size"), [(300, 2), (2**16, 2), (2**16 + 1, 3), (250_000, 3)])
def test_ids_take_as_few_bytes_as_hold_them(v, size):
    ids = np.array([0, 1, 255, 256, v // 2, v - 1, v - 2])
    packed = pack_ids(ids, v)
    assert packed.nbytes == size * len(ids)
    assert np.array_equal(unpack_ids(packed), ids)


@pytest.mark.parametrize("k", [1, 16, 400])
def test_top_k_in_16_bits_is_near_the_truth(k):
    log_p = peaked(64, 400).double()
    signal, packed = through_disk_format(Form(top_k=k), log_p.float())
    assert packed["U_log_probs"].itemsize == packed["log_tails"].itemsize == packed["U_ids"].itemsize == 2
    values, ids = log_p.topk(k)
    assert torch.equal(signal.ids_NK, ids)
    tail = log_p.scatter(1, ids, -torch.inf).exp().sum(-1)
    assert (signal.log_probs_NK.exp().sum(-1) + signal.tail_mass_N - 1).abs().max() < 1e-6
    assert (signal.log_probs_NK.exp() - values.exp()).abs().max() < 3e-4
    if k == 400:
        assert (signal.tail_mass_N == 0).all()
    else:  # relative: also a tail of 1e-8 keeps its digits, which 1 - (1 - 1e-8) would lose
        assert tail.min() < 1e-7
        assert ((signal.tail_mass_N - tail).abs() <= (2**-11 * tail.log().abs() + 5e-4) * tail).all()
        truth = torch.cat([values, tail.log().unsqueeze(-1)], -1)
        stored = torch.cat([signal.log_probs_NK, signal.tail_mass_N.log().unsqueeze(-1)], -1).double()
        assert (truth.exp() * (truth - stored)).sum(-1).abs().max() < 1e-6  # KL of the K + 1 classes to the stored


def test_a_tail_has_no_mass_only_where_it_was_stored_so():
    stored = np.float16([-110, -800, -math.inf])
    packed = {"U_ids": np.array([3, 3, 3], np.uint16), "U_log_probs": np.zeros(3, np.float16), "log_tails": stored}
    found = Form(top_k=1).signal(packed, 400).tail_mass_N
    assert found.tolist() == pytest.approx([math.exp(-110), SMALLEST_MASS, 0], rel=1e-9, abs=0)


def drawn(log_p_V, seeds, draws, form_seed=0):
    """The mean of counts / draws over many positions of one distribution, and each position's."""
    uniforms = np.random.default_rng(form_seed).random((seeds, draws))
    signal, packed = through_disk_format(Form(draws=draws), log_p_V.expand(seeds, -1).contiguous(), uniforms)
    p_hat = torch.zeros(seeds, len(log_p_V)).scatter_(1, signal.ids_NK, signal.log_probs_NK.exp())
    assert (p_hat.sum(-1) - 1).abs().max() < 1e-5
    return p_hat.double(), signal, packed


def test_draws_have_the_probabilities_as_their_mean():
    torch.manual_seed(1)
    log_p, seeds, draws = (2 * torch.randn(60)).log_softmax(-1), 20_000, 7
    p = log_p.double().exp()
    p_hat, _, packed = drawn(log_p, seeds, draws)
    # Independent draws have this deviation; strata have no more.
    deviation = (p * (1 - p) / (draws * seeds)).sqrt()
    assert ((p_hat.mean(0) - p).abs() < 4.5 * deviation).all()
    assert (p_hat - p).square().sum(-1).mean() <= (p * (1 - p)).sum() / draws
    assert packed["U_counts"].dtype == packed["distinct"].dtype == np.uint8
    # The test would see another distribution: a temperature of 1.03, or ids off by one.
    for other in ((log_p.double() / 1.03).softmax(-1), p.roll(1)):
        assert ((p_hat.mean(0) - other).abs() > 4.5 * deviation).any()


def test_draws_give_kl_and_gradient_without_bias():
    torch.manual_seed(2)
    seeds, draws, v, hidden = 6000, 5, 40, 6
    log_p = (2 * torch.randn(v)).log_softmax(-1)
    head, state = torch.randn(v, hidden), torch.randn(hidden)
    _, signal, _ = drawn(log_p, seeds, draws)
    h = state.expand(seeds, -1).clone().requires_grad_()
    found = fused_linear_divergence(Objective(Divergence("fkl")), student=Hidden(h, Head(head)), teacher=signal)
    found.loss.backward()
    log_q = (head.double() @ state.double()).log_softmax(-1)
    p = log_p.double().exp()
    kl = (p * (log_p.double() - log_q)).sum()
    error = found.divergence_N.double().std() / seeds**0.5
    assert abs(found.divergence_N.double().mean() - kl) < 4 * error + 5e-4 * kl  # 5e-4: the entropy's 16 bits
    without_entropy = (found.divergence_N - signal.offset_N).double().mean()
    assert abs(without_entropy - kl) > 20 * error  # so the entropy matters
    gradient = (log_q.exp() - p) @ head.double()
    errors = h.grad.double().std(0) / seeds**0.5
    assert ((h.grad.double().mean(0) - gradient).abs() < 4 * errors + 1e-6).all()


@pytest.mark.parametrize(("v", "draws"), [(3, 50), (60, 50), (400, 1), (400, 300)])
def test_places_without_a_draw_get_other_ids(v, draws):
    log_p = peaked(40, v)
    signal, packed = through_disk_format(Form(draws=draws), log_p, np.random.default_rng(0).random((40, draws)))
    assert packed["U_counts"].dtype == (np.uint8 if draws < 256 else np.uint16)
    assert signal.ids_NK.min() >= 0 and signal.ids_NK.max() < v
    assert all(len(set(row)) == len(row) for row in signal.ids_NK.tolist())
    counts = (signal.log_probs_NK.exp() * draws).round().long()
    assert (counts.sum(-1) == draws).all() and (counts >= 0).all()


@pytest.mark.parametrize("budget_mib", [None, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_the_log_softmax_of_the_heads_logits(budget_mib, dtype):
    torch.manual_seed(3)
    hidden, weight, bias = torch.randn(30, 16).to(dtype), torch.randn(110, 16).to(dtype), torch.randn(110).to(dtype)
    tiles = list(log_prob_tiles(hidden, Head(weight, bias_V=bias, scale=0.5, cap=3.0), 100, 2.0, budget_mib))
    assert len(tiles) == 1 if budget_mib is None else len(tiles) > 1
    z = (hidden.double() @ weight[:100].double().T + bias[:100].double()) * 0.5
    wanted = (3 * (z / 3).tanh() / 2.0).log_softmax(-1)
    assert (torch.cat(tiles).double() - wanted).abs().max() < 1e-5


def examples():
    draw = np.random.default_rng(5)
    return [Example(draw.integers(0, 90, 6 + 3 * i), 2 + i) for i in range(6)]


def test_a_text_has_one_key_alone_sorted_or_packed():
    alone = {}
    for example in examples():
        (text,) = texts_of(TokenBatch.from_examples([example], 0), 1.0)
        assert text.targets == len(example.response)
        alone[text.key] = text.targets
    assert len(alone) == 6
    for pack_to in (None, 60):
        window = make_window(examples(), 3, 0, pack_to=pack_to)
        assert any(batch.position_ids_BT is not None for batch in window) == (pack_to is not None)
        for batch in window:
            texts = texts_of(batch, 1.0)
            assert all(alone[text.key] == text.targets for text in texts)
            assert sum(text.targets for text in texts) == batch.num_targets
        assert {text.key for batch in window for text in texts_of(batch, 1.0)} == alone.keys()


def test_what_decides_an_answer_decides_the_key():
    first = examples()[0]
    others = [
        dataclasses.replace(first, prompt_length=first.prompt_length + 1),
        Example(np.concatenate([first.tokens[:-1], [91]]), first.prompt_length),
        Example(first.tokens[:-1], first.prompt_length),
    ]
    keys = {texts_of(TokenBatch.from_examples([e], 0), 1.0)[0].key for e in (first, *others)}
    keys.add(texts_of(TokenBatch.from_examples([first], 0), 2.0)[0].key)
    assert texts_of(TokenBatch.from_examples([first], 0), 2)[0].key in keys  # an int is the same temperature
    assert len(keys) == 5


def test_every_field_of_a_batch_is_in_the_key():
    """A new one has to be put into `texts_of` before this list may grow."""
    covered = {"input_ids_BT", "attention_mask_BT", "predicts_BT", "position_ids_BT"}
    assert {field.name for field in dataclasses.fields(TokenBatch)} == covered


def test_texts_of_a_block_are_separate_and_those_of_one_token_are_left_out():
    block = Example(np.arange(20), 1, (5, 6, 12))
    texts = texts_of(TokenBatch.from_examples([block], 0), 1.0)
    assert [text.targets for text in texts] == [4, 5, 7]
    (third,) = texts_of(TokenBatch.from_examples([Example(np.arange(12, 20), 1)], 0), 1.0)
    assert third == texts[2]


def test_divergences_that_a_form_cannot_give_are_refused():
    for name in ("fkl", "rkl", "skl", "srkl"):
        Form(top_k=4).check_divergence(Divergence(name))
    with pytest.raises(ValueError, match="needs the teacher's whole distribution; from a cache: fkl, rkl, skl, srkl"):
        Form(top_k=4).check_divergence(Divergence("jsd"))
    Form(draws=4).check_divergence(Divergence("fkl"))
    Form(draws=4).check_divergence(Divergence("skl", alpha=0.0))
    for name in ("rkl", "skl", "srkl"):
        with pytest.raises(ValueError, match="4 draws: counts stand for probabilities only"):
            Form(draws=4).check_divergence(Divergence(name))
    for form, message in ((Form(), "give one"), (Form(3, 3), "give one"), (Form(51), "50 entries"),
                          (Form(draws=2**16), "65535")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            form.validate(50)
