"""The fused loss beside the plain formula, TRL, Liger and the bare matrix products, measured in one run.

    python benchmarks/loss.py [--device cpu|cuda] [--shape N,V,Hs,Ht ...] [--divergence skl,rkl] [--json FILE]

A timed unit is forward and backward: from hidden states and heads to the gradients of the student's hidden states and
head, for the mean over tokens of one divergence. Columns (legend: N tokens, V vocabulary, S and T hidden sizes):

ours      `fused_linear_divergence`
plain     full logits by F.linear in the inputs' dtype, `token_divergence` (fp32 inside) on them, autograd
trl       TRL's ChunkedDivergenceFunction: fkl, rkl, jsd
liger     Liger's chunked LigerFusedLinearJSDLoss as it comes (torch.compile on, 1024-token chunks): fkl, rkl, jsd
triton    Liger's Triton LigerFusedLinearJSDFunction, CUDA only: fkl, rkl, jsd
products  F0 = 2NV(S + T) + 4NVS operations and nothing else: two projections, hidden gradient [N, V] x [V, S] and head
          gradient [V, N] x [N, S] by torch.mm and addmm_, every operand and result in the inputs' dtype, into buffers
          made before the clock starts; token tiles of the height that is fastest here, the whole N among them

Time is the median over repeats. Each repeat visits all columns of a row, and its order is rotated from repeat to
repeat, so that a drifting clock meets all alike. On CUDA a visit is one untimed call and three timed by events.

Memory is the peak above inputs and results (the two gradients). On CUDA it is what the caching allocator counts; on CPU
each cell runs in a process of its own, where the kernel's mark of peak resident memory is reset before the call, so
buffers made in C count too.

Errors are relative 2-norms against float64 from the same inputs: of the values per token, and of both gradients.
"""

import argparse
import ctypes
import gc
import importlib
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from toolkit.divergences import Divergence, Head, Hidden, Objective, fused_linear_divergence, token_divergence
from toolkit.divergences.products import cpu_has_bf16_products


class Shape(NamedTuple):
    N: int
    V: int
    S: int
    T: int

    def __str__(self):
        return f"({self.N}, {self.V}, {self.S}, {self.T})"


class Inputs(NamedTuple):
    student_hidden_NS: Tensor
    student_head_VS: Tensor
    teacher_hidden_NT: Tensor
    teacher_head_VT: Tensor


class Result(NamedTuple):
    value: Tensor  # [N], or a scalar where the peer returns only the mean
    hidden_grad_NS: Tensor
    head_grad_VS: Tensor


Unit = Callable[[], Result]

SMALL, MIDDLE, WIDE = Shape(1024, 49152, 384, 576), Shape(2048, 32000, 2048, 4096), Shape(512, 128256, 2048, 4096)
LONG = Shape(8192, 128256, 2048, 4096)
#: shape -> (at most this many times the bare products, at least this many times faster than full logits), on CPU
CPU_GOALS = {SMALL: (1.5, 1.5), MIDDLE: (1.35, 1.0), WIDE: (1.35, 1.0)}
CUDA_GOALS = {LONG: (1.3, None)}
TRL_SPEEDUP = 3.0
CPU_MEMORY_MIB = 256
SMALL_BUDGET_MIB = 16
GRADIENT_ERROR_RATIO = 2.0
GRADIENT_ERROR_FLOOR = 1e-5
#: What a process's matrix products and allocator take beside the buffers of the loss.
MEMORY_NOISE_MIB = 16

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIVERGENCES = ("skl", "srkl", "fkl", "rkl", "jsd")
#: The weight of the teacher in the mixture, by which the peers name their three divergences.
PEER_BETA = {"fkl": 0.0, "rkl": 1.0, "jsd": 0.5}
GROWING_N = 4096, 8192, 16384  # the first one is more than a tile
LOGIT_STDS = (2, 8, 30)
ERROR_ROWS = 32
MIB = 2**20
PARTS = ("time", "memory", "errors", "growth", "budget")
OOM = "OOM"


# --------------------------------------------------------------------------------------------------- columns


def ours(inputs: Inputs, name: str, budget_mib: float | None = None, backend: str = "auto") -> Unit:
    n = len(inputs.student_hidden_NS)
    weights_N = torch.full((n,), 1.0 / n, device=inputs.student_hidden_NS.device)
    student = Hidden(inputs.student_hidden_NS, Head(inputs.student_head_VS))
    teacher = Hidden(inputs.teacher_hidden_NT, Head(inputs.teacher_head_VT))

    def unit():
        result = fused_linear_divergence(
            Objective(Divergence(name)), student=student, teacher=teacher, weights_N=weights_N,
            memory_budget_mib=budget_mib, backend=backend,
        )  # fmt: skip
        return Result(result.divergence_N, *torch.autograd.grad(result.loss, inputs[:2]))

    return unit


