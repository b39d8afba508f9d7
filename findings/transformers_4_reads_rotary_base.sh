#!/usr/bin/env bash
# A LLaMA whose rotary base is not 10,000, saved by transformers 5.24 and loaded by transformers 4.57.
# Expected: the same logits, or an error. Seen: no error, no warning, other logits. config.json has the base in
# rope_parameters alone, and 4.57 takes its default. With a top-level rope_theta beside it both agree.
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
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_warning()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save((transformers.__version__, model(torch.arange(5, 45)[None]).logits), sys.argv[2])
PYTHON
cd "$folder"
venv/bin/python - <<'PYTHON'
import json, pathlib, shutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.2, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)
LlamaForCausalLM(config).save_pretrained("model")
shutil.copytree("model", "named")
file = pathlib.Path("named/config.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 500000.0}))
PYTHON
for name in model named; do
    venv/bin/python read.py "$name" "$name.new.pt"
    PYTHONPATH="$folder/older" venv/bin/python read.py "$name" "$name.old.pt"
done
venv/bin/python - <<'PYTHON'
import torch
apart = {}
for name in ("model", "named"):
    (new, ours), (old, theirs) = (torch.load(f"{name}.{version}.pt") for version in ("new", "old"))
    apart[name] = (ours - theirs).abs().max().item()
print(f"saved by transformers {new}, read by {old}: logits differ by {apart['model']:.2f}")
print(f"with a top-level rope_theta in config.json: by {apart['named']:.1e}")
raise SystemExit(not (apart["model"] > 0.1 and apart["named"] < 1e-4))
PYTHON
