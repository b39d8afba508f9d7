"""Two experiments with the loss's row passes, which are what a GPU's fused loss takes beside its matrix products.

    python benchmarks/gpu_rows.py [--device cpu] [--tiny] [--json FILE]

bf16 logits    the products' results are stored in bf16, and statistics, sums and gradients are made in fp32 of them: 14
               bytes of memory an element instead of 26, and tiles 2.5 times as high for the same budget
one read       a kernel that reads each row once (gpu_one_read.py): 10 bytes of fp32 logits, or 6 of bf16 ones

Times are those of benchmarks/loss.py, forward and backward, beside the bare products; of the row kernel alone by events
around its launches. Errors are against float64, as there. The goal is 1.2 x the products, and the errors decide whether
bf16 logits are an option. Without a GPU the kernels run in Triton's interpreter at tiny size, for the errors alone.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import loss
from benchmarks.gpu_common import Record, parsed, parser_of, synchronize
from benchmarks.gpu_one_read import OneRead
from toolkit.divergences import products, tiles

#: name -> whether logits are stored in bf16, and (columns, warps) of a program of the kernel that reads once
VARIANTS: dict[str, tuple[bool, tuple[int, int] | None]] = {
    "today": (False, None),
    "bf16 logits": (True, None),
    "one read": (False, (8192, 16)),
    "bf16 logits, one read": (True, (8192, 16)),
    "bf16 logits, one read of 4096": (True, (4096, 16)),
}
DIVERGENCES = "skl", "srkl", "fkl"


class TimedKernel:
    """A row kernel, and the milliseconds of all its calls."""

    def __init__(self, kernel: Callable, device: str):
        self.kernel, self.device = kernel, device
        self.marks: list[tuple] = []

    def __call__(self, *arguments, **named) -> None:
        before = self._mark()
        self.kernel(*arguments, **named)
        self.marks.append((before, self._mark()))

    def _mark(self):
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take_ms(self) -> float:
        synchronize(self.device)
        marks, self.marks = self.marks, []
        if self.device == "cpu":
            return sum(after - before for before, after in marks) * 1e3
        return sum(before.elapsed_time(after) for before, after in marks)


@contextmanager
def using(variant: str, device: str) -> Iterator[Callable[[], float]]:
    """Inside, `fused_linear_divergence` works by this variant. Gives the milliseconds of its row kernel since the last
    time it was asked."""
    stores_bf16, one_read = VARIANTS[variant]
    timed: list[TimedKernel] = []
    make = tiles.row_kernel

    def kernel_of(*arguments, **named):
        kernel = make(*arguments, **named) if one_read is None else OneRead(*one_read)
        timed.append(TimedKernel(kernel, device))
        return timed[-1]

    # A CPU has no product from bf16 to fp32: there the operands are widened.
    operands = torch.float32 if device == "cpu" and not stores_bf16 else torch.bfloat16
    dtypes = operands, torch.bfloat16 if stores_bf16 else torch.float32
    stored = mock.patch.object(products, "operand_dtypes", lambda *_: dtypes)
    with mock.patch.object(tiles, "row_kernel", kernel_of), stored:
        yield lambda: sum(kernel.take_ms() for kernel in timed)


def tell_times(record: Record, bench: loss.Bench, shape: loss.Shape, divergences: Sequence[str], repeats: int) -> None:
    """All variants in turn, the bare products among them."""
    inputs = loss.make_inputs(shape, bench.dtype, bench.device)
    bench.heights[shape] = bench.choose_height(shape, inputs)
    bare = loss.products(inputs, bench.heights[shape])
    bare_ms = statistics.median(ms for _ in range(repeats) for ms in bench.visit(bare))
    rows, kept = [], {"products": bare_ms}
    for divergence in divergences:
        for variant in VARIANTS:

            def measured(divergence=divergence, variant=variant):
                with using(variant, bench.device) as kernel_ms:
                    unit = loss.ours(inputs, divergence, backend="triton")
                    unit()  # compiled, and not counted
                    kernel_ms()
                    times = [ms for _ in range(repeats) for ms in bench.visit(unit)]
                    calls = repeats * (4 if bench.device == "cuda" else 1)  # an untimed one each, on a GPU
                    return statistics.median(times), kernel_ms() / calls

            bench.release()
            found, failure = bench.attempt(f"{variant} {divergence}", measured)
            kept[f"{divergence}, {variant}"] = failure or found
            if failure:
                rows.append([divergence, variant, failure, None, None])
            else:
                rows.append([divergence, variant, found[0], found[0] / bare_ms, found[1]])
    record.keep(**{f"times at {shape}": kept})
    record.say(f"(N, V, Hs, Ht) = {shape}; the bare products take {bare_ms:.4g} ms. The goal is 1.2 x them.")
    record.table(["divergence", "variant", "loss ms", "x products", "row kernel ms"], rows)


def tell_errors(record: Record, bench: loss.Bench, shape: loss.Shape, divergences: Sequence[str]) -> None:
    """Of values, hidden and head gradient, against float64."""
    found = {}
    for variant in VARIANTS:
        with using(variant, bench.device):
            attempted, failure = bench.attempt(
                f"errors of {variant}", lambda: loss.errors(bench, shape, list(divergences))
            )  # fmt: skip
        found[variant] = failure or attempted
    record.keep(**{f"errors at {shape}": found})
    rows = []
    for i, name in enumerate(("values", "hidden gradient", "head gradient")):
        for at, line in enumerate(found["today"]):
            cells = [
                lines if isinstance(lines, str) else f"{lines[at]['ours'][i]:.1e}" if "ours" in lines[at] else "failed"
                for lines in found.values()
            ]
            plain = f"{line['plain'][i]:.1e}" if "plain" in line else "failed"
            rows.append([name, line["divergence"], line["logit_std"], *cells, plain])
    record.say(f"Relative errors against float64 at V = {shape.V}, {loss.ERROR_ROWS} tokens:")
    record.table(["of", "divergence", "logit std", *found, "full logits"], rows)


def main() -> None:
    options = parsed(parser_of(__doc__))
    record = Record(options.json)
    bench = loss.Bench(options.device, "bf16", None, "triton", repeats=3)
    small = loss.Shape(8, 320, 16, 24)
    if options.tiny:
        with mock.patch.multiple(loss, LOGIT_STDS=(2, 8), ERROR_ROWS=8):
            tell_errors(record, bench, small, DIVERGENCES[:1])
        tell_times(record, bench, small, DIVERGENCES[:1], repeats=1)
    else:
        tell_errors(record, bench, loss.LONG, DIVERGENCES)
        tell_times(record, bench, loss.LONG, DIVERGENCES, repeats=2)
        tell_times(record, bench, loss.MIDDLE, DIVERGENCES[:1], repeats=3)
    record.keep(notes=bench.notes)
    if bench.notes:
        record.say("\n".join(f"- {note}" for note in bench.notes))


if __name__ == "__main__":
    main()
