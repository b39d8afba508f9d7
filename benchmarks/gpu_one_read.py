"""A row kernel that reads each row of logits once: several programs share a row, each keeps its columns in registers
from the statistics to the gradient, and they exchange four numbers through global memory in between, twice a row.

An experiment of gpu_rows.py, beside `toolkit/divergences/kernels/rows_triton.py`, which reads each row once a pass. It
knows what the benchmark needs: two models' logits, weights, and gradients; no temperature, targets, biases, caps, nor
the metrics' agreement. Every divergence but akl, taid and the stored top k, whose sums are other ones.

The programs of a row wait for each other, so all of the grid has to be on the GPU at once: it has one program for
each multiprocessor at most, and a program takes up rows one after the other. The next row is loaded before the wait, so
that memory is busy meanwhile. A wait ends after so many looks in any case, with numbers that the error check refuses.
"""

# ruff: noqa: SIM109 - the compiler does not know `in`
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.divergences.kernels.rows import CODES, Passes, Row, RowTask
from toolkit.divergences.kernels.rows_triton import (
    JSD,
    SKL,
    SRKL,
    STUDENT_MAX,
    STUDENT_SUM,
    STUDENT_SUM_T,
    SUM_0,
    SUM_1,
    TEACHER_MAX,
    TEACHER_SUM_T,
    _floored,
    _log_probabilities,
    _terms,
)

KNOWN = ("fkl", "rkl", "symmetric_kl", "tvd", "skl", "srkl", "jsd", "abkd")
SPINS = 1 << 20  # looks at the other programs, each about a microsecond
NUMBERS = tl.constexpr(4)  # that a program gives in an exchange
EXCHANGES = 2


@triton.jit
def _exchange(
    numbers_ptr, arrived_ptr, member, first, second, third, fourth, GROUP: tl.constexpr, LANES: tl.constexpr,
    SPINS: tl.constexpr,
):  # fmt: skip
    """Each of the row's programs gives four numbers, and gets those of all, [LANES] each: the first and the third are
    maxima, minus infinity where there is no program, the others sums, 0 there."""
    own = numbers_ptr + member
    tl.store(own, first)
    tl.store(own + GROUP, second)
    tl.store(own + 2 * GROUP, third)
    tl.store(own + 3 * GROUP, fourth)
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    spins = 0
    while (tl.atomic_add(arrived_ptr, 0, sem="acq_rel", scope="gpu") < GROUP) & (spins < SPINS):
        spins += 1
    tl.debug_barrier()
    lanes = tl.arange(0, LANES)
    inside = lanes < GROUP
    all_first = tl.load(numbers_ptr + lanes, mask=inside, other=float("-inf"), volatile=True)
    all_second = tl.load(numbers_ptr + GROUP + lanes, mask=inside, other=0.0, volatile=True)
    all_third = tl.load(numbers_ptr + 2 * GROUP + lanes, mask=inside, other=float("-inf"), volatile=True)
    all_fourth = tl.load(numbers_ptr + 3 * GROUP + lanes, mask=inside, other=0.0, volatile=True)
    return all_first, all_second, all_third, all_fourth


@triton.jit
def _raw(ptr, offsets, row, n, stride, inside):
    """A program's columns of a row as they are stored, minus infinity outside; those of the last row behind it."""
    row = tl.minimum(row, n - 1)
    return tl.load(ptr + row.to(tl.int64) * stride + offsets, mask=inside, other=float("-inf"))


