"""Projection and divergence in one operation: gradients are formed in forward, tile by tile, and no [N, V]
tensor exists.

`formulas` is the readable twin; a test holds the two together.

Legend: N tokens, V vocabulary, S and T hidden sizes of student and teacher, n tokens of a tile, r rows of
a row block. A tile is n tokens x the whole vocabulary: one matrix product per model fills it, a
row-blocked pass (a block stays in cache) turns the student's logits into their gradient in place, and two
matrix products consume that.

Precision. Softmax, row sums and head gradient are fp32 (float64 for float64 inputs), and logits are fp32
where the machine has a product that returns them: CUDA (`out_dtype`), and fp32 operands on CPU. torch has
no CPU product from bf16 to fp32, so a CPU has two ways. With bf16 instructions (AVX512-BF16 or AMX)
operands stay bf16 and logits are rounded to bf16, as in the plain formula and with its error, because there
the bf16 product is the faster one. Without them torch's bf16 product is several times slower than its fp32
one, so head blocks are widened to fp32, which is exact.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.divergences.closed_form import divergence_rows
from toolkit.divergences.formulas import LOG_ZERO, check_alpha, check_temperature, compute_dtype
from toolkit.divergences.spec import Divergence

DEFAULT_BUDGET_MIB = 256
#: Elements of a row block: its buffers stay in a CPU's last-level cache; on a GPU a launch has enough to do.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


class FusedLoss(NamedTuple):
    """`loss` carries gradients; the rest is detached, in nats, before any weight.

    loss: sum over tokens of weight * (divergence + cross_entropy_weight * cross entropy), a scalar.
    divergence_N: zeros where there is no teacher. cross_entropy_N: zeros where there are no targets.
    agreement_N: bool, the teacher's first choice is also the student's (False where there is no teacher).
    """

    loss: Tensor
    divergence_N: Tensor
    cross_entropy_N: Tensor
    agreement_N: Tensor


def fused_linear_divergence(
    spec: Divergence,
    student_hidden_NS: Tensor,
    student_head_VS: Tensor,
    teacher_hidden_NT: Tensor,
    teacher_head_VT: Tensor,
    *,
    weights_N: Tensor | None = None,
    targets_N: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    alpha_N: Tensor | None = None,
    memory_budget_mib: float | None = None,
) -> FusedLoss:
    """Weighted sum of token divergences between two language-model heads, from hidden states.

    Logits are cap(scale * (hidden @ head.T + bias)), with cap(z) = c tanh(z / c); divided by `temperature`
    for the divergence only: the cross entropy with `targets_N` is that of the model, at temperature 1.
    Columns from `valid_vocab` on are minus infinity on both sides, so the heads may be padded to different
    sizes. A bias may hold minus infinity. The teacher's side is constant. `memory_budget_mib` (256 by
    default) bounds all buffers but the head gradient (fp32 [V, S], with half-precision products also one
    tile's share of it) and what the caller passed in; smaller is slower.

    Gradients reach student hidden, head and bias, each only if it requires grad; they are formed here, so the
    weights must be final, and backward only scales them by the incoming scalar. The heads are not kept for
    backward. Without grad mode the same values are computed and the gradient work is left out. N = 0 gives
    0, connected.

    Raises ValueError for shapes, token ids, weights' or alpha's shapes that do not fit, unequal
    vocabularies without `valid_vocab`, a cross-entropy weight without targets, and a budget too small for
    one token. Source: skewed divergences of DistiLLM, arXiv 2402.03898; the others as in `formulas`.
    """
    _check_side("student", student_hidden_NS, student_head_VS, student_bias_V)
    _check_side("teacher", teacher_hidden_NT, teacher_head_VT, teacher_bias_V)
    n_tokens, v_student, v_teacher = len(student_hidden_NS), len(student_head_VS), len(teacher_head_VT)
    if len(teacher_hidden_NT) != n_tokens:
        raise ValueError(
            f"student hidden states hold {n_tokens} tokens, the teacher's {len(teacher_hidden_NT)}: "
            "pass the same response positions to both"
        )
    if valid_vocab is None and v_student != v_teacher:
        raise ValueError(
            f"the student's head has {v_student} rows, the teacher's {v_teacher}: pass valid_vocab, "
            "the size of the tokenizer's real vocabulary, so that padding is cut on both sides"
        )
    check_temperature(temperature)
    if cross_entropy_weight and targets_N is None:
        raise ValueError(f"cross_entropy_weight is {cross_entropy_weight}, but targets_N is None: pass the target ids")
    alpha = check_alpha(spec, alpha_N, n_tokens)
    v_valid = _valid_vocab(valid_vocab, v_student, v_teacher)
    student = _Side(student_head_VS, student_bias_V, student_logit_scale, student_soft_cap)
    teacher = _Side(teacher_head_VT, teacher_bias_V, teacher_logit_scale, teacher_soft_cap)
    problem = _Problem(
        spec, student, teacher_hidden_NT, teacher, _weights(weights_N, student_hidden_NS),
        _targets(targets_N, n_tokens, v_valid), cross_entropy_weight, temperature, v_valid, alpha,
        memory_budget_mib,
    )  # fmt: skip
    return _solve(student_hidden_NS, student_head_VS, student_bias_V, problem)


def fused_linear_cross_entropy(
    hidden_NS: Tensor,
    head_VS: Tensor,
    targets_N: Tensor,
    *,
    weights_N: Tensor | None = None,
    valid_vocab: int | None = None,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    memory_budget_mib: float | None = None,
) -> FusedLoss:
    """Weighted sum of token cross entropies, in nats: `fused_linear_divergence` without a teacher, same
    arguments."""
    _check_side("student", hidden_NS, head_VS, bias_V)
    v_valid = _valid_vocab(valid_vocab, len(head_VS))
    problem = _Problem(
        None, _Side(head_VS, bias_V, logit_scale, soft_cap), None, None, _weights(weights_N, hidden_NS),
        _targets(targets_N, len(hidden_NS), v_valid), 1.0, 1.0, v_valid, 0.0, memory_budget_mib,
    )  # fmt: skip
    return _solve(hidden_NS, head_VS, bias_V, problem)


class _Side(NamedTuple):
    head_VH: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None


class _Problem(NamedTuple):
    spec: Divergence | None
    student: _Side
    teacher_hidden_NT: Tensor | None
    teacher: _Side | None
    weights_N: Tensor | None
    targets_N: Tensor | None
    cross_entropy_weight: float
    temperature: float
    valid_vocab: int
    alpha: float | Tensor
    budget_mib: float | None


def _solve(hidden_NS: Tensor, head_VS: Tensor, bias_V: Tensor | None, problem: _Problem) -> FusedLoss:
    grad = torch.is_grad_enabled()
    wanted = tuple(grad and x is not None and x.requires_grad for x in (hidden_NS, head_VS, bias_V))
    if any(wanted):
        return FusedLoss(*_GradientsInForward.apply(hidden_NS, head_VS, bias_V, problem, wanted))
    with torch.no_grad():
        return _run_tiles(hidden_NS, problem, wanted)[0]


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NS, head_VS, bias_V, problem, wanted):
        result, gradients = _run_tiles(hidden_NS, problem, wanted)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*result[1:])
        ctx.save_for_backward(*gradients)
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None, None, None, None
        return *(None if g is None else g * grad_loss for g in ctx.saved_tensors), None, None


def _run_tiles(hidden_NS: Tensor, problem: _Problem, wanted: tuple[bool, bool, bool]):
    """The whole operation: `FusedLoss` and the gradients of hidden, head and bias (None where not wanted)."""
    with torch.autocast(hidden_NS.device.type, enabled=False):
        return _run_tiles_in_own_dtype(hidden_NS.detach(), problem, wanted)


def _run_tiles_in_own_dtype(hidden_NS: Tensor, problem: _Problem, wanted: tuple[bool, bool, bool]):
    n_tokens, v, device = len(hidden_NS), problem.valid_vocab, hidden_NS.device
    dtype = compute_dtype(hidden_NS, problem.student.head_VH)
    plan = _Plan(n_tokens, v, dtype, device, problem)
    student = _Head(problem.student, v, hidden_NS.dtype, dtype, plan)
    teacher = problem.teacher and _Head(problem.teacher, v, problem.teacher_hidden_NT.dtype, dtype, plan)
    pass_rows = _RowPass(problem, student, teacher, plan, any(wanted))

    divergence_N, cross_entropy_N = torch.zeros(2, n_tokens, dtype=dtype, device=device)
    agreement_N = torch.zeros(n_tokens, dtype=torch.bool, device=device)
    wants_hidden, wants_head, wants_bias = wanted
    hidden_grad_NS = torch.zeros_like(hidden_NS, memory_format=torch.contiguous_format) if wants_hidden else None
    head_grad_VS = torch.zeros(problem.student.head_VH.shape, dtype=dtype, device=device) if wants_head else None
    bias_grad_V = torch.zeros(len(problem.student.head_VH), dtype=dtype, device=device) if wants_bias else None

    for start in range(0, n_tokens, plan.tile_rows):
        tile = slice(start, min(start + plan.tile_rows, n_tokens))
        hidden_nS = hidden_NS[tile]
        student_nV = student.project(hidden_nS)
        teacher_nV = teacher and teacher.project(problem.teacher_hidden_NT[tile].detach())
        for first in range(0, tile.stop - start, plan.block_rows):
            in_tile = slice(first, min(first + plan.block_rows, tile.stop - start))
            rows = slice(start + in_tile.start, start + in_tile.stop)
            divergence_N[rows], cross_entropy_N[rows], agreement_N[rows] = pass_rows(
                student_nV[in_tile], None if teacher is None else teacher_nV[in_tile], rows,
                None if bias_grad_V is None else bias_grad_V[:v],
            )  # fmt: skip
        gradient_nV = student_nV.to(student.operand)  # copies on a GPU only
        if wants_hidden:
            hidden_grad_NS[tile] = student.back_to_hidden(gradient_nV)
        if wants_head:
            student.add_head_gradient(head_grad_VS[:v], gradient_nV, hidden_nS)

    value_N = divergence_N + problem.cross_entropy_weight * cross_entropy_N
    loss = (value_N if problem.weights_N is None else value_N * problem.weights_N.to(dtype)).sum()
    gradients = (
        hidden_grad_NS,
        head_grad_VS if head_grad_VS is None else head_grad_VS.to(problem.student.head_VH.dtype),
        bias_grad_V if bias_grad_V is None else bias_grad_V.to(problem.student.bias_V.dtype),
    )
    return FusedLoss(loss, divergence_N, cross_entropy_N, agreement_N), gradients


class _Plan:
    """Tile height, row-block height and head blocks within the budget: half for tiles, a quarter for each
    head block."""

    def __init__(self, n_tokens: int, v: int, dtype: torch.dtype, device: torch.device, problem: _Problem):
        budget_mib = DEFAULT_BUDGET_MIB if problem.budget_mib is None else problem.budget_mib
        half_bytes = int(budget_mib * 2**20) // 2
        row_bytes = v * dtype.itemsize
        n_tiles_held = 1 + (problem.teacher is not None) + (device.type == "cuda")
        n_buffers = 6  # the most that `_RowPass` allocates
        rows = max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // v)
        self.block_rows = max(1, min(rows, half_bytes // 2 // (n_buffers * row_bytes)))
        fit = (half_bytes - n_buffers * self.block_rows * row_bytes) // (n_tiles_held * row_bytes)
        if fit < 1:
            needed = math.ceil(2 * (n_buffers + n_tiles_held) * row_bytes / 2**20)
            raise ValueError(
                f"memory_budget_mib is {budget_mib}, but one token of {v} columns needs {needed}: "
                f"raise it (default {DEFAULT_BUDGET_MIB})"
            )
        n_tiles = max(1, math.ceil(n_tokens / fit))
        self.tile_rows = max(1, math.ceil(n_tokens / n_tiles))
        self.block_rows = min(self.block_rows, self.tile_rows)
        self.head_block_bytes = half_bytes // 2
        self.device = device


class _Head:
    """One model's head: products in the best precision and speed the machine offers, and this model's
    logit tile."""

    def __init__(self, side: _Side, v: int, hidden_dtype: torch.dtype, dtype: torch.dtype, plan: _Plan):
        self.weight_VH = side.head_VH.detach()[:v]
        self.bias_V = None if side.bias_V is None else side.bias_V.detach()[:v].to(dtype)
        self.scale, self.cap, self.dtype = side.scale, side.cap, dtype
        device, hidden_size = plan.device, self.weight_VH.shape[1]
        half_operands = hidden_dtype == self.weight_VH.dtype in (torch.bfloat16, torch.float16)
        self.out_dtype_product = half_operands and device.type == "cuda" and dtype == torch.float32
        self.native = (
            half_operands and hidden_dtype == torch.bfloat16 and device.type == "cpu" and cpu_has_bf16_products()
        )
        self.operand = self.weight_VH.dtype if self.native or self.out_dtype_product else dtype
        self.tile_nV = torch.empty(plan.tile_rows, v, dtype=torch.bfloat16 if self.native else dtype, device=device)
        self.wide_BH, self.block, self.scratch_VH = None, v, None
        if self.operand != self.weight_VH.dtype:
            fit = max(64, plan.head_block_bytes // (hidden_size * dtype.itemsize))
            self.block = math.ceil(v / math.ceil(v / fit))
            self.wide_BH = torch.empty(self.block, hidden_size, dtype=dtype, device=device)
            if self.block >= v:
                self.wide_BH.copy_(self.weight_VH)

    def project(self, hidden_nH: Tensor) -> Tensor:
        """Raw logits of the tile, in this head's buffer; overwritten by the next call."""
        logits_nV, hidden_nH = self.tile_nV[: len(hidden_nH)], hidden_nH.to(self.operand)
        for columns, weight_BH in self._blocks():
            if self.out_dtype_product:
                torch.mm(hidden_nH, weight_BH.t(), out_dtype=torch.float32, out=logits_nV[:, columns])
            else:
                torch.mm(hidden_nH, weight_BH.t(), out=logits_nV[:, columns])
        return logits_nV

    def back_to_hidden(self, gradient_nV: Tensor) -> Tensor:
        """gradient @ head, summed over head blocks in the computing dtype."""
        total_nH = None
        for columns, weight_BH in self._blocks():
            if total_nH is None:
                total_nH = torch.mm(gradient_nV[:, columns], weight_BH)
            else:
                total_nH.addmm_(gradient_nV[:, columns], weight_BH)
        return total_nH

    def add_head_gradient(self, total_VH: Tensor, gradient_nV: Tensor, hidden_nH: Tensor) -> None:
        """total += gradient.T @ hidden. Half-precision operands: a product per tile, summed in `total`'s
        fp32."""
        hidden_nH = hidden_nH.to(self.operand)
        if self.operand == total_VH.dtype:
            total_VH.addmm_(gradient_nV.t(), hidden_nH)
            return
        if self.scratch_VH is None:
            self.scratch_VH = torch.empty_like(
                total_VH, dtype=torch.float32 if self.out_dtype_product else self.operand
            )
        if self.out_dtype_product:
            torch.mm(gradient_nV.t(), hidden_nH, out_dtype=torch.float32, out=self.scratch_VH)
        else:
            torch.mm(gradient_nV.t(), hidden_nH, out=self.scratch_VH)
        total_VH.add_(self.scratch_VH)

    def logits(self, raw_rV: Tensor, buffer_rV: Tensor | None, tanh_rV: Tensor | None) -> Tensor:
        """Bias, scale and soft cap over raw logits, in place (in `buffer_rV` where the tile is narrower)."""
        logits_rV = raw_rV if raw_rV.dtype == self.dtype else buffer_rV.copy_(raw_rV)
        if self.bias_V is not None:
            logits_rV.add_(self.bias_V)
        if self.scale != 1.0:
            logits_rV.mul_(self.scale)
        if self.cap is not None:
            logits_rV.div_(self.cap).tanh_()
            if tanh_rV is not None:
                tanh_rV.copy_(logits_rV)
            logits_rV.mul_(self.cap)
        return logits_rV

    def _blocks(self):
        v = len(self.weight_VH)
        for start in range(0, v, self.block):
            columns = slice(start, min(start + self.block, v))
            if self.wide_BH is None:
                yield columns, self.weight_VH[columns]
            elif self.block >= v:
                yield columns, self.wide_BH
            else:
                yield columns, self.wide_BH[: columns.stop - start].copy_(self.weight_VH[columns])


class _RowPass:
    """Logits of a row block -> values, and the gradient written over the student's raw logits."""

    def __init__(self, problem: _Problem, student: _Head, teacher: _Head | None, plan: _Plan, wants_gradient: bool):
        self.problem, self.student, self.teacher, self.wants_gradient = (
            problem,
            student,
            teacher,
            wants_gradient,
        )
        self.with_share = wants_gradient and problem.cross_entropy_weight != 0.0

        def buffer(needed=True):
            shape = plan.block_rows, problem.valid_vocab
            return torch.empty(shape, dtype=student.dtype, device=plan.device) if needed else None

        self.log_q, self.x, self.log_p, self.y = buffer(), buffer(), buffer(teacher), buffer(teacher)
        self.q1, self.tanh = buffer(self.with_share), buffer(wants_gradient and student.cap is not None)

    def __call__(self, student_rV, teacher_rV, rows: slice, bias_grad_V: Tensor | None):
        problem, r = self.problem, len(student_rV)
        log_q, log_p, x, y, q1, tanh = (
            b if b is None else b[:r] for b in (self.log_q, self.log_p, self.x, self.y, self.q1, self.tanh)
        )
        divergence_r, cross_entropy_r, agreement_r = 0.0, 0.0, False
        s = self.student.logits(student_rV, x, tanh)
        if self.teacher is not None:
            t = self.teacher.logits(teacher_rV, y, None)
            first_choice_r1 = t.argmax(-1, keepdim=True)
            agreement_r = s.gather(-1, first_choice_r1).squeeze(-1) == s.amax(-1)
        targets_r1 = None if problem.targets_N is None else problem.targets_N[rows].unsqueeze(-1)
        if targets_r1 is not None:
            _log_softmax(s, self.student, log_q)
            cross_entropy_r = log_q.gather(-1, targets_r1).squeeze(-1).neg()
            if self.with_share:
                torch.exp(log_q, out=q1).scatter_add_(-1, targets_r1, q1.new_full((r, 1), -1.0))
        if self.teacher is not None:
            if targets_r1 is None or problem.temperature != 1.0:
                _log_softmax(_cooled(s, problem.temperature), self.student, log_q)
            _log_softmax(_cooled(t, problem.temperature), self.teacher, log_p)
            alpha = problem.alpha
            alpha = alpha if isinstance(alpha, float | int) else alpha[rows]
            divergence_r = divergence_rows(problem.spec, log_p, log_q, x, y, alpha)
        if self.wants_gradient:
            self._write_gradient(student_rV, log_q if self.teacher is not None else None, q1, tanh, rows, bias_grad_V)
        return divergence_r, cross_entropy_r, agreement_r

    def _write_gradient(self, out_rV, g, q1, tanh, rows, bias_grad_V):
        problem = self.problem
        if g is not None and problem.temperature != 1.0:
            g.div_(problem.temperature)
        if self.with_share:
            g = q1.mul_(problem.cross_entropy_weight) if g is None else g.add_(q1, alpha=problem.cross_entropy_weight)
        if problem.weights_N is not None:
            g.mul_(problem.weights_N[rows].to(g.dtype).unsqueeze(-1))
        if self.student.cap is not None:
            g.mul_(tanh.square_().neg_().add_(1.0))
        if self.student.scale != 1.0:
            g.mul_(self.student.scale)
        if bias_grad_V is not None:
            bias_grad_V.add_(g.sum(0))
        out_rV.copy_(g)


def _log_softmax(logits: Tensor, head: _Head, out: Tensor) -> None:
    torch.log_softmax(logits, -1, out=out)
    if head.bias_V is not None:
        out.clamp_(min=LOG_ZERO)


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)


