#!/usr/bin/env bash
# A folder with Mistral 7B's tokenizer.model and LlamaTokenizer in its tokenizer_config.json, read by transformers 5.24.
# Expected: the ids of the sentencepiece library, and BOS before a text, which the class adds by default. Seen: merges
# are ranked by ids in place of scores (runs of spaces are merged before words), one leading space is lost, no BOS.
# TokenizersBackend, the class below it, reads the same folder right.
# Exits with 1 where that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip install -q --disable-pip-version-check"
$pip transformers==5.24.0 sentencepiece==0.2.3 protobuf requests
$pip --no-deps mistral-common==1.4.4
cd "$folder"
venv/bin/python - <<'PYTHON'
import importlib.util, json, pathlib, shutil, sys, sentencepiece, transformers
from transformers import AutoTokenizer, TokenizersBackend
data = pathlib.Path(importlib.util.find_spec("mistral_common").origin).parent / "data"
model = pathlib.Path("model")
model.mkdir()
shutil.copy(data / "tokenizer.model.v1", model / "tokenizer.model")
settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
(model / "tokenizer_config.json").write_text(json.dumps(settings))
(model / "config.json").write_text('{"model_type": "llama"}')
library = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
auto, base = AutoTokenizer.from_pretrained(model), TokenizersBackend.from_pretrained(model)
print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__, type(auto).__name__)
texts = ["a  b", " a", "if x:\n    return  y"]
wrong = 0
for text in texts:
    seen, right = ([t.convert_ids_to_tokens(t(text, add_special_tokens=False)["input_ids"]) for t in (auto, base)])
    print(repr(text), "expected", library.encode(text, out_type=str), "seen", seen)
    wrong += seen != library.encode(text, out_type=str)
    assert right == library.encode(text, out_type=str)
begins = auto("a")["input_ids"][0] == auto.bos_token_id
print("begins with BOS:", begins)
sys.exit(not (wrong == len(texts) and not begins))
PYTHON