def plain(inputs: Inputs, name: str) -> Unit:
    def unit():
        student_logits_NV = F.linear(inputs.student_hidden_NS, inputs.student_head_VS)
        teacher_logits_NV = F.linear(inputs.teacher_hidden_NT, inputs.teacher_head_VT)
        value_N = token_divergence(Divergence(name), student_logits_NV, teacher_logits_NV)
        return Result(value_N.detach(), *torch.autograd.grad(value_N.mean(), inputs[:2]))

    return unit


def trl(inputs: Inputs, name: str) -> Unit:
    chunked_divergence = load_trl()

    def unit():
        value_N, _ = chunked_divergence.apply(*inputs[:2], None, *inputs[2:], None, PEER_BETA[name])
        return Result(value_N.detach(), *torch.autograd.grad(value_N.mean(), inputs[:2]))

    return unit


def load_trl():
    """TRL's one function without the rest of TRL, whose imports ask for a trainer's worth of packages.

    Its packages are entered as empty modules, which is enough for the kernel's relative imports; the one name that the
    kernel takes from them gathers a head under ZeRO-3, and there is none here.
    """
    if "trl.kernels.chunked_divergence" not in sys.modules:
        for package in ("trl", "trl.kernels", "trl.trainer", "trl.trainer.utils"):
            spec = importlib.util.find_spec(package)
            if spec is None:
                raise ModuleNotFoundError(package)
            sys.modules[package] = importlib.util.module_from_spec(spec)
        sys.modules["trl.trainer.utils"].maybe_gather_lm_head_ctx = lambda *_: nullcontext()
    return importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction


def liger(inputs: Inputs, name: str) -> Unit:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=PEER_BETA[name])
    labels_N = torch.zeros(len(inputs.student_hidden_NS), dtype=torch.long, device=inputs.student_hidden_NS.device)

    def unit():
        value = loss(*inputs, labels_N)
        return Result(value.detach(), *torch.autograd.grad(value, inputs[:2]))

    return unit


def liger_triton(inputs: Inputs, name: str) -> Unit:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def unit():
        value = LigerFusedLinearJSDFunction.apply(*inputs, None, PEER_BETA[name])
        return Result(value.detach(), *torch.autograd.grad(value, inputs[:2]))

    return unit


def products(inputs: Inputs, height: int) -> Unit:
    student_hidden_NS, student_head_VS, teacher_hidden_NT, teacher_head_VT = (x.detach() for x in inputs)
    (n, _), v = student_hidden_NS.shape, len(student_head_VS)

    def buffer(*shape):  # filled, so that its pages are there before the clock starts
        return student_hidden_NS.new_empty(shape).fill_(0)

    student_nV, teacher_nV = buffer(height, v), buffer(height, v)
    hidden_grad_NS, head_grad_VS = buffer(*student_hidden_NS.shape), buffer(*student_head_VS.shape)

    def unit():
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            logits_nV = student_nV[: rows.stop - start]
            torch.mm(teacher_hidden_NT[rows], teacher_head_VT.T, out=teacher_nV[: rows.stop - start])
            torch.mm(student_hidden_NS[rows], student_head_VS.T, out=logits_nV)
            torch.mm(logits_nV, student_head_VS, out=hidden_grad_NS[rows])
            if start == 0:
                torch.mm(logits_nV.T, student_hidden_NS[rows], out=head_grad_VS)
            else:
                head_grad_VS.addmm_(logits_nV.T, student_hidden_NS[rows])
        return Result(student_hidden_NS.new_zeros(()), hidden_grad_NS, head_grad_VS)

    return unit


COLUMNS = {"ours": ours, "products": products, "plain": plain, "trl": trl, "liger": liger, "triton": liger_triton}
PEERS = {"trl": "trl", "liger": "liger-kernel", "triton": "liger-kernel"}


def is_measured(column: str, divergence: str) -> bool:
    return column not in PEERS or divergence in PEER_BETA


def available_columns(wanted: list[str], device: str, notes: list[str]) -> list[str]:
    """Those of `wanted` that run here; a note for each that does not."""
    found = []
    for column in wanted:
        if column == "triton" and device == "cpu":
            continue
        try:
            if column == "trl":
                load_trl()
            elif column == "liger":
                importlib.import_module("liger_kernel.chunked_loss")
            elif column == "triton":
                importlib.import_module("liger_kernel.ops.fused_linear_jsd")
            found.append(column)
        except Exception as error:  # at import, too
            notes.append(
                f"{column} is left out ({error}): pip install --no-deps -r benchmarks/requirements.txt installs it"
            )
    return found


