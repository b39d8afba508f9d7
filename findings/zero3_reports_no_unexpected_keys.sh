#!/usr/bin/env bash
# transformers under DeepSpeed ZeRO-3: a checkpoint of 4 layers loads under a configuration of 2 without a word.
#
# Expected: `from_pretrained(..., output_loading_info=True)` names the tensors that it leaves out, as it does without
# ZeRO-3. Seen: under ZeRO-3 "unexpected_keys" is empty and nothing is logged, so a model of half its layers trains.
# Exits with 0 while that is so, with another code when it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 deepspeed==0.19.8 accelerate==1.14.0
cat > "$folder/load.py" <<'PYTHON'
import sys

import deepspeed
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

folder = sys.argv[1] + "/model"
small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4)
LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **small)).save_pretrained(folder)
shorter = LlamaConfig(num_hidden_layers=2, **small)


def unexpected():
    model, found = LlamaForCausalLM.from_pretrained(folder, config=shorter, output_loading_info=True)
    assert len(model.model.layers) == 2
    return len(found["unexpected_keys"])


plain = unexpected()
deepspeed.init_distributed("gloo")
zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
sharded = unexpected()
print(f"transformers {transformers.__version__}, deepspeed {deepspeed.__version__}")
print(f"unexpected keys of two layers left over: {plain} in a plain load, {sharded} under ZeRO-3 (expected: {plain})")
sys.exit(0 if (plain, sharded) == (18, 0) else 1)
PYTHON
export DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29555
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" "$folder/load.py" "$folder" 2> "$folder/log" || {
    code=$?
    cat "$folder/log"
    exit "$code"
}
