"""Real things in small: a byte-level BPE tokenizer trained here, LLaMA shapes at random, rows of ragged length."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\n### Input:\n### Response:\nWhat does the function return in the Python standard library?",
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


def save_llama(
    folder, tokenizer, seed, hidden=32, layers=2, tied=False, extra_rows=0, dtype=torch.float32, positions=256
):
    """A random LLaMA with this tokenizer, saved as a Hugging Face folder; `extra_rows` pads its vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer) + extra_rows, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
        tie_word_embeddings=tied, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_t5(folder, tokenizer, seed, kind="t5", own_head=False, hidden=32, layers=2, extra_rows=0, dropout=0.0):
    """A random T5 (1.0 with tied embeddings, 1.1 with a head of its own) or mT5, written as the hub has them."""
    shape = dict(
        vocab_size=len(tokenizer) + extra_rows, d_model=hidden, d_kv=8, d_ff=2 * hidden, num_layers=layers, num_heads=4,
        feed_forward_proj="gated-gelu" if own_head else "relu", tie_word_embeddings=not own_head, dropout_rate=dropout,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    torch.manual_seed(seed)
    made = T5ForConditionalGeneration(T5Config(**shape)) if kind == "t5" else MT5ForConditionalGeneration(
        MT5Config(**shape))  # fmt: skip
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if own_head:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = 0.2 * torch.randn(shape["vocab_size"], hidden)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def save_rows(path, count=40):
    """Questions with answers of very different lengths."""
    words = [
        "return",
        "the",
        "number",
        "of",
        "a",
        "file",
        "or",
        "folder",
        "where",
        "the",
        "function",
        "is",
        "missing",
        "from",
        "the",
        "standard",
        "library",
    ]
    rows = [
        {"prompt": f"What is {words[i % len(words)]} {i}?", "response": " ".join(words[: 1 + (i * 7) % len(words)])}
        for i in range(count)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


#: how a student and its teacher may be held on the ranks -> settings
HELD = {
    "sharded": {"student.ds_config": "tests/student_sharded.json"},
    "resident": {"student.sharding": "resident", "teacher.sharding": "resident"},
    "zero2": {"student.ds_config": "ds_configs/student_zero2.json"},
}


def ds_file(name):
    """A DeepSpeed file of ds_configs/, or one of tests/ that shards also what is as small as these models."""
    return f"{'tests' if name.endswith('_sharded') else 'ds_configs'}/{name}.json"


def tiny_overrides(folder, **changes):
    """key=value settings of a run on the models and rows in `folder` (made by the `tiny` fixture)."""
    settings = {
        "teacher.path": f"{folder}/teacher", "student.path": f"{folder}/student", "data.source": f"{folder}/rows.jsonl",
        "data.validation_source": f"{folder}/rows.jsonl", "data.max_length": 96, "data.max_prompt_length": 64,
        "teacher.ds_config": "tests/teacher_sharded.json", "student.ds_config": "tests/student_sharded.json",
        "precision": "fp32", "train.steps": 3, "train.rows_per_step": 8, "train.rows_per_micro_batch": 4,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.5, "optimizer.max_grad_norm": 0, "optimizer.weight_decay": 0, "schedule.policy": "off",
        "rollout.max_new_tokens": 12, "validation.rows": 6, "validation.rows_per_pass": 2,
        "output_dir": f"{folder}/runs", "cache_dir": f"{folder}/cache", "resume": "never",
    } | {name.replace("__", "."): value for name, value in changes.items()}  # fmt: skip
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def save_sentencepiece(folder, name="tiny.model", vocabulary=300, **changes):
    """A sentencepiece .model file as LLaMA's: BPE with byte fallback, <unk> 0, <s> 1, </s> 2, no pad token; runs of
    spaces (of 330 pieces there are some) have low ids and the lowest scores, so they are merged last. `changes` are
    settings of its trainer."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    path, lines = Path(folder) / name, [*CORPUS, "if x:        return    the" * 3]
    settings = dict(
        model_type="bpe", byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True,
    ) | changes  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_prefix=str(path.with_suffix("")),
        vocab_size=vocabulary, minloglevel=2, hard_vocab_limit=False, **settings,
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    if settings["model_type"] == "bpe":
        for piece in model.pieces:
            if len(piece.piece) > 1 and not piece.piece.strip("▁"):
                piece.score = -1e9
    path.write_bytes(model.SerializeToString())
    return str(path)


def save_gguf(path, architecture="llama", **fields):
    """A GGUF file with a random LLaMA of one layer; `fields` are those of its tokenizer, by llama.cpp's names."""
    from gguf import GGUFWriter

    size = len(fields["tokens"])
    shape = dict(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=128))
    names = {
        "model.layers.0.": "blk.0.", "self_attn.o_proj": "attn_output", "self_attn.": "attn_", "mlp.": "ffn_",
        "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm", "_proj": "",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    writer = GGUFWriter(path, architecture)
    for add, value in (
        ("context_length", 128), ("embedding_length", 32), ("block_count", 1), ("feed_forward_length", 64),
        ("head_count", 4), ("head_count_kv", 4), ("layer_norm_rms_eps", 1e-6), ("rope_dimension_count", 8),
        ("vocab_size", size),
    ):  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    writer.add_tokenizer_model(fields.pop("model"))
    writer.add_token_list(fields.pop("tokens"))
    writer.add_token_types(fields.pop("token_type"))
    for name, value in fields.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](f"tokenizer.ggml.{name}", value)
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