# --------------------------------------------------------------------------------------------------- measuring


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, logit_std: float = 2.0) -> Inputs:
    """Independent normal hidden states and heads, such that logits have this standard deviation."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows, columns, std):
        return torch.randn(rows, columns, generator=generator, dtype=dtype, device=device).mul_(std)

    student = normal(shape.N, shape.S, logit_std / math.sqrt(shape.S)), normal(shape.V, shape.S, 1.0)
    teacher = normal(shape.N, shape.T, logit_std / math.sqrt(shape.T)), normal(shape.V, shape.T, 1.0)
    return Inputs(*(x.requires_grad_() for x in student), *teacher)


class Bench:
    """Settings of a run, and how it makes, times and weighs one cell."""

    def __init__(self, device: str, dtype_name: str, budget_mib: float | None, backend: str, repeats: int):
        self.device, self.dtype_name, self.dtype = device, dtype_name, DTYPES[dtype_name]
        self.budget_mib, self.backend, self.repeats = budget_mib, backend, repeats
        self.heights: dict[Shape, int] = {}  # of the bare products' tiles
        self.notes: list[str] = []

    def unit(self, column: str, inputs: Inputs, divergence: str, shape: Shape) -> Unit:
        if column == "ours":
            return ours(inputs, divergence, self.budget_mib, self.backend)
        if column == "products":
            return products(inputs, self.heights.get(shape, shape.N))
        return COLUMNS[column](inputs, divergence)

    def release(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def attempt(self, what: str, function: Callable):
        """(result, None), or (None, "OOM" or "failed"), with a note for a failure."""
        try:
            return function(), None
        except Exception as error:  # a peer may raise anything, and the other cells are still wanted
            text = str(error).strip() or type(error).__name__
        # The exception is gone here, and with it the tensors that its traceback held.
        self.release()
        if "memory" in text.lower() and "alloc" in text.lower():
            return None, OOM
        self.note_failure(what, text.splitlines()[0])
        return None, "failed"

    def note_failure(self, what: str, why: str) -> None:
        """Once for each reason: a missing module fails every cell of its column alike."""
        if not any(why[:200] in note for note in self.notes):
            self.notes.append(f"{what} failed: {why[:200]}")

    def visit(self, unit: Unit) -> list[float]:
        """Milliseconds of each timed call."""
        if self.device == "cpu":
            start = time.perf_counter()
            result = unit()
            elapsed_ms = (time.perf_counter() - start) * 1e3
            del result  # outside of the clock: giving pages back takes time too
            return [elapsed_ms]
        unit()
        times_ms = []
        for _ in range(3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            unit()
            end.record()
            end.synchronize()
            times_ms.append(start.elapsed_time(end))
        return times_ms

    def choose_height(self, shape: Shape, inputs: Inputs) -> int:
        heights = (1024, 2048, 4096) if self.device == "cuda" else (128, 256, 512)
        best_ms = {}
        for height in (shape.N, *(h for h in heights if h < shape.N)):

            def best(height=height):
                unit = products(inputs, height)
                self.visit(unit)
                return min(self.visit(unit))

            self.release()
            elapsed_ms, failure = self.attempt(f"products at height {height}", best)
            if failure is None:
                best_ms[height] = elapsed_ms
        return min(best_ms, key=best_ms.get, default=min(shape.N, heights[0]))

    def times(self, shape: Shape, divergences: list[str], columns: list[str], skip: dict) -> dict:
        """(divergence, column) -> milliseconds of every timed call, or why there are none; `skip` is not run."""
        inputs = make_inputs(shape, self.dtype, self.device)
        if "products" in columns:
            self.heights[shape] = self.choose_height(shape, inputs)
        cells = {}
        for divergence in divergences:
            running, values = [], {}
            for column in columns:
                if not is_measured(column, divergence):
                    continue
                progress(f"time {shape} {divergence} {column}: warm-up")
                failure = skip.get((divergence, column))
                if failure is None:
                    self.release()

                    def first_call(column=column, divergence=divergence):
                        return self.unit(column, inputs, divergence, shape)()

                    result, failure = self.attempt(f"{column} {divergence} {shape}", first_call)
                    values[column] = None if failure else result.value.float().mean().item()
                    del result
                cells[divergence, column] = failure or []
                if failure is None:
                    running.append(column)
            self.check_values(divergence, shape, values)
            for repeat in range(self.repeats):
                turn = repeat % max(1, len(running))
                for column in running[turn:] + running[:turn]:
                    progress(f"time {shape} {divergence} {column}: repeat {repeat + 1} of {self.repeats}")
                    self.release()

                    def visit(column=column, divergence=divergence):
                        return self.visit(self.unit(column, inputs, divergence, shape))

                    times_ms, failure = self.attempt(f"{column} {divergence} {shape}", visit)
                    if failure is not None:
                        cells[divergence, column] = failure
                    elif not isinstance(cells[divergence, column], str):
                        cells[divergence, column] += times_ms
        return cells

    def check_values(self, divergence: str, shape: Shape, values: dict) -> None:
        """Columns that compute different things are not compared in silence."""
        reference = values.get("plain") or values.get("ours")
        for column, value in values.items():
            if column != "products" and reference and value is not None and abs(value / reference - 1) > 0.02:
                self.notes.append(
                    f"{divergence} at {shape}: the mean is {value:.5g} by {column}, but {reference:.5g} by the plain "
                    "formula, more than 2 % away"
                )

    def memory(self, shape: Shape, divergence: str, column: str, budget_mib: float | None = None):
        """(bytes above inputs and results, None), or (None, why not)."""
        progress(f"memory {shape} {divergence} {column}")
        budget_mib = self.budget_mib if budget_mib is None else budget_mib
        what = f"memory of {column} {divergence} {shape}"
        if self.device == "cuda":
            self.release()
            return self.attempt(what, lambda: self._memory_cuda(shape, divergence, column, budget_mib))
        cell = {"shape": shape, "divergence": divergence, "column": column, "dtype": self.dtype_name}
        cell |= {"budget_mib": budget_mib, "backend": self.backend, "threads": torch.get_num_threads()}
        child = subprocess.run(
            [sys.executable, __file__, "--memory-cell", json.dumps(cell)], capture_output=True, text=True
        )
        if child.returncode == 0:
            return json.loads(child.stdout.splitlines()[-1])["bytes"], None
        if child.returncode == -9 or "can't allocate memory" in child.stderr:
            return None, OOM
        # The last line of a traceback is "Error: message", and the message is what the other parts note.
        *_, last = ["no message", *child.stderr.strip().splitlines()]
        self.note_failure(what, last.partition(": ")[2] or last)
        return None, "failed"

    def _memory_cuda(self, shape: Shape, divergence: str, column: str, budget_mib: float | None) -> int:
        inputs = make_inputs(shape, self.dtype, self.device)
        unit = (
            ours(inputs, divergence, budget_mib, self.backend)
            if column == "ours"
            else COLUMNS[column](inputs, divergence)
        )
        torch.mm(*torch.ones(2, 64, 64, dtype=self.dtype, device=self.device))  # the products' own workspace
        before = torch.cuda.memory_allocated()
        unit()  # kernels are compiled and tuned
        torch.cuda.reset_peak_memory_stats()
        result = unit()
        return torch.cuda.max_memory_allocated() - before - result_bytes(result)


def result_bytes(result: Result) -> int:
    return sum(x.nbytes for x in (result.hidden_grad_NS, result.head_grad_VS))


def memory_cell(cell: dict) -> None:
    """What a process of its own prints: the peak of resident memory during one call, above inputs and results."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this process goes, and not its parent
    torch.set_num_threads(cell["threads"])
    shape, column, divergence = Shape(*cell["shape"]), cell["column"], cell["divergence"]
    inputs = make_inputs(shape, DTYPES[cell["dtype"]], "cpu")

    def unit(inputs):
        if column == "ours":
            return ours(inputs, divergence, cell["budget_mib"], cell["backend"])
        return COLUMNS[column](inputs, divergence)

    # Libraries, threads and kernels are loaded by a small call, so that no buffer of the real size is there before it
    # is counted. torch.compile works for one shape, and takes memory of its own: it sees the real one.
    small = shape.N if column == "liger" else 16
    unit(Inputs(*(x[:small] if i % 2 == 0 else x for i, x in enumerate(inputs))))()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status_bytes("VmRSS")
    result = unit(inputs)()
    print(json.dumps({"bytes": status_bytes("VmHWM") - before - result_bytes(result)}))


