"""The layout of a model's rows: what each of the two kinds answers, and that nobody else asks for an encoder."""

import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from toolkit.batch import DECODER_ONLY, EncoderDecoder, Example, TokenBatch, layout_of, make_window
from toolkit.models.engines import HIDDEN_STATES
from toolkit.models.vocabulary import shared_layout
from toolkit.rollout.local import LOOPS

ROOT = Path(__file__).resolve().parent.parent
PAD, BOS, EOS = 50, 1, 2
TOKENIZER = SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS)
T5 = EncoderDecoder(0)
EXAMPLES = [Example([3, 4, 5, 6, 7], 3), Example([8, 9], 1)]


def test_an_encoder_reads_the_prompts_and_a_decoder_predicts_all_of_the_responses():
    batch = T5.batch(EXAMPLES, PAD, 1)
    assert batch.encoder_ids_BS.tolist() == [[3, 4, 5], [8, PAD, PAD]]
    assert batch.encoder_mask_BS.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.input_ids_BT.tolist() == [[0, 6, 7], [0, 9, PAD]]
    assert batch.targets_N.tolist() == [6, 7, 9] and (batch.num_targets, batch.num_tokens) == (3, 9)
    inputs = batch.model_inputs()
    assert inputs["input_ids"] is batch.encoder_ids_BS and inputs["decoder_input_ids"] is batch.input_ids_BT
    assert inputs["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_without_an_encoder_prompt_and_response_are_one_row():
    batch = DECODER_ONLY.batch(EXAMPLES, PAD, 1)
    assert batch.input_ids_BT.tolist() == [[3, 4, 5, 6, 7], [8, 9, PAD, PAD, PAD]]
    assert batch.targets_N.tolist() == [6, 7, 9] and (batch.num_targets, batch.num_tokens) == (3, 7)


@pytest.mark.parametrize("layout", [DECODER_ONLY, T5])
def test_batches_of_a_layout_are_joined_and_moved_as_such(layout):
    parts = [layout.batch([example], PAD, 1) for example in EXAMPLES]
    joined, whole = TokenBatch.concatenate(parts), layout.batch(EXAMPLES, PAD, 1)
    assert type(joined) is type(whole) and joined.num_tokens == whole.num_tokens
    for name, tensor in whole.model_inputs().items():
        is_real = whole.model_inputs()[name.replace("input_ids", "attention_mask")].bool()
        assert joined.model_inputs()[name][is_real].equal(tensor[is_real]), name
    moved = whole.to("meta")
    assert type(moved) is type(whole) and moved.num_tokens == whole.num_tokens
    assert {tensor.device.type for tensor in moved.model_inputs().values()} == {"meta"}


@pytest.mark.parametrize("layout", [DECODER_ONLY, T5])
def test_the_area_is_that_of_the_batch(layout):
    draw = np.random.default_rng(0)
    examples = [Example(draw.integers(3, 50, n), int(draw.integers(1, n))) for n in draw.integers(2, 40, 6)]
    ids = [t for name, t in layout.batch(examples, PAD).model_inputs().items() if name.endswith("input_ids")]
    assert layout.area([[example] for example in examples], 8) == sum(tensor.numel() for tensor in ids)


def test_prompts_end_and_are_cut_as_their_model_was_trained():
    ids = [BOS, 3, 4, 5]
    assert DECODER_ONLY.end_prompt(ids, TOKENIZER) == ids
    assert DECODER_ONLY.cut_prompt(ids, 2, TOKENIZER) == [BOS, 5]
    assert DECODER_ONLY.cut_prompt(ids[1:], 2, TOKENIZER) == [4, 5]
    assert T5.end_prompt(ids, TOKENIZER) == T5.end_prompt([*ids, EOS], TOKENIZER) == [*ids, EOS]
    assert T5.cut_prompt([*ids, EOS], 3, TOKENIZER) == [BOS, 3, EOS]


def test_what_an_encoder_decoder_is_not_made_for_is_refused():
    DECODER_ONLY.check_use(packing=True, cache=True)
    with pytest.raises(ValueError, match="reads prompt and response apart"):
        make_window(EXAMPLES, 2, PAD, pack_to=16, layout=T5)
    with pytest.raises(ValueError, match=r"its decoder starts with id 0\): answers are kept for models without"):
        T5.check_use(cache=True)


def test_two_models_share_a_layout_or_are_refused():
    config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=0)
    assert shared_layout(T5, layout_of(config)) == T5
    assert layout_of(SimpleNamespace(is_encoder_decoder=False)) is DECODER_ONLY
    for other, said in ((DECODER_ONLY, "has no encoder"), (EncoderDecoder(7), "starts its decoder with id 7")):
        with pytest.raises(ValueError, match=f"the teacher starts its decoder with id 0, the student {said}"):
            shared_layout(T5, other)


def test_each_layout_has_passes_and_a_loop_of_generation():
    assert HIDDEN_STATES.keys() == LOOPS.keys() == {type(DECODER_ONLY), type(T5)}


#: names by which one would ask for an encoder -> who may: the layout, and files about a model's files and stacks
ASKED = {
    "is_encoder_decoder": ("batch/layout.py", "models/load.py", "pruning/"),
    "decoder_start_token_id": ("batch/layout.py", "models/load.py", "rollout/seq2seq.py"),
    "encoder_ids_BS": ("batch/layout.py",),
    "start_id": ("batch/layout.py",),
    "EncoderDecoder": ("batch/", "models/engines.py", "rollout/local.py"),
}


def test_nobody_else_asks_whether_there_is_an_encoder():
    for path in sorted((ROOT / "toolkit").rglob("*.py")):
        name = path.relative_to(ROOT / "toolkit").as_posix()
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {node.id for node in nodes if isinstance(node, ast.Name)}
        for asked in names & ASKED.keys():
            assert name.startswith(ASKED[asked]), f"{name} asks for {asked}"
