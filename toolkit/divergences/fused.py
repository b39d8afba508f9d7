"""Projection and divergence in one operation: gradients are formed in forward, tile by tile, and no [N, V]
tensor exists.

`formulas` is the readable twin; tests hold the two together. `rows` has the mathematics of a tile, `plan` its size,
`products` its matrix products; `rows_torch`, `rows_cpp` and `rows_triton` do its elementwise work.

Legend: N tokens, V vocabulary, S and T hidden sizes of student and teacher, n tokens and B columns of a tile, K ids a
token of a stored teacher. Where the whole vocabulary fits (B = V), one matrix product per model fills a tile, one
kernel turns the student's logits into their gradient, and two matrix products consume that. Where it does not fit, the
tile is projected once for each pass over its columns: slower, and bounded whatever V is.

Softmax, row sums and head gradient are fp32 (float64 for float64 inputs).
"""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.divergences import rows
from toolkit.divergences.backends import choose_backend, row_kernel
from toolkit.divergences.formulas import check_alpha, check_temperature, compute_dtype, head_threshold
from toolkit.divergences.plan import make_plan, new_tile
from toolkit.divergences.products import Projection, operand_dtypes
from toolkit.divergences.rows import CODES, LogitRule, Passes, RowTask
from toolkit.divergences.rows_torch import TorchRows, logits_of
from toolkit.divergences.spec import WITH_ALPHA, Divergence
from toolkit.divergences.top_k import TopKTeacher, check_top_k, finish_gradient, merge_top_k, take_top_k


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
    teacher_hidden_NT: Tensor | None = None,
    teacher_head_VT: Tensor | None = None,
    *,
    teacher_top_k: TopKTeacher | None = None,
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
    backend: str = "auto",
) -> FusedLoss:
    """Weighted sum of token divergences between two language-model heads, from hidden states.

    Logits are cap(scale * (hidden @ head.T + bias)), with cap(z) = c tanh(z / c); divided by `temperature`
    for the divergence only: the cross entropy with `targets_N` is that of the model, at temperature 1.
    Columns from `valid_vocab` on are minus infinity on both sides, so the heads may be padded to different
    sizes. A bias may hold minus infinity. The teacher's side is constant; in place of hidden states and head it may be
    `teacher_top_k`, for fkl, rkl, skl and srkl. `alpha_N` replaces `spec.alpha` token by token (skl, srkl, taid).

    `memory_budget_mib` (by default 256 on a CPU, 3,072 on a GPU) bounds all buffers but the fp32 head gradient [V, S],
    rows of N numbers, and what the caller passed in; smaller is slower. `backend`: "triton" (GPU), "cpp" (CPU with a
    C++ compiler), "torch" (anywhere), or "auto", the fastest of these that can run here.

    Gradients reach student hidden, head and bias, each only if it requires grad; they are formed here, so the
    weights must be final, and backward only scales them by the incoming scalar. The heads are not kept for
    backward. Without grad mode the same values are computed and the gradient work is left out. N = 0 gives
    0, connected.

    Raises ValueError for shapes, token ids, weights' or alpha's shapes that do not fit, unequal vocabularies without
    `valid_vocab`, a cross-entropy weight without targets, a missing or double teacher, a budget too small for one
    token, and a backend that cannot run here. Source: skewed divergences of DistiLLM, arXiv 2402.03898; the others as
    in `formulas`.
    """
    _check_side("student", student_hidden_NS, student_head_VS, student_bias_V)
    n_tokens, v_student = len(student_hidden_NS), len(student_head_VS)
    heads = [v_student]
    if (teacher_top_k is None) == (teacher_hidden_NT is None or teacher_head_VT is None):
        raise ValueError(
            "the teacher must be given once: either teacher_hidden_NT and teacher_head_VT, or teacher_top_k"
        )
    if teacher_top_k is None:
        _check_side("teacher", teacher_hidden_NT, teacher_head_VT, teacher_bias_V)
        heads.append(len(teacher_head_VT))
        if len(teacher_hidden_NT) != n_tokens:
            raise ValueError(
                f"student hidden states hold {n_tokens} tokens, the teacher's {len(teacher_hidden_NT)}: "
                "pass the same response positions to both"
            )
        if valid_vocab is None and v_student != len(teacher_head_VT):
            raise ValueError(
                f"the student's head has {v_student} rows, the teacher's {len(teacher_head_VT)}: pass valid_vocab, "
                "the size of the tokenizer's real vocabulary, so that padding is cut on both sides"
            )
    check_temperature(temperature)
    if cross_entropy_weight and targets_N is None:
        raise ValueError(f"cross_entropy_weight is {cross_entropy_weight}, but targets_N is None: pass the target ids")
    alpha = check_alpha(spec, alpha_N, n_tokens)
    if alpha_N is None and spec.alpha == 0.0:  # the plain divergences cost less
        spec = Divergence({"skl": "fkl", "srkl": "rkl"}.get(spec.name, spec.name), 0.0, spec.beta, spec.head_mass)
    v_valid = _valid_vocab(valid_vocab, *heads)
    if teacher_top_k is not None:
        check_top_k(spec, teacher_top_k, n_tokens, v_valid, temperature, cross_entropy_weight)
        teacher_top_k = teacher_top_k._replace(ids_NK=teacher_top_k.ids_NK.long())
    student = _Side(student_head_VS, student_bias_V, student_logit_scale, student_soft_cap)
    teacher = None
    if teacher_top_k is None:
        teacher = _Side(teacher_head_VT, teacher_bias_V, teacher_logit_scale, teacher_soft_cap)
    problem = _Problem(
        spec, student, teacher_hidden_NT, teacher, teacher_top_k, _weights(weights_N, student_hidden_NS),
        _targets(targets_N, n_tokens, v_valid), float(cross_entropy_weight), float(temperature), v_valid, alpha,
        memory_budget_mib, backend,
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
    backend: str = "auto",
) -> FusedLoss:
    """Weighted sum of token cross entropies, in nats: `fused_linear_divergence` without a teacher, same
    arguments."""
    _check_side("student", hidden_NS, head_VS, bias_V)
    v_valid = _valid_vocab(valid_vocab, len(head_VS))
    problem = _Problem(
        None, _Side(head_VS, bias_V, logit_scale, soft_cap), None, None, None, _weights(weights_N, hidden_NS),
        _targets(targets_N, len(hidden_NS), v_valid), 1.0, 1.0, v_valid, 0.0, memory_budget_mib, backend,
    )  # fmt: skip
    return _solve(hidden_NS, head_VS, bias_V, problem)