def status_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


# --------------------------------------------------------------------------------------------------- errors


def logits_in_float64(hidden_NH: Tensor, head_VH: Tensor) -> Tensor:
    hidden_NH = hidden_NH.detach().double()
    return torch.cat([hidden_NH @ block.double().T for block in head_VH.detach().split(8192)], 1)


def relative_errors(
    result: Result, value_N: Tensor, logit_grad_NV: Tensor, inputs: Inputs
) -> tuple[float, float, float]:
    """Of values, hidden gradient and head gradient; the head in blocks, because a float64 copy of it may not fit."""
    hidden_NS, head_VS = inputs.student_hidden_NS.detach().double(), inputs.student_head_VS.detach()
    hidden_grad_NS, difference, norm = torch.zeros_like(hidden_NS), 0.0, 0.0
    for start in range(0, len(head_VS), 8192):
        block = slice(start, start + 8192)
        hidden_grad_NS += logit_grad_NV[:, block] @ head_VS[block].double()
        head_grad_BS = logit_grad_NV[:, block].T @ hidden_NS
        difference += (result.head_grad_VS[block].double() - head_grad_BS).square().sum().item()
        norm += head_grad_BS.square().sum().item()
    value = (result.value.double() - value_N).norm() / value_N.norm()
    hidden = (result.hidden_grad_NS.double() - hidden_grad_NS).norm() / hidden_grad_NS.norm()
    return value.item(), hidden.item(), math.sqrt(difference / norm)


