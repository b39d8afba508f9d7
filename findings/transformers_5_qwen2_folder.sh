#!/usr/bin/env bash
# A tokenizer saved by transformers 5.24 into the folder of a model of type qwen2, and read back by AutoTokenizer.
# Expected: the tokenizer that was saved. Seen: Qwen2Tokenizer, which splits texts by Qwen's rule and has one entry more;
# tokenizer.json and tokenizer_class say otherwise. In a folder of type llama or qwen3 the same files come back.
# Exits with 1 where that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check transformers==5.24.0 requests
cd "$folder"
venv/bin/python - <<'PYTHON'
import pathlib, sys, transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
rules = Tokenizer(models.BPE())
rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
rules.train_from_iterator(["def f(x):  return (x, 2024)"] * 9, trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
saved = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<end>", pad_token="<end>")
text, same = "f(x):  return (x, 2024)", {}
print("transformers", transformers.__version__, "saved", len(saved), saved.tokenize(text))
for kind in ("llama", "qwen3", "qwen2"):
    saved.save_pretrained(kind)
    pathlib.Path(kind, "config.json").write_text('{"model_type": "%s"}' % kind)
    read = AutoTokenizer.from_pretrained(kind)
    print(kind, type(read).__name__, len(read), read.tokenize(text))
    same[kind] = (read.get_vocab(), read(text)["input_ids"]) == (saved.get_vocab(), saved(text)["input_ids"])
sys.exit(same != {"llama": True, "qwen3": True, "qwen2": False})
PYTHON
