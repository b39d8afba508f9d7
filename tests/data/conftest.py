"""A real, tiny byte-level BPE tokenizer, trained here."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.",
    "### Instruction:\n### Input:\n### Response:\nWhat does the function return in the Python "
    "standard library?",
    "Return the square of a number, or None where the number is missing. Copy a file to a folder.",
]


def make_tokenizer(bos=False, eos=True, chat=True):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = ["<s>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS * 4, trainer)
    if bos:  # as Llama does, and with the EOS that some of its tokenizers add to a text
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A <|end|>", special_tokens=[("<s>", 0), ("<|end|>", 1)]
        )
    names = {"bos_token": "<s>"} | ({"eos_token": "<|end|>", "pad_token": "<|end|>"} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def new_tokenizer():
    return make_tokenizer


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows (or raw strings, as they are) as jsonl and returns the path as text."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text(
            "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
        )
        return str(path)

    return write
