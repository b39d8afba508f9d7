"""Attention of a CPU's training step in bf16: by products (`toolkit/models/attention.py`) beside torch's own kernel.

    OMP_NUM_THREADS=1 python benchmarks/attention.py
    OMP_NUM_THREADS=1 python benchmarks/attention.py --heads 32 8 --size 128 --tokens 2048

Forward alone, as a teacher's, and forward with backward, as a student's. The two take turns; each figure is the median
of --repeats. A causal mask of bools, as a packed row has one. Milliseconds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from toolkit.models.attention import as_transformers_does, attention
from toolkit.ranks.memory import keep_freed_memory
from toolkit.tables import format_table


class Layer(nn.Module):
    """What transformers reads of a layer."""

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def milliseconds(work: Callable[[], None], repeats: int) -> dict[str, float]:
    found: dict[str, list[float]] = {"products": [], "torch": []}
    for _ in range(repeats):
        started_s = time.perf_counter()
        work()
        found["products"].append(time.perf_counter() - started_s)
        with as_transformers_does():
            started_s = time.perf_counter()
            work()
            found["torch"].append(time.perf_counter() - started_s)
    return {name: 1e3 * statistics.median(times[1:]) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=2, default=(9, 3), help="of queries, and of keys and values")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024, help="in all rows together")
    parser.add_argument("--lengths", type=int, nargs="+", default=(64, 128, 256, 512))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    keep_freed_memory()
    (heads, kv_heads), table = options.heads, []
    for length in options.lengths:
        rows = max(1, options.tokens // length)
        query, key, value = (
            torch.randn(rows, length, count, options.size, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        )
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
        grad = torch.randn(rows, length, heads, options.size, dtype=torch.bfloat16)
        layer = Layer(heads // kv_heads)

        @torch.no_grad()
        def forward(layer=layer, query=query, key=key, value=value, mask=mask) -> None:
            attention(layer, query, key, value, mask)

        def both(layer=layer, query=query, key=key, value=value, mask=mask, grad=grad) -> None:
            attention(layer, query, key, value, mask)[0].backward(grad)

        once, twice = milliseconds(forward, options.repeats), milliseconds(both, options.repeats)
        table.append([
            f"{rows} x {length}", once["products"], once["torch"], once["torch"] / once["products"],
            twice["products"], twice["torch"], twice["torch"] / twice["products"],
        ])  # fmt: skip
    heading = ["rows x tokens", "forward", "torch's", "ratio", "with backward", "torch's", "ratio"]
    print(f"torch {torch.__version__}, {heads} and {kv_heads} heads of {options.size}, bf16, {torch.get_num_threads()} "
          f"thread(s)\n\n{format_table(heading, table)}")  # fmt: skip


if __name__ == "__main__":
    main()