class _Side(NamedTuple):
    head_VH: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None

    def rule(self, columns: range, dtype: torch.dtype) -> LogitRule:
        bias_B = None if self.bias_V is None else self.bias_V.detach()[columns.start : columns.stop].to(dtype)
        return LogitRule(self.scale, self.cap, bias_B)


class _Problem(NamedTuple):
    spec: Divergence | None
    student: _Side
    teacher_hidden_NT: Tensor | None
    teacher: _Side | None
    top_k: TopKTeacher | None
    weights_N: Tensor | None
    targets_N: Tensor | None
    cross_entropy_weight: float
    temperature: float
    valid_vocab: int
    alpha: float | Tensor
    budget_mib: float | None
    backend: str

    @property
    def code(self) -> int:
        if self.top_k is not None:
            return CODES["top_k"]
        if self.spec is None:
            return CODES["none"]
        return CODES[self.spec.name]


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
        ctx.dtypes = [x if x is None else x.dtype for x in (hidden_NS, head_VS, bias_V)]
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None, None, None, None
        scaled = (
            None if total is None else _scaled(total, grad_loss, dtype)
            for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )  # fmt: skip
        return *scaled, None, None


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor in `dtype`, in one pass."""
    return torch.mul(total, factor, out=total.new_empty(total.shape, dtype=dtype))


def _run_tiles(hidden_NS: Tensor, problem: _Problem, wanted: tuple[bool, bool, bool]):
    """The whole operation: `FusedLoss` and the gradients of hidden, head and bias (None where not wanted)."""
    hidden_NS = hidden_NS.detach()
    with torch.autocast(hidden_NS.device.type, enabled=False):
        return _Tiles(hidden_NS, problem, wanted).run()


class _Tiles:
    """One run over all tiles."""

    def __init__(self, hidden_NS: Tensor, problem: _Problem, wanted: tuple[bool, bool, bool]):
        self.hidden_NS, self.problem, self.wanted = hidden_NS, problem, wanted
        self.v, device = problem.valid_vocab, hidden_NS.device
        self.dtype = compute_dtype(hidden_NS, problem.student.head_VH)
        backend = choose_backend(problem.backend, device, self.dtype)
        operand, student_dtype = operand_dtypes(problem.student.head_VH, hidden_NS.dtype, self.dtype)
        element_bytes, teacher_dtype = student_dtype.itemsize, None
        if problem.teacher is not None:
            teacher_dtype = operand_dtypes(problem.teacher.head_VH, problem.teacher_hidden_NT.dtype, self.dtype)[1]
            element_bytes += teacher_dtype.itemsize
        if operand != student_dtype and any(wanted):
            element_bytes += operand.itemsize  # the gradient has a tile of its own
        self.plan = make_plan(len(hidden_NS), self.v, element_bytes, backend == "torch", device, problem.budget_mib)
        rows, columns = self.plan.tile_rows, self.plan.tile_columns
        self.student = Projection(problem.student.head_VH.detach(), hidden_NS.dtype, self.dtype, self.plan.block_bytes)
        self.student_tile = new_tile(rows, columns, student_dtype, device)
        self.gradient_tile = self.student_tile if operand == student_dtype else None
        if self.gradient_tile is None and any(wanted):
            self.gradient_tile = new_tile(rows, columns, operand, device)
        self.teacher = self.teacher_tile = None
        if problem.teacher is not None:
            self.teacher = Projection(
                problem.teacher.head_VH.detach(), problem.teacher_hidden_NT.dtype, self.dtype, self.plan.block_bytes
            )
            self.teacher_tile = new_tile(rows, columns, teacher_dtype, device)
        if backend == "torch":
            self.kernel = TorchRows(rows, columns, self.plan.rows_bytes, self.dtype, device).run
        else:
            self.kernel = row_kernel(backend)
        wants_hidden, wants_head, wants_bias = wanted
        self.hidden_grad_NS = (
            torch.zeros_like(hidden_NS, memory_format=torch.contiguous_format) if wants_hidden else None
        )
        head = problem.student.head_VH
        self.head_grad_VS = None
        if wants_head:  # the first tile's product is written, not added; padding stays 0
            self.head_grad_VS = torch.empty(head.shape, dtype=self.dtype, device=device)
            self.head_grad_VS[self.v if len(hidden_NS) else 0 :] = 0
        self.bias_grad_V = torch.zeros(len(head), dtype=self.dtype, device=device) if wants_bias else None

    def run(self) -> tuple[FusedLoss, tuple]:
        problem, n_tokens, device = self.problem, len(self.hidden_NS), self.hidden_NS.device
        divergence_N, cross_entropy_N = torch.zeros(2, n_tokens, dtype=self.dtype, device=device)
        agreement_N = torch.zeros(n_tokens, dtype=torch.bool, device=device)
        for start in range(0, n_tokens, self.plan.tile_rows):
            tile = slice(start, min(start + self.plan.tile_rows, n_tokens))
            state, merged = self._tile(tile)
            if problem.spec is not None:
                divergence_N[tile] = rows.divergence_values(problem.code, state)
                agreement_N[tile] = rows.agreements(state) if merged is None else merged.agreement_n
            if problem.targets_N is not None:
                cross_entropy_N[tile] = rows.cross_entropy_values(state) if merged is None else merged.cross_entropy_n
        value_N = divergence_N + problem.cross_entropy_weight * cross_entropy_N
        loss = (value_N if problem.weights_N is None else value_N * problem.weights_N.to(self.dtype)).sum()
        gradients = self.hidden_grad_NS, self.head_grad_VS, self.bias_grad_V
        return FusedLoss(loss, divergence_N, cross_entropy_N, agreement_N), gradients

    def _tile(self, tile: slice):
        """All passes over the rows of a tile: at once where it holds the whole vocabulary, else pass by pass."""
        problem, n = self.problem, tile.stop - tile.start
        state = rows.new_state(n, self.dtype, self.hidden_NS.device)
        task = self._task(tile)
        total_nS = None
        if self.wanted[0]:
            total_nS = torch.zeros(n, self.hidden_NS.shape[1], dtype=self.dtype, device=self.hidden_NS.device)
        top_k, merged = None, None
        if problem.top_k is not None:
            top_k = problem.top_k.rows(tile)
            raw_nK = torch.empty(top_k.ids_NK.shape, dtype=self.dtype, device=state.device)
        whole = self.plan.whole(self.v)
        if problem.code == CODES["akl"] and not whole:
            task = replace(task, threshold_n=self._thresholds(tile, None))
        for passes in self._passes(whole):
            for first in range(0, self.v, self.plan.tile_columns):
                columns = range(first, min(first + self.plan.tile_columns, self.v))
                if not (top_k is not None and whole and Passes.STATISTICS not in passes):
                    student_nB, teacher_nB = self._project(tile, columns)
                    if top_k is not None:
                        take_top_k(student_nB, top_k.ids_NK, first, self.v, raw_nK)
                here = replace(
                    task, first_column=first, student=problem.student.rule(columns, self.dtype),
                    teacher=LogitRule() if problem.teacher is None else problem.teacher.rule(columns, self.dtype),
                )  # fmt: skip
                if problem.code == CODES["akl"] and whole:
                    here = replace(here, threshold_n=self._thresholds(tile, teacher_nB))
                gradient_nB = None if self.gradient_tile is None else self.gradient_tile[:n, : len(columns)]
                plain = here if top_k is None else replace(here, spec=None, cross_entropy_weight=0.0, alpha_n=None)
                self.kernel(plain, state, student_nB, teacher_nB, gradient_nB, passes)
                if Passes.GRADIENT in passes:
                    if top_k is not None:
                        finish_gradient(gradient_nB, here, top_k.ids_NK, self.v, merged)
                    self._use_gradient(tile, columns, gradient_nB, total_nS)
            if top_k is not None and Passes.STATISTICS in passes:
                full = replace(task, student=problem.student.rule(range(self.v), self.dtype))
                merged = merge_top_k(full, problem.spec, state, raw_nK, top_k)
        if total_nS is not None:
            self.hidden_grad_NS[tile] = total_nS
        return state, merged

    def _passes(self, whole: bool) -> list[Passes]:
        wanted = [Passes.STATISTICS]
        if self.problem.code not in (CODES["none"], CODES["top_k"]):
            wanted.append(Passes.SUMS)
        if any(self.wanted):
            wanted.append(Passes.GRADIENT)
        if whole and self.problem.top_k is None:  # a stored teacher is merged in between
            return [functools.reduce(operator.or_, wanted)]
        return wanted

    def _task(self, tile: slice) -> RowTask:
        problem, device = self.problem, self.hidden_NS.device
        alpha_n = None
        if problem.spec is not None and problem.spec.name in WITH_ALPHA:
            alpha = torch.as_tensor(problem.alpha, dtype=self.dtype, device=device)
            alpha_n = alpha.flatten()[tile] if alpha.dim() else alpha.expand(tile.stop - tile.start).contiguous()
        return RowTask(
            problem.spec, problem.code, problem.temperature, problem.cross_entropy_weight, LogitRule(), LogitRule(),
            alpha_n, None if problem.weights_N is None else problem.weights_N[tile].to(self.dtype),
            None if problem.targets_N is None else problem.targets_N[tile], None,
        )  # fmt: skip

    def _project(self, tile: slice, columns: range) -> tuple[Tensor, Tensor | None]:
        n = tile.stop - tile.start
        student_nB = self.student.project(self.hidden_NS[tile], columns, self.student_tile[:n, : len(columns)])
        if self.teacher is None:
            return student_nB, None
        hidden_nT = self.problem.teacher_hidden_NT[tile].detach()
        return student_nB, self.teacher.project(hidden_nT, columns, self.teacher_tile[:n, : len(columns)])

    def _use_gradient(self, tile: slice, columns: range, gradient_nB: Tensor, total_nS: Tensor | None) -> None:
        if total_nS is not None:
            self.student.add_to_hidden(total_nS, gradient_nB, columns)
        if self.head_grad_VS is not None:
            self.student.add_to_head(self.head_grad_VS, gradient_nB, self.hidden_NS[tile], columns, tile.start == 0)
        if self.bias_grad_V is not None:
            self.bias_grad_V[columns.start : columns.stop] += gradient_nB.sum(0, dtype=self.dtype)

    def _thresholds(self, tile: slice, teacher_nV: Tensor | None) -> Tensor:
        """akl's heads need the teacher's whole distribution: a few rows at a time, projected here unless given."""
        problem, columns = self.problem, range(self.v)
        n_rows = max(1, self.plan.block_bytes // (self.v * 6 * self.dtype.itemsize))
        rule, found = problem.teacher.rule(columns, self.dtype), []
        buffer = (
            None if teacher_nV is not None else new_tile(n_rows, self.v, self.teacher_tile.dtype, self.hidden_NS.device)
        )
        for start in range(tile.start, tile.stop, n_rows):
            some = slice(start, min(start + n_rows, tile.stop))
            if teacher_nV is None:
                hidden_rT = problem.teacher_hidden_NT[some].detach()
                raw_rV = self.teacher.project(hidden_rT, columns, buffer[: len(hidden_rT)])
            else:
                raw_rV = teacher_nV[some.start - tile.start : some.stop - tile.start]
            logits_rV = logits_of(raw_rV.to(self.dtype), rule)
            found.append(head_threshold(logits_rV, problem.spec.head_mass, problem.temperature))
        return torch.cat(found)


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
