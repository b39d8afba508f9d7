"""A GGUF file as a Hugging Face folder: weights and tokenizer.

A GGUF file names the rules of its tokenizer. transformers knows some of the names, and takes GPT-2's rules for all
others without a word; a vocabulary of sentencepiece's it gives to LLaMA's class, which loses a leading space.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from toolkit.models.portable import make_portable
from toolkit.models.tokenizer import SPACE, load_tokenizer
from toolkit.settings import ModelConfig

#: llama.cpp's names of byte-level tokenizers that split a text as GPT-2 does, and of those that part digits before that
GPT2_SPLIT = ("gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
DIGITS_THEN_GPT2_SPLIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
#: and of those that compose characters before, as Qwen does: transformers knows how these split, and leaves that out
COMPOSING = ("qwen2", "qwen35", "deepseek-r1-qwen")
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
BYTE_PIECE = 6  # of sentencepiece's types, which GGUF has too


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model in `file`, in bf16, and its tokenizer into the empty `folder`. Raises ValueError for a tokenizer
    that cannot be read as the file means it."""
    tokenizer = gguf_tokenizer(file)  # first: it is what may be refused
    # Without dequantize, transformers keeps packed weights that run slowly and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_portable(folder)


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `file`. Raises ValueError where the rules that it names are not known, and where it is not read
    by them."""
    reader = GGUFReader(file)

    def value(name: str, otherwise: Any = None) -> Any:
        field = reader.get_field(name)
        return otherwise if field is None else field.contents()

    # Gemma's files write spaces and scores in a way of their own, which transformers knows.
    if value("tokenizer.ggml.model") == "llama" and not value("general.architecture").startswith("gemma"):
        return _of_sentencepiece(value)
    # The others are read by transformers, and mended where it does not know the rules by which they split a text.
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    inner, rules = tokenizer.backend_tokenizer, value("tokenizer.ggml.pre")
    has_gpt2_split = isinstance(inner.pre_tokenizer, pre_tokenizers.ByteLevel)  # which may be for want of a better one
    if has_gpt2_split and rules not in GPT2_SPLIT:
        if rules not in DIGITS_THEN_GPT2_SPLIT:
            raise ValueError(
                f"{file}: how its tokenizer splits a text (tokenizer.ggml.pre) is {rules!r}, which is not known here; "
                "take the model's own folder with its tokenizer.json"
            )
        digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([digits, inner.pre_tokenizer])
    if rules in COMPOSING:
        inner.normalizer = normalizers.NFC()
    return tokenizer


def _of_sentencepiece(value: Callable[..., Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of the sentencepiece model that a file was made from. value: of one of its fields, by name."""
    tokens = value("tokenizer.ggml.tokens")
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    scores, kinds = value("tokenizer.ggml.scores"), value("tokenizer.ggml.token_type")
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token.replace(" ", SPACE), score=score, type=kind)
    # As LLaMA's: pieces are merged by score, what has no piece is bytes, and a space goes before each text unless told.
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = any(piece.type == BYTE_PIECE for piece in model.pieces)
    normalizer.add_dummy_prefix = value("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    # BOS, EOS and the other special tokens as the file says; without a word of it a text begins with BOS.
    settings = {"chat_template": value("tokenizer.chat_template")}
    settings |= {f"add_{end}_token": value(f"tokenizer.ggml.add_{end}_token", end == "bos") for end in ("bos", "eos")}
    ids = {name: value(f"tokenizer.ggml.{name}_token_id") for name in SPECIAL_TOKENS}
    settings |= {SPECIAL_TOKENS[name]: tokens[id] for name, id in ids.items() if id is not None}
    trainer.unk_id, trainer.bos_id, trainer.eos_id = (-1 if ids[name] is None else ids[name] for name in list(ids)[:3])
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "tokenizer.model")
        written.write_bytes(model.SerializeToString())
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(ModelConfig(tokenizer=str(written)), "")