def errors(bench: Bench, shape: Shape, divergences: list[str]) -> list[dict]:
    rows = []
    for logit_std in LOGIT_STDS:
        inputs = make_inputs(shape._replace(N=ERROR_ROWS), bench.dtype, bench.device, logit_std)
        student_NV = logits_in_float64(*inputs[:2]).requires_grad_()
        teacher_NV = logits_in_float64(*inputs[2:])
        for divergence in divergences:
            progress(f"errors {shape} {divergence}, standard deviation {logit_std}")
            value_N = token_divergence(Divergence(divergence), student_NV, teacher_NV)
            (logit_grad_NV,) = torch.autograd.grad(value_N.mean(), student_NV)
            row = {"divergence": divergence, "logit_std": logit_std}
            for column in ("ours", "plain"):
                unit = bench.unit(column, inputs, divergence, shape)
                result, failure = bench.attempt(f"errors of {column} {divergence} {shape}", unit)
                if failure is None:
                    row[column] = relative_errors(result, value_N.detach(), logit_grad_NV, inputs)
            rows.append(row)
    return rows


def small_budget(bench: Bench, shape: Shape, divergence: str) -> dict:
    """The smallest promised budget against the default one: time, memory, and the largest relative difference."""
    inputs = make_inputs(shape, bench.dtype, bench.device)
    default, failure = bench.attempt(f"{divergence} {shape}", ours(inputs, divergence, None, bench.backend))
    unit = ours(inputs, divergence, SMALL_BUDGET_MIB, bench.backend)
    if failure is None:
        small, failure = bench.attempt(f"{divergence} {shape} at {SMALL_BUDGET_MIB} MiB", unit)
    if failure is not None:
        return {"failure": failure}
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(small, default, strict=True))
    del small, default
    elapsed_ms = statistics.median(bench.visit(unit))
    del unit, inputs
    memory, failure = bench.memory(shape, divergence, "ours", SMALL_BUDGET_MIB)
    return {"elapsed_ms": elapsed_ms, "difference": difference, "memory": memory, "failure": failure}


# --------------------------------------------------------------------------------------------------- report


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def table(headers: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells):
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(headers), rule, *map(line, rows)])


def ratio(a, b) -> str:
    return "" if a is None or b is None else f"{a / b:.2f}"


def median(cell) -> float | None:
    return statistics.median(cell) if isinstance(cell, list) and cell else None


def time_table(cells: dict, divergences: list[str], columns: list[str]) -> str:
    others = [c for c in columns if c not in ("ours", "products")]
    headers = ["divergence", *(f"{c} ms" for c in columns), "ours / products", *(f"{c} / ours" for c in others)]
    rows = []
    for divergence in divergences:
        cell = {c: cells.get((divergence, c), "") for c in columns}
        ms = {c: median(x) for c, x in cell.items()}
        times = [x if isinstance(x, str) else f"{ms[c]:.1f}" for c, x in cell.items()]
        ratios = [ratio(ms.get("ours"), ms.get("products")), *(ratio(ms[c], ms.get("ours")) for c in others)]
        rows.append([divergence, *times, *ratios])
    return table(headers, rows)


def memory_table(cells: dict, divergences: list[str], columns: list[str]) -> str:
    def text(cell):
        return cell if isinstance(cell, str) else f"{cell / MIB:.0f}"

    rows = [[d, *(text(cells.get((d, c), "")) for c in columns)] for d in divergences]
    return table(["divergence", *(f"{c} MiB" for c in columns)], rows)


