"""The row passes as one Triton kernel (CUDA, ROCm): a program makes one row's passes, in fp32, without atomics.

Both models' logits are read once a pass and nothing of the tile's size is written but the gradient. The row is walked
in blocks of columns; running numbers are kept per lane and reduced once, at the end of a pass.
"""

# ruff: noqa: SIM102, SIM109 - the compiler knows neither `in` nor a condition that is partly a constant
# mypy: allow-untyped-defs, allow-incomplete-defs
# The compiler reads annotations as its own types, so a kernel's arguments have none but `constexpr`.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.divergences.head import LOG_ZERO
from toolkit.divergences.kernels.rows import CODES, Passes, Row, RowTask

_LOG_ZERO = tl.constexpr(LOG_ZERO)
TOP_K, FKL, RKL, SYMMETRIC_KL, TVD, SKL, SRKL, JSD, ABKD, AKL, TAID = (
    tl.constexpr(CODES[name])
    for name in ("top_k", "fkl", "rkl", "symmetric_kl", "tvd", "skl", "srkl", "jsd", "abkd", "akl", "taid")
)
(
    STUDENT_MAX, STUDENT_SUM, STUDENT_SUM_T, TEACHER_MAX, TEACHER_SUM_T, MIXED_MAX, MIXED_SUM_T, AT_TEACHER_CHOICE,
    AT_TARGET, SUM_0, SUM_1, SUM_2, SUM_3,
) = (tl.constexpr(int(row)) for row in Row)  # fmt: skip

#: Measured on an H100 at V = 128,256: 4096 and 16 are the fastest of 14 pairs, by 2 to 20 %.
BLOCK_COLUMNS, WARPS = 4096, 16


def block_columns(code: int) -> int:
    """Columns of a step. Taid has one more distribution: with half of them its numbers stay in registers."""
    return BLOCK_COLUMNS // 2 if code == CODES["taid"] else BLOCK_COLUMNS


def run(
    task: RowTask, state: Tensor, *, student_nB: Tensor, teacher_nB: Tensor | None, out_nB: Tensor | None,
    passes: Passes,
) -> None:  # fmt: skip
    """The `RowKernel` of this module; fp32 on one device."""
    n, columns = student_nB.shape
    if n == 0:
        return
    arguments, options = launch_arguments(task, state, student_nB, teacher_nB, out_nB, passes)
    with torch.cuda.device_of(student_nB):  # Triton launches on the current device
        rows_kernel[(n,)](*arguments, columns, **options)


def launch_arguments(
    task: RowTask, state: Tensor, student_nB: Tensor, teacher_nB: Tensor | None, out_nB: Tensor | None, passes: Passes
) -> tuple[tuple[Tensor | float, ...], dict[str, int | bool]]:
    """The kernel's arguments up to the number of columns, and its compile-time constants."""
    objective, spec, student_head, teacher_head = task.objective, task.objective.divergence, task.student, task.teacher
    teacher_bias_B = None if teacher_head is None else teacher_head.bias_V
    teacher_cap = None if teacher_head is None else teacher_head.cap
    teacher = student_nB if teacher_nB is None else teacher_nB
    out = student_nB if out_nB is None else out_nB

    def pointer(x: Tensor | None) -> Tensor:
        # The state stands for pointers that the kernel does not read. It knows no strides of the others.
        return state if x is None else x.contiguous()

    arguments = (
        student_nB, teacher, out, state, pointer(task.alpha_n), pointer(task.weights_n), pointer(task.targets_n),
        pointer(task.threshold_n), pointer(student_head.bias_V), pointer(teacher_bias_B),
        student_nB.stride(0), teacher.stride(0), out.stride(0), state.stride(0), task.first_column,
        student_head.scale, student_head.cap or 1.0, 1.0 if teacher_head is None else teacher_head.scale,
        teacher_cap or 1.0, float(objective.temperature), float(objective.cross_entropy_weight),
        0.0 if spec is None else float(spec.alpha), 0.0 if spec is None else float(spec.beta),
    )  # fmt: skip
    options = dict(
        CODE=task.code, HAS_TEACHER=teacher_nB is not None, STATISTICS=Passes.STATISTICS in passes,
        SUMS=Passes.SUMS in passes and teacher_nB is not None, GRADIENT=Passes.GRADIENT in passes,
        COOLED=objective.temperature != 1.0, HAS_WEIGHTS=task.weights_n is not None,
        HAS_TARGETS=task.targets_n is not None,
        CROSS_ENTROPY=objective.cross_entropy_weight != 0.0 and task.targets_n is not None,
        STUDENT_BIAS=student_head.bias_V is not None, TEACHER_BIAS=teacher_bias_B is not None,
        STUDENT_CAP=student_head.cap is not None, TEACHER_CAP=teacher_cap is not None,
        BLOCK=block_columns(task.code), num_warps=WARPS,
    )  # fmt: skip
    return arguments, options


