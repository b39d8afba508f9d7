#!/usr/bin/env bash
# A tokenizer with special tokens beside BOS, EOS and the like, saved by transformers 5.24 and loaded by 4.57.
# Expected: it loads. Seen: AttributeError: 'list' object has no attribute 'keys'. 5.24 writes a list of tokens as
# extra_special_tokens, where 4.57 expects a table of named ones. Both read the same list as additional_special_tokens.
# Exits with 1 where that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip install -q --disable-pip-version-check"
$pip transformers==5.24.0 requests
$pip --no-deps --target "$folder/older" transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1
cd "$folder"
cat >read.py <<'PYTHON'
import sys, transformers
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(f"transformers {transformers.__version__}, {sys.argv[1]}: {tokenizer('a <extra> b')['input_ids']}")
PYTHON
venv/bin/python - <<'PYTHON'
import json, pathlib, shutil
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
tokenizer.save_pretrained("saved")
file = pathlib.Path("saved/tokenizer_config.json")
settings = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # 4.57 has no TokenizersBackend
file.write_text(json.dumps(settings))
shutil.copytree("saved", "renamed")
settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
pathlib.Path("renamed/tokenizer_config.json").write_text(json.dumps(settings))
PYTHON
venv/bin/python read.py saved 2>/dev/null
venv/bin/python read.py renamed 2>/dev/null
PYTHONPATH="$folder/older" venv/bin/python read.py renamed 2>/dev/null
if PYTHONPATH="$folder/older" venv/bin/python read.py saved 2>error.txt; then
    echo "transformers 4.57 loads the list of extra_special_tokens"
    exit 1
fi
told="$(grep "'list' object has no attribute 'keys'" error.txt)"
echo "transformers 4.57.6, saved: $told"