def cpu_has_bf16_products() -> bool:
    """Whether torch's CPU matrix products use bf16 instructions."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _check_side(name: str, hidden_NH: Tensor, head_VH: Tensor, bias_V: Tensor | None) -> None:
    if hidden_NH.dim() != 2 or head_VH.dim() != 2 or hidden_NH.shape[1] != head_VH.shape[1]:
        raise ValueError(
            f"the {name}'s hidden states are {tuple(hidden_NH.shape)}, its head {tuple(head_VH.shape)}: pass "
            "[tokens, hidden] and [vocabulary, hidden]; under ZeRO-3 gather the head first"
        )
    if bias_V is not None and bias_V.shape != (len(head_VH),):
        raise ValueError(
            f"the {name}'s bias is {tuple(bias_V.shape)}, but its head has {len(head_VH)} rows: give one each"
        )


def _valid_vocab(valid_vocab: int | None, *head_sizes: int) -> int:
    valid_vocab = min(head_sizes) if valid_vocab is None else valid_vocab
    if not 1 <= valid_vocab <= min(head_sizes):
        raise ValueError(
            f"valid_vocab is {valid_vocab}, but the heads have {', '.join(map(str, head_sizes))} rows: "
            "it must lie between 1 and the smallest; pass the tokenizer's len()"
        )
    return valid_vocab


def _weights(weights_N: Tensor | None, hidden_NS: Tensor) -> Tensor | None:
    if weights_N is not None and weights_N.shape != (len(hidden_NS),):
        raise ValueError(f"weights_N is {tuple(weights_N.shape)}, but there are {len(hidden_NS)} tokens: give one each")
    return None if weights_N is None else weights_N.detach()


def _targets(targets_N: Tensor | None, n_tokens: int, v: int) -> Tensor | None:
    if targets_N is None:
        return None
    if targets_N.shape != (n_tokens,):
        raise ValueError(f"targets_N is {tuple(targets_N.shape)}, but there are {n_tokens} tokens: give one each")
    if n_tokens and (targets_N.min() < 0 or targets_N.max() >= v):
        low, high = targets_N.min().item(), targets_N.max().item()
        raise ValueError(
            f"target ids span [{low}, {high}], but the vocabulary is 0 to {v - 1}: leave ignored "
            "positions (-100) out before the loss"
        )
    return targets_N.long()