@triton.jit
def one_read_kernel(
    student_ptr, teacher_ptr, out_ptr, state_ptr, alpha_ptr, weights_ptr, numbers_ptr, arrived_ptr,
    student_stride, teacher_stride, out_stride, state_stride, student_scale, teacher_scale, a, b, n, columns,
    CODE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    SPINS: tl.constexpr,
):  # fmt: skip
    """Rows `program_id` // GROUP, and so on in steps of the grid's groups."""
    member = tl.program_id(0) % GROUP
    groups = tl.num_programs(0) // GROUP
    row = tl.program_id(0) // GROUP
    offsets = member * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    s_raw = _raw(student_ptr, offsets, row, n, student_stride, inside)
    t_raw = _raw(teacher_ptr, offsets, row, n, teacher_stride, inside)
    while row < n:
        s = _floored(s_raw.to(tl.float32) * student_scale)
        t = _floored(t_raw.to(tl.float32) * teacher_scale)
        # The next row is on its way while this one waits.
        s_raw = _raw(student_ptr, offsets, row + groups, n, student_stride, inside)
        t_raw = _raw(teacher_ptr, offsets, row + groups, n, teacher_stride, inside)
        alpha = 0.0
        log_alpha = 0.0
        log_rest = 0.0
        if (CODE == SKL) or (CODE == SRKL):
            alpha = tl.load(alpha_ptr + row)
            log_alpha = tl.log(alpha)
            log_rest = tl.log(1.0 - alpha)
        if CODE == JSD:
            log_alpha = tl.log(b)
            log_rest = tl.log(1.0 - b)

        # Statistics: the programs' maxima and sums become the row's.
        numbers = numbers_ptr + row.to(tl.int64) * (2 * NUMBERS * GROUP)
        s_own = tl.max(s, 0)
        t_own = tl.max(t, 0)
        s_maxima, s_sums, t_maxima, t_sums = _exchange(
            numbers, arrived_ptr + 2 * row, member, s_own, tl.sum(tl.exp(s - s_own), 0), t_own,
            tl.sum(tl.exp(t - t_own), 0), GROUP, LANES, SPINS,
        )  # fmt: skip
        s_max = tl.max(s_maxima, 0)
        t_max = tl.max(t_maxima, 0)
        s_sum = tl.sum(s_sums * tl.exp(s_maxima - s_max), 0)
        t_sum = tl.sum(t_sums * tl.exp(t_maxima - t_max), 0)

        # Sums, and then the gradient, of columns that are in registers still.
        lp, lq = _log_probabilities(s, t, alpha, s_max, tl.log(s_sum), t_max, tl.log(t_sum), 1.0, CODE, False)
        q, _, _, f, h, r = _terms(lp, lq, log_alpha, log_rest, a, b, 0.5, CODE)
        _, f_sums, _, g_sums = _exchange(
            numbers + NUMBERS * GROUP, arrived_ptr + 2 * row + 1, member, 0.0, tl.sum(f, 0), 0.0,
            tl.sum(q * h + r, 0), GROUP, LANES, SPINS,
        )  # fmt: skip
        g_total = tl.sum(g_sums, 0)
        g = (q * (h - g_total) + r) * student_scale
        if HAS_WEIGHTS:
            g *= tl.load(weights_ptr + row)
        tl.store(out_ptr + row.to(tl.int64) * out_stride + offsets, g.to(out_ptr.dtype.element_ty), mask=inside)
        if member == 0:
            tl.store(state_ptr + STUDENT_MAX * state_stride + row, s_max)
            tl.store(state_ptr + STUDENT_SUM * state_stride + row, s_sum)
            tl.store(state_ptr + STUDENT_SUM_T * state_stride + row, s_sum)
            tl.store(state_ptr + TEACHER_MAX * state_stride + row, t_max)
            tl.store(state_ptr + TEACHER_SUM_T * state_stride + row, t_sum)
            tl.store(state_ptr + SUM_0 * state_stride + row, tl.sum(f_sums, 0))
            tl.store(state_ptr + SUM_1 * state_stride + row, g_total)
        row += groups


class OneRead:
    """The `RowKernel` of this module, for a number of columns and of warps that a program has."""

    def __init__(self, block: int, warps: int):
        self.block, self.warps = block, warps

    def __call__(
        self, task: RowTask, state: Tensor, *, student_nB: Tensor, teacher_nB: Tensor | None, out_nB: Tensor | None,
        passes: Passes,
    ) -> None:  # fmt: skip
        """Raises ValueError for what it does not know."""
        n, columns = student_nB.shape
        name, spec = next(name for name, code in CODES.items() if code == task.code), task.objective.divergence
        if name not in KNOWN or teacher_nB is None or out_nB is None or spec is None or Passes.STATISTICS not in passes:
            raise ValueError(f"the kernel that reads once makes all passes of {', '.join(KNOWN)}, and not {name!r}")
        group, programs = triton.cdiv(columns, self.block), multiprocessors(student_nB.device)
        if group > programs:
            raise ValueError(
                f"{group} programs share a row of {columns} columns, and {programs} run at once; take a larger block"
            )
        numbers, arrived = exchange_room(n, group, state.device)
        launch(
            task, state, student_nB, teacher_nB, out_nB, numbers=numbers, arrived=arrived, block=self.block,
            warps=self.warps, groups=min(n, programs // group),
        )  # fmt: skip
        state[Row.AT_TEACHER_CHOICE] = float("nan")  # not computed


def exchange_room(n: int, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For the numbers that a row's programs exchange, and how many of them have given theirs: none."""
    numbers = torch.zeros(n, EXCHANGES, NUMBERS.value, group, device=device)
    return numbers, torch.zeros(n, EXCHANGES, dtype=torch.int32, device=device)


def launch(
    task: RowTask, state: Tensor, student_nB: Tensor, teacher_nB: Tensor, out_nB: Tensor, *, numbers: Tensor,
    arrived: Tensor, block: int, warps: int, groups: int, spins: int = SPINS,
) -> None:  # fmt: skip
    """Runs the kernel for `groups` rows at a time, with as many programs for each as the columns take."""
    spec, teacher, (n, columns) = task.objective.divergence, task.teacher, student_nB.shape
    assert spec is not None and teacher is not None, "two models are compared"
    group = numbers.shape[-1]
    one_read_kernel[(groups * group,)](
        student_nB, teacher_nB, out_nB, state, state if task.alpha_n is None else task.alpha_n.contiguous(),
        state if task.weights_n is None else task.weights_n.contiguous(), numbers, arrived, student_nB.stride(0),
        teacher_nB.stride(0), out_nB.stride(0), state.stride(0), task.student.scale, teacher.scale, float(spec.alpha),
        float(spec.beta), n, columns, CODE=task.code, HAS_WEIGHTS=task.weights_n is not None, GROUP=group,
        LANES=triton.next_power_of_2(group), BLOCK=block, SPINS=spins, num_warps=warps,
    )  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    """Programs that certainly run at once; the interpreter runs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
