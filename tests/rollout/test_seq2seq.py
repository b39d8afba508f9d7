"""Generation by encoder-decoder models in one process: against transformers' generate, and against full passes."""

import numpy as np
import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from toolkit.batch import EncoderDecoder
from toolkit.models.vocabulary import Vocabulary
from toolkit.rollout.cache import cache_bytes_per_token
from toolkit.rollout.sampling import SeededSampling, choose_tokens, uniform_draws
from toolkit.rollout.seq2seq import decode_seq2seq

VOCABULARY = Vocabulary(size=90, eos_ids=(1,), pad_id=0, layout=EncoderDecoder(0))  # the heads below have 96 rows
MANY_ENDS = VOCABULARY._replace(eos_ids=(1, *range(60, 64)))  # texts of very different lengths
SHAPE = dict(
    vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
    eos_token_id=1, decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=20,
)  # fmt: skip
MODELS = {
    "t5": lambda **more: T5ForConditionalGeneration(T5Config(**SHAPE, **more)),
    "mt5": lambda **more: MT5ForConditionalGeneration(MT5Config(**SHAPE, **more)),
}


def make(name, **more):
    torch.manual_seed(5)
    model = MODELS[name](**more).eval()
    with torch.no_grad():
        if name == "mt5":  # its logits are not scaled
            model.shared.weight /= 8
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(std=2)
        for block in model.decoder.block:  # or a random model hardly looks at what it said and was asked
            block.layer[0].SelfAttention.o.weight *= 8
            block.layer[1].EncDecAttention.o.weight *= 8
    return model


def ragged_prompts(count=11):
    rng = np.random.default_rng(3)
    return [np.append(rng.integers(3, 90, (7 * i) % 19), 1).astype(np.int32) for i in range(count)]


def texts(found):
    return [text.tolist() for text in found[0]]


def said_by_full_passes(model, prompts, sampling):
    """The readable twin: one text after another, no cache, the decoder runs anew over all that was said."""
    found = []
    for prompt, seed in zip(prompts, sampling.seeds, strict=True):
        ids, said = torch.from_numpy(prompt.astype(np.int64))[None], [0]
        for draw in uniform_draws(seed, sampling.max_new_tokens):
            with torch.no_grad():
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([said])).logits[:, -1, : VOCABULARY.size]
            said += choose_tokens(logits, sampling, torch.tensor([draw]), torch.tensor([said])).tolist()
            if said[-1] in MANY_ENDS.eos_ids:
                break
        found.append(said[1:])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_generate_row_by_row(name):
    model, prompts = make(name), ragged_prompts()
    found = texts(decode_seq2seq(model, prompts, SeededSampling(30, temperature=0, seeds=range(11)), VOCABULARY, 4))
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False,
            suppress_tokens=list(range(VOCABULARY.size, 96)),
        )  # fmt: skip
        assert text == wanted[0, 1:].tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, dict(temperature=1.5, min_p=0.02, repetition_penalty=1.3)])
def test_ragged_rows_side_by_side_say_what_each_says_alone(name, settings):
    """Rows that say more than others, and new ones beside those half-way, keep their own relative positions."""
    model, prompts = make(name, num_decoder_layers=3), ragged_prompts()
    sampling = SeededSampling(30, seeds=range(100, 111), **settings)
    wanted = said_by_full_passes(model, prompts, sampling)
    lengths = [len(text) for text in wanted]
    assert min(lengths) < 10 < 20 < max(lengths), lengths
    for rows in (1, 3, 11):
        found, stats = decode_seq2seq(model, prompts, sampling, MANY_ENDS, rows)
        assert [text.tolist() for text in found] == wanted
        assert stats.peak_rows <= rows and stats.tokens == sum(lengths)
        assert stats.cache_bytes <= rows * (32 + 32) * cache_bytes_per_token(model)
    assert stats.prefills == 1 and stats.steps == max(lengths) - 1
    assert {model.config._attn_implementation, model.decoder.config._attn_implementation} == {"sdpa"}


def test_a_text_ends_with_its_eos_or_at_its_length_and_depends_on_its_prompt():
    model = make("t5")
    assert decode_seq2seq(model, [], SeededSampling(5, seeds=[]), MANY_ENDS, 4)[0] == []
    found = texts(decode_seq2seq(model, ragged_prompts(), SeededSampling(20, seeds=range(11)), MANY_ENDS, 11))
    assert len({tuple(text[:3]) for text in found}) > 3
    ended = [text for text in found if {*text} & {*MANY_ENDS.eos_ids}]
    assert ended and len(ended) < len(found)
    assert all(not {*text[:-1]} & {*MANY_ENDS.eos_ids} for text in ended)
    assert all(len(text) == 20 for text in found if text not in ended)
