"""The decode loop in one process: against its readable twin, transformers' generate and transformers' own filters."""

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from toolkit.models.vocabulary import Vocabulary
from toolkit.rollout import local
from toolkit.rollout.decode import decode, is_supported, plain_decode
from toolkit.rollout.sampling import SeededSampling, choose_tokens

VOCABULARY = Vocabulary(size=90, eos_ids=(2,), pad_id=2)  # the heads below have 96 rows
SHAPE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, intermediate_size=48)),
    "window": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE, num_key_value_heads=2, intermediate_size=48, sliding_window=5)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3)),
}


def make(name):
    torch.manual_seed(5)
    return MODELS[name]().eval()


def ragged_prompts(count=11):
    rng = np.random.default_rng(3)
    return [rng.integers(3, 90, 1 + (7 * i) % 19).astype(np.int32) for i in range(count)]


def texts(found):
    return [text.tolist() for text in found[0]]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_generate_row_by_row(name):
    model, prompts = make(name), ragged_prompts()
    model.get_output_embeddings().weight.data[VOCABULARY.size :] = 0  # generate knows no smaller vocabulary
    found = texts(decode(model, prompts, SeededSampling(14, temperature=0, seeds=range(11)), VOCABULARY, rows=4))
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False, eos_token_id=2,
            pad_token_id=2, suppress_tokens=list(range(VOCABULARY.size, 96)), forced_bos_token_id=None,
        )  # fmt: skip
        assert text == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(temperature=0.7, top_p=0.8),
        dict(top_k=9),
        dict(min_p=0.1, repetition_penalty=1.3),
        dict(temperature=0.3, no_repeat_ngram_size=2),
    ],
)
def test_the_loop_says_what_its_readable_twin_says(name, settings):
    model, prompts = make(name), ragged_prompts()
    assert is_supported(model)
    sampling = SeededSampling(12, seeds=range(100, 111), **settings)
    wanted = texts(plain_decode(model, prompts, sampling, VOCABULARY, rows=11))
    assert len({tuple(text) for text in wanted}) > 5
    for rows in (1, 3, 11):  # alone, with refills, all together
        found, stats = decode(model, prompts, sampling, VOCABULARY, rows=rows)
        assert [text.tolist() for text in found] == wanted
        assert stats.peak_rows <= rows and stats.tokens == sum(len(text) for text in wanted)
    assert model.config._attn_implementation == "sdpa"  # what training uses came back


def test_finished_rows_leave_and_waiting_prompts_take_their_place():
    model, prompts = make("llama"), ragged_prompts(24)
    model.model.embed_tokens.weight.data[2] *= 3
    sampling = SeededSampling(40, temperature=1.2, seeds=range(24))
    found, refilled = decode(model, prompts, sampling, VOCABULARY, rows=8)
    lengths = [len(text) for text in found]
    assert min(lengths) < 20 < max(lengths)
    in_turn = sum(max(lengths[i] for i in part) for part in np.argsort([len(p) for p in prompts]).reshape(3, 8))
    assert refilled.steps < in_turn and refilled.prefills > 3
    assert all(2 not in text[:-1] for text in found)


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch):
    model, prompts, tried = make("llama"), ragged_prompts(), []
    sampling = SeededSampling(6, seeds=range(11))

    def scarce(model, prompts, sampling, vocabulary, rows):
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("no room")
        return decode(model, prompts, sampling, vocabulary, rows)

    monkeypatch.setattr(local, "decode", scarce)
    found = local.GatheredRollout(None, VOCABULARY)._decode_or_split(model, prompts, sampling, rows=100)
    assert tried == [100, 5, 2] and texts(found) == texts(decode(model, prompts, sampling, VOCABULARY, rows=11))
    monkeypatch.setattr(local, "decode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError, match="none at all"):
        local.GatheredRollout(None, VOCABULARY)._decode_or_split(model, prompts, sampling, rows=4)


def test_nothing_asked_is_nothing_said():
    found, stats = decode(make("llama"), [], SeededSampling(5, seeds=[]), VOCABULARY, rows=4)
    assert found == [] and stats.steps == stats.prefills == 0


@pytest.mark.parametrize("settings", [
    {}, dict(temperature=0.6), dict(top_k=7), dict(top_p=0.7), dict(min_p=0.2), dict(repetition_penalty=1.4),
    dict(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
])  # fmt: skip
@pytest.mark.parametrize("size", [90, 700])
def test_shares_of_tokens_are_those_of_the_filters_of_transformers(settings, size):
    torch.manual_seed(1)
    logits_V, seen = torch.randn(size) * 3, torch.tensor([[4, 9, 9, 30]])
    scores = logits_V[None]
    if "repetition_penalty" in settings:
        scores = RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(seen, scores)
    scores = scores / settings.get("temperature", 1)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in settings:
            scores = warper(settings[name])(None, scores)
    count = 20_000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = choose_tokens(logits_V.expand(count, -1), SeededSampling(1, **settings), draws, seen.expand(count, -1))
    shares = torch.bincount(chosen, minlength=size) / count
    torch.testing.assert_close(shares, scores.softmax(-1)[0], atol=1.1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_tokens_that_repeat_an_ngram_are_those_of_transformers(size):
    rng, rows, vocabulary = np.random.default_rng(size), 40, {1: 30, 6: 2}.get(size, 3)
    texts = [torch.from_numpy(rng.integers(0, vocabulary, 1 + row)) for row in range(rows)]
    seen_BL = torch.stack([torch.nn.functional.pad(text, (0, rows - len(text)), value=int(text[-1])) for text in texts])
    lengths_B = torch.tensor([len(text) for text in texts])
    scores = torch.randn(rows, vocabulary)
    wanted = torch.cat([
        NoRepeatNGramLogitsProcessor(size)(text[None], row[None]) for text, row in zip(texts, scores, strict=True)
    ])  # fmt: skip
    forbidden = wanted.isinf()
    assert forbidden.any() and not forbidden.all(1).all()
    sampling = SeededSampling(1, temperature=0, no_repeat_ngram_size=size)
    for token in range(vocabulary):  # each in turn is by far the likeliest
        chosen = choose_tokens(scores.clone().index_fill_(1, torch.tensor([token]), 100.0), sampling, None, seen_BL,
                               lengths_B)  # fmt: skip
        open_rows = ~forbidden.all(1)
        assert torch.equal((chosen != token)[open_rows], forbidden[:, token][open_rows])


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_without_repeated_ngrams_is_that_of_generate(name):
    model, prompts = make(name), ragged_prompts()
    model.get_output_embeddings().weight.data[VOCABULARY.size :] = 0
    settings = SeededSampling(24, temperature=0, no_repeat_ngram_size=2, seeds=range(11))
    found = texts(decode(model, prompts, settings, VOCABULARY, rows=4))
    free = texts(decode(model, prompts, SeededSampling(24, temperature=0, seeds=range(11)), VOCABULARY, rows=4))
    assert found != free
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=2,
            pad_token_id=2, suppress_tokens=list(range(VOCABULARY.size, 96)), no_repeat_ngram_size=2,
            forced_bos_token_id=None,
        )  # fmt: skip
        assert text == wanted[0, len(prompt) :].tolist()
