#!/usr/bin/env bash
# A T5 1.1 (a head of its own, tie_word_embeddings false), loaded and saved again by transformers 5.24.
# Expected: config.json says tie_word_embeddings false still, and any reader finds the head. Seen: it says true, beside
# an lm_head.weight that differs from the embeddings. 5.24 itself ignores the setting; transformers 4.57 goes by it, ties
# and scales, and its logits are others without an error.
# Exits with 1 where that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip install -q --disable-pip-version-check"
$pip torch==2.13.0 transformers==5.24.0 requests
$pip --no-deps --target "$folder/older" transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1
cat >"$folder/read.py" <<'PYTHON'
import sys, torch, transformers
from transformers import T5ForConditionalGeneration
transformers.logging.set_verbosity_error()
model = T5ForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(5, 25)[None], decoder_input_ids=torch.arange(0, 9)[None]).logits
torch.save((transformers.__version__, logits), sys.argv[2])
PYTHON
cd "$folder"
PYTHONPATH="$folder/older" venv/bin/python - <<'PYTHON'
import torch
from transformers import T5Config, T5ForConditionalGeneration
torch.manual_seed(0)
config = T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    tie_word_embeddings=False, decoder_start_token_id=0,
)
T5ForConditionalGeneration(config).save_pretrained("before")  # by transformers 4.57, as checkpoints of T5 1.1 were
PYTHON
venv/bin/python - <<'PYTHON'
from transformers import T5ForConditionalGeneration
T5ForConditionalGeneration.from_pretrained("before").save_pretrained("after")
PYTHON
venv/bin/python read.py after new.pt
PYTHONPATH="$folder/older" venv/bin/python read.py before source.pt
PYTHONPATH="$folder/older" venv/bin/python read.py after old.pt
venv/bin/python - <<'PYTHON'
import json, torch
from safetensors import safe_open
(new, ours), (old, theirs), (_, source) = (torch.load(f"{name}.pt") for name in ("new", "old", "source"))
tied = [json.load(open(f"{name}/config.json"))["tie_word_embeddings"] for name in ("before", "after")]
with safe_open("after/model.safetensors", "pt") as weights:
    has_head = "lm_head.weight" in weights.keys()
print(f"tie_word_embeddings was {tied[0]}, is {tied[1]}; lm_head.weight is {'there' if has_head else 'gone'}")
apart = (ours - source).abs().max().item(), (theirs - source).abs().max().item()
print(f"logits against the checkpoint's: {apart[0]:.1e} by transformers {new}, {apart[1]:.2f} by {old}")
raise SystemExit(not (tied == [False, True] and has_head and apart[0] < 1e-4 and apart[1] > 0.1))
PYTHON