def error_table(rows: list[dict]) -> str:
    headers = ["divergence", "logit std"]
    headers += [f"{what} {x}" for what in ("values", "hidden", "head") for x in ("ours", "plain", "ratio")]
    lines = []
    for row in rows:
        line = [row["divergence"], str(row["logit_std"])]
        for i in range(3):
            of_ours, of_plain = (row[c][i] if c in row else None for c in ("ours", "plain"))
            line += ["" if x is None else f"{x:.1e}" for x in (of_ours, of_plain)] + [ratio(of_ours, of_plain or None)]
        lines.append(line)
    return table(headers, lines)


class Goals:
    """Figures beside what was measured; of several rows the worst one counts."""

    def __init__(self):
        self.rows: list[list[str]] = []

    def add(self, figure: str, goal: float | None, measured: dict[str, float | None], at_most: bool, unit: str = "x"):
        """`measured` by the name of its row; a row without a number (OOM, failed) is left to the table above."""
        found = {name: x for name, x in measured.items() if x is not None}
        if goal is None or not measured:
            return
        bound = f"{'<=' if at_most else '>='} {goal:g} {unit}"
        if not found:
            self.rows.append([figure, bound, "not measured", ""])
            return
        name, worst = (max if at_most else min)(found.items(), key=lambda item: item[1])
        verdict = "met" if (worst <= goal if at_most else worst >= goal) else "MISSED"
        self.rows.append([figure, bound, f"{worst:.3g} {unit} ({name})", verdict])

    def say(self, figure: str, goal: str, measured: str, is_met: bool):
        self.rows.append([figure, goal, measured, "met" if is_met else "MISSED"])


def add_time_goals(goals: Goals, device: str, shape: Shape, cells: dict, divergences: list[str]) -> None:
    def quotients(above, below):
        pairs = {d: (median(cells.get((d, above))), median(cells.get((d, below)))) for d in divergences}
        return {
            d: a / b if a and b else None for d, (a, b) in pairs.items() if (d, above) in cells and (d, below) in cells
        }

    over_products, over_plain = (CPU_GOALS if device == "cpu" else CUDA_GOALS).get(shape, (None, None))
    goals.add(f"time over the bare products {shape}", over_products, quotients("ours", "products"), at_most=True)
    goals.add(f"faster than full logits {shape}", over_plain, quotients("plain", "ours"), at_most=False)
    if device == "cpu" and shape in CPU_GOALS:
        goals.add(f"faster than TRL {shape}", TRL_SPEEDUP, quotients("trl", "ours"), at_most=False)


def add_error_goal(goals: Goals, shape: Shape, rows: list[dict]) -> None:
    whole = [r for r in rows if "ours" in r and "plain" in r]
    pairs = [(r, r["ours"][i], r["plain"][i]) for r in whole for i in (1, 2)]
    if not pairs:
        return
    is_met = all(a <= GRADIENT_ERROR_RATIO * b + GRADIENT_ERROR_FLOOR for _, a, b in pairs) and len(whole) == len(rows)
    row, a, b = max(pairs, key=lambda pair: pair[1] / pair[2])
    worst = f"{a / b:.2f} x ({row['divergence']} at {row['logit_std']}: {a:.1e} against {b:.1e})"
    goals.say(
        f"gradient error {shape}", f"<= {GRADIENT_ERROR_RATIO:g} x plain + {GRADIENT_ERROR_FLOOR:g}", worst, is_met
    )


def fp32_head_gradient_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """The accumulator beside the result. With fp32 inputs it is the result, and is not counted twice."""
    return 0 if dtype == torch.float32 else 4 * shape.V * shape.S


def rows_bytes(shape: Shape, n: int) -> int:
    """What N-sized rows may take: the hidden gradient twice in fp32, and sixteen numbers a token."""
    return n * (2 * 4 * shape.S + 16 * 4)


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def heading(bench: Bench, columns: list[str]) -> dict:
    packages = {"torch": torch.__version__}
    packages |= {PEERS[c]: version(PEERS[c]) for c in columns if c in PEERS}
    return {
        "date": date.today().isoformat(),
        "processor": processor(bench.device),
        "packages": packages,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "dtype": bench.dtype_name,
        "repeats": bench.repeats,
        "budget_mib": bench.budget_mib,
        "backend": bench.backend,
    }


