#!/usr/bin/env bash
# An all-gather of 50 MB from each of two ranks, by torch 2.13.0's gloo.
# Expected: about as long as one broadcast by each rank, which sends the same bytes; an all-reduce sends no fewer.
# Seen: two to four times as long. Whoever shards weights over gloo (ZeRO, FSDP) gathers them in every step.
# Exits with 1 where that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/gather.py" <<'PYTHON'
import statistics
import time

import torch
import torch.distributed as dist

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, share = dist.get_rank(), torch.ones(25_000_000, dtype=torch.bfloat16)
whole = torch.empty(2 * len(share), dtype=share.dtype)


def broadcasts():
    parts = whole.chunk(2)
    parts[rank].copy_(share)
    sent = [dist.broadcast(part, source, async_op=True) for source, part in enumerate(parts)]
    for work in sent:
        work.wait()


def seconds(send):
    times = []
    for _ in range(9):
        dist.barrier()
        start = time.perf_counter()
        send()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
found = seconds(lambda: gather(whole, share)), seconds(broadcasts), seconds(lambda: dist.all_reduce(share))
if rank == 0:
    print(f"torch {torch.__version__}: all-gather {found[0]:.3f} s, two broadcasts {found[1]:.3f} s, "
          f"all-reduce of one share {found[2]:.3f} s; ratio {found[0] / found[1]:.1f}")
dist.destroy_process_group()
assert found[0] > 1.5 * found[1]
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --nproc-per-node 2 "$folder/gather.py"
