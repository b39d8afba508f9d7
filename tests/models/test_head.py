"""What families do to their logits, against their own forward; and that what is not known is refused."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tests.tiny import make_tokenizer
from toolkit.batch import Example, TokenBatch
from toolkit.models import whole_student
from toolkit.models.engines import both_logits
from toolkit.models.head import logit_rules
from toolkit.models.load import generation_ends
from toolkit.models.vocabulary import Vocabulary, shared_vocabulary
from toolkit.teachers.live import whole_teacher

VOCABULARY = Vocabulary(60, (1,), 0)
SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=1.0,
)  # fmt: skip
FALCON_H1 = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)


def made(family, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | changes)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes", "rule"),
    [
        ("llama", {}, (1.0, None)),
        ("cohere", {}, (0.0625, None)),
        ("granite", {"logits_scaling": 8.0}, (0.125, None)),
        ("hyperclovax", {"logits_scaling": 4.0}, (4.0, None)),
        ("gemma2", {}, (1.0, 30.0)),
        ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 16}, (1.0, 30.0)),
        ("falcon_h1", FALCON_H1 | {"lm_head_multiplier": 0.25}, (0.25, None)),
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "logit_scale": "inv_sqrt_d_model"}, (1.0, None)),
    ],
)
def test_logits_are_the_models_own(family, changes, rule, dtype):
    model = made(family, **changes).to(dtype)
    assert logit_rules(model.config) == rule
    whole_student(model, VOCABULARY)  # which holds them against the model's forward
    whole_teacher(model, VOCABULARY)


def test_the_rules_of_a_model_for_text_and_images_are_those_of_its_text():
    config = AutoConfig.for_model("gemma4", text_config={"final_logit_softcapping": 30.0})
    assert logit_rules(config) == logit_rules(config.get_text_config()) == (1.0, 30.0)


class Odd(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 1.1 * out.logits
        return out


@pytest.mark.parametrize("build", [whole_student, whole_teacher])
def test_a_model_that_does_something_else_is_refused(build):
    model = made("llama")
    model.__class__ = Odd
    with pytest.raises(ValueError, match=r"a llama model, does something to its logits that is not known here.*off by"):
        build(model, VOCABULARY)


def test_columns_past_the_tokenizer_do_not_matter():
    model = made("llama")
    with torch.no_grad():
        model.lm_head.weight[60:] = torch.inf
    batch = TokenBatch.from_examples([Example(np.arange(2, 8), 3)], 0)
    own, found = both_logits(whole_student(model, VOCABULARY).engine, batch)
    assert own.shape == found.shape == (3, 64)


def test_a_text_ends_at_what_the_model_lists_and_the_tokenizer_calls_special(tmp_path):
    tokenizer = make_tokenizer()
    word = tokenizer("number")["input_ids"][0]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3, word, 7000]}))
    assert generation_ends(str(tmp_path)) == [0, 3, word, 7000]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|assistant|>"]})
    assert shared_vocabulary(tokenizer, tokenizer, [3, word, 7000]).eos_ids == (tokenizer.eos_token_id, 3)
    assert shared_vocabulary(tokenizer, tokenizer).eos_ids == (tokenizer.eos_token_id,)
    assert generation_ends("") == generation_ends(str(tmp_path / "none")) == []