def parse_arguments() -> argparse.Namespace:
    def names(known):
        def parse(text):
            wanted = text.split(",")
            unknown = [x for x in wanted if x not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(known)}")
            return wanted

        return parse

    def shape(text):
        sizes = text.strip("()").split(",")
        if len(sizes) != 4 or not all(x.strip().isdigit() and int(x) for x in sizes):
            raise argparse.ArgumentTypeError(f"{text!r} is not four positive numbers N,V,Hs,Ht")
        return Shape(*map(int, sizes))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=shape, nargs="+", metavar="N,V,Hs,Ht")
    parser.add_argument("--divergence", type=names(DIVERGENCES), default=list(DIVERGENCES), metavar="skl,rkl")
    parser.add_argument("--columns", type=names(COLUMNS), default=list(COLUMNS), metavar="ours,products")
    parser.add_argument("--parts", type=names(PARTS), default=list(PARTS), metavar=",".join(PARTS))
    parser.add_argument("--repeats", type=int, help="3 on CPU, 5 on CUDA (of three calls each)")
    parser.add_argument("--budget-mib", type=float, help="the toolkit's memory budget; its own default if left out")
    parser.add_argument("--backend", default="auto", help="the toolkit's backend")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16; fp32 on a CPU without bf16 instructions")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, unrounded")
    parser.add_argument("--memory-cell", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.memory_cell:
        return memory_cell(arguments.memory_cell)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, divergences, parts = arguments.device, arguments.divergence, arguments.parts
    has_bf16 = device == "cuda" or cpu_has_bf16_products()
    repeats = arguments.repeats or (3 if device == "cpu" else 5)
    bench = Bench(
        device, arguments.dtype or ("bf16" if has_bf16 else "fp32"), arguments.budget_mib, arguments.backend, repeats
    )
    if not has_bf16 and arguments.dtype is None:
        bench.notes.append(
            "inputs are fp32: this CPU has no bf16 instructions, and torch's bf16 products take minutes without them; "
            "--dtype bf16 forces them"
        )
    columns = available_columns(arguments.columns, device, bench.notes)
    weighed = [c for c in columns if c != "products"]  # its buffers are made outside of the measured call
    shapes = arguments.shape or [*CPU_GOALS, *(CUDA_GOALS if device == "cuda" else ())]

    head, goals = heading(bench, columns), Goals()
    record = {"heading": head, "shapes": [], "notes": bench.notes}
    packages = ", ".join(f"{name} {v}" for name, v in head["packages"].items())
    where = head["processor"] if device == "cuda" else f"{head['processor']}, {head['threads']} threads"
    print(f"{head['date']}, {where}, {packages}, {head['dtype']} inputs, {repeats} repeats")
    for note in bench.notes:
        print(f"- {note}")
    if device == "cpu" and os.getloadavg()[0] > 0.5:
        # Threads wait for each other at every product: one that is kept off its core makes all of them late.
        print(f"- the machine is busy (load average {os.getloadavg()[0]:.1f}): times are not to be trusted")
    told = len(bench.notes)

    for shape in shapes:
        print(f"\n## (N, V, Hs, Ht) = {shape}")
        kept = {"shape": shape}
        # Another shape must not meet kernels that were compiled for any shape in general.
        torch.compiler.reset()
        record["shapes"].append(kept)
        sizes = {}
        if "memory" in parts:
            for divergence in divergences:
                for column in weighed:
                    if is_measured(column, divergence):
                        size, failure = bench.memory(shape, divergence, column)
                        sizes[divergence, column] = failure or size
            kept["memory_bytes"] = nested(sizes)
            accumulator = fp32_head_gradient_bytes(shape, bench.dtype)
            if device == "cpu" and bench.budget_mib is None:
                above = {d: sizes.get((d, "ours")) for d in divergences if (d, "ours") in sizes}
                above = {d: None if isinstance(x, str) else x / MIB for d, x in above.items()}
                # An fp32 head gradient is allowed, but made only where several tiles add to it.
                goals.add(f"memory {shape}", CPU_MEMORY_MIB + accumulator / MIB, above, at_most=True, unit="MiB")
        if "time" in parts:
            # Only here does a cell without memory end its process.
            skip = {cell: OOM for cell, size in sizes.items() if size == OOM and device == "cpu"}
            cells, failure = bench.attempt(
                f"times at {shape}", lambda shape=shape, skip=skip: bench.times(shape, divergences, columns, skip)
            )
            if failure is None:
                kept["times_ms"] = nested(cells)
                kept["products_height"] = bench.heights.get(shape)
                tiles = f", products in tiles of {bench.heights[shape]} tokens" if "products" in columns else ""
                print(f"\nTime, median{tiles}\n\n" + time_table(cells, divergences, columns))
                add_time_goals(goals, device, shape, cells, divergences)
            else:
                print(f"\nTime: {failure}")
        if sizes:
            print("\nMemory, peak above inputs and results\n\n" + memory_table(sizes, divergences, weighed))
            row_mib = bench.dtype.itemsize * (shape.N + shape.V) / MIB
            taken = f"Inputs take {row_mib * (shape.S + shape.T):.0f} MiB, results {row_mib * shape.S:.0f}"
            print(f"\n{taken}, an fp32 head gradient {4 * shape.V * shape.S / MIB:.0f}.")
        if "errors" in parts:
            bench.release()
            rows, failure = bench.attempt(f"errors at {shape}", lambda shape=shape: errors(bench, shape, divergences))
            if failure is None:
                kept["errors"] = rows
                print(f"\nRelative error against float64, {ERROR_ROWS} tokens\n\n" + error_table(rows))
                add_error_goal(goals, shape, rows)
        if device == "cuda" and shape == LONG:
            print("\nLiger publishes 60.7 ms and 11.1 GB against 213 ms and 68.9 GB for full logits at this shape.")
        sys.stdout.flush()
        write(arguments.json, record)  # as far as it goes: a run that is stopped leaves the shapes before

    if "growth" in parts:
        growth(bench, shapes[0], divergences[0], goals, record)
    wide = next((s for s in shapes if s.V == WIDE.V), None)
    if "budget" in parts and wide is not None:
        report_budget(bench, wide, divergences[0], goals, record)

    if goals.rows:
        print("\n## Goals\n\n" + table(["figure", "goal", "measured (worst row)", "verdict"], goals.rows))
    record["goals"] = goals.rows
    if bench.notes[told:]:
        print("\n" + "\n".join(f"- {note}" for note in bench.notes[told:]))
    write(arguments.json, record)


def write(file: Path | None, record: dict) -> None:
    if file:
        file.write_text(json.dumps(record, indent=1))


def nested(cells: dict) -> dict:
    """(divergence, column) -> x as divergence -> column -> x, for JSON."""
    result = {}
    for (divergence, column), x in cells.items():
        result.setdefault(divergence, {})[column] = x
    return result


def growth(bench: Bench, shape: Shape, divergence: str, goals: Goals, record: dict) -> None:
    sizes = {}
    for n in GROWING_N:
        size, failure = bench.memory(shape._replace(N=n), divergence, "ours")
        sizes[n] = failure or size
    record["growth_bytes"] = sizes
    text = ", ".join(f"{x if isinstance(x, str) else f'{x / MIB:.0f} MiB'} at N = {n}" for n, x in sizes.items())
    print(f"\n## Growing N, {divergence}, V = {shape.V}\n\nOurs, above inputs and results: {text}.")
    first, last = sizes[GROWING_N[0]], sizes[GROWING_N[-1]]
    if isinstance(first, str) or isinstance(last, str):
        return
    added_n = GROWING_N[-1] - GROWING_N[0]
    beyond = (last - first - rows_bytes(shape, added_n)) / MIB
    allowed = f"N-sized rows may take {rows_bytes(shape, added_n) / MIB:.0f}"
    print(f"{(last - first) / MIB:+.0f} MiB; {allowed}, fp32 logits of one model {4 * added_n * shape.V / MIB:.0f}.")
    # A tile of the smallest N must fill the budget, or the tile itself grows with N, as it may.
    if 2 * 4 * GROWING_N[0] * shape.V >= CPU_MEMORY_MIB * MIB:
        goals.add("memory beyond N-sized rows, N from 4k to 16k", MEMORY_NOISE_MIB, {divergence: beyond}, True, "MiB")


def report_budget(bench: Bench, shape: Shape, divergence: str, goals: Goals, record: dict) -> None:
    progress(f"budget of {SMALL_BUDGET_MIB} MiB {shape} {divergence}")
    found = record["small_budget"] = small_budget(bench, shape, divergence)
    figure, goal = f"a {SMALL_BUDGET_MIB} MiB budget {shape}", f"works, <= {SMALL_BUDGET_MIB} MiB + rows"
    if found["failure"] is not None:
        goals.say(figure, goal, found["failure"], False)
        return
    spared = fp32_head_gradient_bytes(shape, bench.dtype) + rows_bytes(shape, shape.N)
    above_mib = (found["memory"] - spared) / MIB
    agrees = found["difference"] < (1e-4 if bench.dtype == torch.float32 else 2e-2)
    is_met = agrees and above_mib <= SMALL_BUDGET_MIB + MEMORY_NOISE_MIB
    print(
        f"\n## Budget of {SMALL_BUDGET_MIB} MiB, {divergence}, {shape}\n\n{found['elapsed_ms']:.0f} ms, "
        f"{found['memory'] / MIB:.0f} MiB above inputs and results ({above_mib:.0f} of them beyond the fp32 head "
        f"gradient and N-sized rows), largest relative difference from the default budget {found['difference']:.1e}."
    )
    goals.say(figure, goal, f"{above_mib:.0f} MiB, {'agrees' if agrees else 'DIFFERS'}", is_met)


if __name__ == "__main__":
    main()
