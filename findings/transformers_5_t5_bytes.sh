#!/usr/bin/env bash
# A sentencepiece model with byte pieces, as mT5's, read by T5Tokenizer of transformers 5.24.
# Expected: the ids of the sentencepiece library, bytes for a character that has no piece. Seen: <unk>, so the character
# is lost; the class sets byte_fallback=False whatever the file says. TokenizersBackend reads the same file right.
# Exits with 1 where that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
    transformers==5.24.0 sentencepiece==0.2.3 protobuf requests
cd "$folder"
mkdir mt5
venv/bin/python - <<'PYTHON'
import pathlib, sys, sentencepiece, transformers
from transformers import AutoTokenizer, TokenizersBackend
words = "return the number of files in a folder or none where the folder is missing".split()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([" ".join(words[i % 9 :]) for i in range(200)]), model_prefix="mt5/spiece", vocab_size=330,
    model_type="unigram", byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
    minloglevel=2)
pathlib.Path("mt5/config.json").write_text('{"model_type": "mt5"}')
pathlib.Path("mt5/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
library = sentencepiece.SentencePieceProcessor(model_file="mt5/spiece.model")
auto, base = AutoTokenizer.from_pretrained("mt5"), TokenizersBackend.from_pretrained("mt5", vocab_file="mt5/spiece.model")
text = "the folder 漢"
expected = library.encode(text, out_type=str)
seen, right = (t.convert_ids_to_tokens(t(text, add_special_tokens=False)["input_ids"]) for t in (auto, base))
print("transformers", transformers.__version__, type(auto).__name__, "expected", expected, "seen", seen)
sys.exit(not (seen != expected and "<unk>" in seen and right == expected))
PYTHON
