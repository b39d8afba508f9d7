#!/usr/bin/env bash
# scaled_dot_product_attention in bf16 on a CPU, torch 2.13.0: 8 rows of 64 tokens, 9 heads of 64, a causal mask of bools.
# Expected: forward and backward take no longer than the same by two and four batched products and a softmax in fp32.
# Seen: more than twice as long on CPUs with bf16 instructions (AVX512-BF16, AMX), most of it in the backward pass, with
# the same error against fp32. Without such instructions this says so and ends with 0.
# Exits with 1 where that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/attention.py" <<'PYTHON'
import statistics
import sys
import time

import torch

torch.set_num_threads(1)
if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
    print("no bf16 instructions here: nothing is measured")
    sys.exit(0)
torch.manual_seed(0)
q, k, v, grad = (torch.randn(8, 9, 64, 64, dtype=torch.bfloat16) for _ in range(4))
mask = torch.ones(64, 64, dtype=torch.bool).tril()


def fused(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def products(q, k, v):
    scores = (q @ k.transpose(-1, -2)).float() * 0.125
    return torch.where(mask, scores, -1e30).softmax(-1).to(q.dtype) @ v


def run(attention, dtype=torch.bfloat16):
    inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (q, k, v)]
    attention(*inputs).backward(grad.to(dtype))
    return torch.cat([tensor.grad.float().flatten() for tensor in inputs])


def seconds(attention):
    times = []
    for _ in range(30):
        start = time.perf_counter()
        run(attention)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


exact = run(products, torch.float32)
errors = [((run(way) - exact).norm() / exact.norm()).item() for way in (fused, products)]
times = [seconds(way) for way in (fused, products)]
print(f"torch {torch.__version__}: fused {times[0] * 1e3:.2f} ms, by products {times[1] * 1e3:.2f} ms, ratio "
      f"{times[0] / times[1]:.1f}; relative errors of the gradients {errors[0]:.1e} and {errors[1]:.1e}")
assert times[0] > 2 * times[1] and errors[1] < 1.5 * errors[0]
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/attention.py"