@triton.jit
def _floored(z):
    """At least LOG_ZERO; NaN stays NaN, which a plain maximum would hide."""
    return tl.maximum(z, _LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _logits(product_ptr, bias_ptr, offsets, inside, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    product = tl.load(product_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    if BIAS:
        product += tl.load(bias_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    z = product * scale
    if CAP:
        e = tl.exp(-2.0 * tl.abs(z) / cap)
        capped = cap * (1.0 - e) / (1.0 + e)
        z = tl.where(product == float("-inf"), _LOG_ZERO, tl.where(z < 0.0, -capped, capped))
    return _floored(z)


@triton.jit
def _online(largest, total, z):
    """Running maximum and sum of exp(z - maximum), lane by lane."""
    e = tl.exp(-tl.abs(z - largest))
    total = tl.where(z > largest, total * e + 1.0, total + e)
    return tl.maximum(largest, z), total


@triton.jit
def _online_cooled(largest, total, total_t, z, t):
    gap = -tl.abs(z - largest)
    e, e_t = tl.exp(gap), tl.exp(gap / t)
    total_t = tl.where(z > largest, total_t * e_t + 1.0, total_t + e_t)
    total = tl.where(z > largest, total * e + 1.0, total + e)
    return tl.maximum(largest, z), total, total_t


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], also where 1 + e rounds to 1."""
    sum = 1.0 + e
    return tl.where(sum == 1.0, e, tl.log(sum) * (e / tl.maximum(sum - 1.0, 1e-30)))


@triton.jit
def _log_shares(first, second):
    """(u, v, rest) of a mixture of two parts, whose logs over the first one's probability are given: u and v are the
    logs of the parts' shares of the mixture, rest is the second share. From the larger part, so nothing cancels."""
    gap = first - second
    e = tl.exp(-tl.abs(gap))
    log_sum = _log1p(e)
    larger = gap >= 0.0
    u = tl.where(larger, -log_sum, gap - log_sum)
    v = tl.where(larger, -gap - log_sum, -log_sum)
    return u, v, tl.where(larger, e, 1.0) / (1.0 + e)


@triton.jit
def _terms(lp, lq, log_alpha, log_rest, a, b, w, CODE: tl.constexpr):
    """(q, p, d, f, h, r) as `rows` defines them; of akl, f is the forward KL's term."""
    q = tl.exp(lq)
    p = tl.exp(lp)
    d = lq - lp
    h = 0.0
    r = 0.0
    if CODE == FKL or CODE == TAID:
        f = -p * d
        r = -p
    elif CODE == RKL:
        f = q * d
        h = d
    elif CODE == SYMMETRIC_KL:
        f = 0.5 * (q - p) * d
        h = 0.5 * d
        r = -0.5 * p
    elif CODE == TVD:
        f = 0.5 * tl.abs(q - p)
        h = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    elif CODE == SKL:
        u, _, rest = _log_shares(log_alpha, log_rest + d)
        f = p * tl.where(log_alpha == float("-inf"), -(log_rest + d), u - log_alpha)
        r = -p * rest
    elif CODE == SRKL:
        u, _, rest = _log_shares(log_alpha, log_rest - d)
        u = tl.where(log_alpha == float("-inf"), -(log_rest - d), u - log_alpha)
        f = q * u
        h = u + rest
    elif CODE == JSD:
        u, v, _ = _log_shares(log_alpha, log_rest + d)
        h = (1.0 - b) * (v - log_rest)
        f = b * p * (u - log_alpha) + q * h
    elif CODE == ABKD:
        cross = tl.exp(a * lp + b * lq)
        own = tl.exp((a + b) * lq)
        f = (a / (a + b) * tl.exp((a + b) * lp) + b / (a + b) * own - cross) / (a * b)
        r = (own - cross) / a
    else:
        f = -p * d
        h = (1.0 - w) * d
        r = -w * p
    return q, p, d, f, h, r


@triton.jit
def _merge(old_max, old_sum, lane_max, lane_sum, t):
    """A running maximum and sum with the lanes' own."""
    largest = tl.maximum(old_max, tl.max(lane_max, 0))
    total = old_sum * tl.exp((old_max - largest) / t) + tl.sum(lane_sum * tl.exp((lane_max - largest) / t), 0)
    return largest, total


@triton.jit
def rows_kernel(
    student_ptr, teacher_ptr, out_ptr, state_ptr, alpha_ptr, weights_ptr, targets_ptr, threshold_ptr,
    student_bias_ptr, teacher_bias_ptr, student_stride, teacher_stride, out_stride, state_stride, first_column,
    student_scale, student_cap, teacher_scale, teacher_cap, temperature, cross_entropy_weight, a, b, columns,
    CODE: tl.constexpr, HAS_TEACHER: tl.constexpr, STATISTICS: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
    COOLED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_TARGETS: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All passes over row `program_id`: the arguments are those of `launch_arguments`, in its order."""
    # The pointers move to this program's row of each tile and of the state.
    row = tl.program_id(0)
    student_ptr += row.to(tl.int64) * student_stride
    teacher_ptr += row.to(tl.int64) * teacher_stride
    out_ptr += row.to(tl.int64) * out_stride
    state_ptr += row
    lanes = tl.arange(0, BLOCK)
    n_blocks = tl.cdiv(columns, BLOCK)

    # The divergence's numbers of this row are read, and what earlier calls left in its state.
    alpha = 0.0
    log_alpha = 0.0
    log_rest = 0.0
    if CODE == SKL or CODE == SRKL or CODE == TAID:
        alpha = tl.load(alpha_ptr + row)
        log_alpha = tl.log(alpha)
        log_rest = tl.log(1.0 - alpha)
    if CODE == JSD:
        log_alpha = tl.log(b)
        log_rest = tl.log(1.0 - b)
    threshold = 0.0
    if CODE == AKL:
        threshold = tl.load(threshold_ptr + row)
    target = -1
    if HAS_TARGETS:
        target = (tl.load(targets_ptr + row) - first_column).to(tl.int32)
    s_max = tl.load(state_ptr + STUDENT_MAX * state_stride)
    s_sum = tl.load(state_ptr + STUDENT_SUM * state_stride)
    s_sum_t = tl.load(state_ptr + STUDENT_SUM_T * state_stride)
    t_max = tl.load(state_ptr + TEACHER_MAX * state_stride)
    t_sum = tl.load(state_ptr + TEACHER_SUM_T * state_stride)
    x_max = tl.load(state_ptr + MIXED_MAX * state_stride)
    x_sum = tl.load(state_ptr + MIXED_SUM_T * state_stride)

    # STATISTICS: each lane keeps maxima and sums of exponentials.
    if STATISTICS:
        s_m = tl.full([BLOCK], _LOG_ZERO, tl.float32)
        s_z = tl.zeros([BLOCK], tl.float32)
        s_zt = tl.zeros([BLOCK], tl.float32)
        t_m = tl.full([BLOCK], _LOG_ZERO, tl.float32)
        t_z = tl.zeros([BLOCK], tl.float32)
        x_m = tl.full([BLOCK], _LOG_ZERO, tl.float32)
        x_z = tl.zeros([BLOCK], tl.float32)
        unused = tl.zeros([BLOCK], tl.float32)
        chosen = tl.full([BLOCK], _LOG_ZERO, tl.float32)
        at_target = tl.zeros([BLOCK], tl.float32)
        for i in range(0, n_blocks):
            offsets = i * BLOCK + lanes
            inside = offsets < columns
            s = _logits(student_ptr, student_bias_ptr, offsets, inside, student_scale, student_cap, STUDENT_BIAS,
                        STUDENT_CAP)  # fmt: skip
            if HAS_TEACHER:
                t = _logits(teacher_ptr, teacher_bias_ptr, offsets, inside, teacher_scale, teacher_cap, TEACHER_BIAS,
                            TEACHER_CAP)  # fmt: skip
                chosen = tl.where(t > t_m, s, chosen)
                if CODE == TAID:
                    x = (1.0 - alpha) * s + alpha * t
                    if COOLED:
                        x_m, unused, x_z = _online_cooled(x_m, unused, x_z, x, temperature)
                    else:
                        x_m, x_z = _online(x_m, x_z, x)
                if COOLED:
                    t_m, unused, t_z = _online_cooled(t_m, unused, t_z, t, temperature)
                else:
                    t_m, t_z = _online(t_m, t_z, t)
            if COOLED:
                s_m, s_z, s_zt = _online_cooled(s_m, s_z, s_zt, s, temperature)
            else:
                s_m, s_z = _online(s_m, s_z, s)
            if HAS_TARGETS:
                at_target = tl.where(offsets == target, s, at_target)
        # The lanes' numbers become the row's.
        if COOLED:
            _, s_sum_t = _merge(s_max, s_sum_t, s_m, s_zt, temperature)
        s_max, s_sum = _merge(s_max, s_sum, s_m, s_z, 1.0)
        if not COOLED:
            s_sum_t = s_sum
        tl.store(state_ptr + STUDENT_MAX * state_stride, s_max)
        tl.store(state_ptr + STUDENT_SUM * state_stride, s_sum)
        tl.store(state_ptr + STUDENT_SUM_T * state_stride, s_sum_t)
        if HAS_TEACHER:
            best = tl.max(t_m, 0)
            at_best = tl.max(tl.where(t_m == best, chosen, _LOG_ZERO), 0)
            if best > t_max:
                tl.store(state_ptr + AT_TEACHER_CHOICE * state_stride, at_best)
            t_max, t_sum = _merge(t_max, t_sum, t_m, t_z, temperature)
            tl.store(state_ptr + TEACHER_MAX * state_stride, t_max)
            tl.store(state_ptr + TEACHER_SUM_T * state_stride, t_sum)
            if CODE == TAID:
                x_max, x_sum = _merge(x_max, x_sum, x_m, x_z, temperature)
                tl.store(state_ptr + MIXED_MAX * state_stride, x_max)
                tl.store(state_ptr + MIXED_SUM_T * state_stride, x_sum)
        if HAS_TARGETS:
            if (target >= 0) & (target < columns):
                tl.store(state_ptr + AT_TARGET * state_stride, tl.sum(at_target, 0))

    # p is the teacher's own distribution, or taid's mixture.
    p_max = t_max
    p_log_sum = tl.log(t_sum)
    if CODE == TAID:
        p_max = x_max
        p_log_sum = tl.log(x_sum)
    q_log_sum = tl.log(s_sum_t)

    # SUMS: f and G are added up, and akl's errors in the teacher's head and outside of it.
    sum_0 = tl.load(state_ptr + SUM_0 * state_stride)
    sum_1 = tl.load(state_ptr + SUM_1 * state_stride)
    sum_2 = tl.load(state_ptr + SUM_2 * state_stride)
    sum_3 = tl.load(state_ptr + SUM_3 * state_stride)
    if SUMS:
        f_sum = tl.zeros([BLOCK], tl.float32)
        g_sum = tl.zeros([BLOCK], tl.float32)
        head = tl.zeros([BLOCK], tl.float32)
        tail = tl.zeros([BLOCK], tl.float32)
        # From the end to the start: what the pass before read last is still in the cache.
        for i in range(0, n_blocks):
            offsets = (n_blocks - 1 - i) * BLOCK + lanes
            inside = offsets < columns
            s = _logits(student_ptr, student_bias_ptr, offsets, inside, student_scale, student_cap, STUDENT_BIAS,
                        STUDENT_CAP)  # fmt: skip
            t = _logits(teacher_ptr, teacher_bias_ptr, offsets, inside, teacher_scale, teacher_cap, TEACHER_BIAS,
                        TEACHER_CAP)  # fmt: skip
            lp, lq = _log_probabilities(s, t, alpha, s_max, q_log_sum, p_max, p_log_sum, temperature, CODE, COOLED)
            q, p, d, f, h, r = _terms(lp, lq, log_alpha, log_rest, a, b, 0.5, CODE)
            f_sum += f
            if CODE == AKL:
                g_sum += q * d
                error = tl.abs(p - q)
                head += tl.where(t >= threshold, error, 0.0)
                tail += tl.where(t >= threshold, 0.0, error)
            else:
                g_sum += q * h + r
        sum_0 += tl.sum(f_sum, 0)
        sum_1 += tl.sum(g_sum, 0)
        tl.store(state_ptr + SUM_0 * state_stride, sum_0)
        tl.store(state_ptr + SUM_1 * state_stride, sum_1)
        if CODE == AKL:
            sum_2 += tl.sum(head, 0)
            sum_3 += tl.sum(tail, 0)
            tl.store(state_ptr + SUM_2 * state_stride, sum_2)
            tl.store(state_ptr + SUM_3 * state_stride, sum_3)

    # GRADIENT: the sums are complete, and the logits are read once more.
    if GRADIENT:
        w = 0.5
        g_total = sum_1
        if CODE == AKL:
            if sum_2 + sum_3 > 0.0:
                w = sum_2 / (sum_2 + sum_3)
            g_total = (1.0 - w) * sum_1 - w
        log_sum_1 = tl.log(s_sum)
        weight = 1.0
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + row)
        for i in range(0, n_blocks):
            offsets = i * BLOCK + lanes
            inside = offsets < columns
            s = _logits(student_ptr, student_bias_ptr, offsets, inside, student_scale, student_cap, STUDENT_BIAS,
                        STUDENT_CAP)  # fmt: skip
            if HAS_TEACHER:
                t = _logits(teacher_ptr, teacher_bias_ptr, offsets, inside, teacher_scale, teacher_cap, TEACHER_BIAS,
                            TEACHER_CAP)  # fmt: skip
                lp, lq = _log_probabilities(s, t, alpha, s_max, q_log_sum, p_max, p_log_sum, temperature, CODE, COOLED)
                q, p, d, f, h, r = _terms(lp, lq, log_alpha, log_rest, a, b, w, CODE)
                g = q * (h - g_total) + r
            else:
                q = tl.exp(((s - s_max) / temperature if COOLED else s - s_max) - q_log_sum)
                g = -q * g_total
            if COOLED:
                g = g / temperature
            if CROSS_ENTROPY:
                q1 = tl.exp(s - s_max - log_sum_1) if COOLED else q
                g += cross_entropy_weight * (q1 - tl.where(offsets == target, 1.0, 0.0))
            g = g * weight * student_scale
            if STUDENT_CAP:
                g *= 1.0 - tl.minimum(s * s / (student_cap * student_cap), 1.0)
            tl.store(out_ptr + offsets, g.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _log_probabilities(
    s, t, alpha, s_max, q_log_sum, p_max, p_log_sum, temperature, CODE: tl.constexpr, COOLED: tl.constexpr
):
    if CODE == TAID:
        t = (1.0 - alpha) * s + alpha * t
    lp = t - p_max
    lq = s - s_max
    if COOLED:
        lp = lp / temperature
        lq = lq / temperature
    return _floored(lp - p_log_sum), _floored(lq - q_log_sum)
