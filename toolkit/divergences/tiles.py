"""All tiles of one loss: the memory budget's plan, each tile's products and row passes, and the gradients' sums.

Legend: N tokens, V vocabulary, S and T hidden sizes of student and teacher, n tokens and B columns of a tile, K ids a
token of a stored teacher. Where the whole vocabulary fits (B = V), one matrix product per model fills a tile, one
kernel turns the student's logits into their gradient, and two matrix products consume that. Where it does not fit, the
tile is projected once for each pass over its columns: slower, and bounded whatever V is.

Softmax and row sums are fp32 (float64 for float64 inputs). So is the head gradient where several tiles add to it; that
of a single tile is one product, which sums in fp32 and is rounded once, to the head's own dtype.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.divergences.formulas import compute_dtype, head_threshold
from toolkit.divergences.kernels import rows
from toolkit.divergences.kernels.choice import choose_backend, row_kernel
from toolkit.divergences.kernels.rows import CODES, LogitRule, Passes, RowTask
from toolkit.divergences.kernels.rows_torch import TorchRows, logits_of
from toolkit.divergences.plan import make_plan, new_tile, tile_view
from toolkit.divergences.products import Projection, adds_by_parts, operand_dtypes
from toolkit.divergences.spec import WITH_ALPHA, Divergence
from toolkit.divergences.top_k import TopKTeacher, finish_gradient, merge_top_k, take_top_k


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


class Side(NamedTuple):
    head_VH: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None

    def rule(self, columns: range, dtype: torch.dtype) -> LogitRule:
        bias_B = None if self.bias_V is None else self.bias_V.detach()[columns.start : columns.stop].to(dtype)
        return LogitRule(self.scale, self.cap, bias_B)


class Problem(NamedTuple):
    spec: Divergence | None
    student: Side
    teacher_hidden_NT: Tensor | None
    teacher: Side | None
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


class Tiles:
    """One run over all tiles."""

    def __init__(self, hidden_NS: Tensor, problem: Problem, wanted: tuple[bool, bool, bool]):
        self.hidden_NS, self.problem, self.wanted = hidden_NS, problem, wanted
        self.v, device = problem.valid_vocab, hidden_NS.device
        self.dtype = compute_dtype(hidden_NS, problem.student.head_VH)
        backend = choose_backend(problem.backend, device, self.dtype)
        head = problem.student.head_VH.detach()
        student_dtypes = operand_dtypes(head, hidden_NS.dtype, self.dtype)
        sides = [(head, *student_dtypes)]
        if problem.teacher is not None:
            teacher_head = problem.teacher.head_VH.detach()
            sides.append((teacher_head, *operand_dtypes(teacher_head, problem.teacher_hidden_NT.dtype, self.dtype)))
        operand, student_dtype = student_dtypes
        element_bytes = sum(logits.itemsize for *_, logits in sides)
        if operand != student_dtype and any(wanted):
            element_bytes += operand.itemsize  # the gradient has a tile of its own
        widened = sum(operand != head.dtype for head, operand, _ in sides)
        self.plan = make_plan(
            len(hidden_NS), self.v, element_bytes, widened + (problem.code == CODES["akl"]),
            int(wanted[1] and adds_by_parts(operand, self.dtype, device)), backend == "torch", device,
            problem.budget_mib,
        )  # fmt: skip
        rows, columns = self.plan.tile_rows, self.plan.tile_columns
        self.student = Projection(head, hidden_NS.dtype, self.dtype, self.plan.block_bytes)
        self.student_tile = new_tile(rows, columns, student_dtype, device)
        self.gradient_tile = self.student_tile if operand == student_dtype else None
        if self.gradient_tile is None and any(wanted):
            self.gradient_tile = new_tile(rows, columns, operand, device)
        self.teacher = self.teacher_tile = None
        if problem.teacher is not None:
            self.teacher = Projection(teacher_head, problem.teacher_hidden_NT.dtype, self.dtype, self.plan.block_bytes)
            self.teacher_tile = new_tile(rows, columns, sides[1][2], device)
        if backend == "torch":
            self.kernel = TorchRows(rows, columns, self.plan.rows_bytes, self.dtype, device).run
        else:
            self.kernel = row_kernel(backend)
        wants_hidden, wants_head, wants_bias = wanted
        self.hidden_grad_NS = (
            torch.zeros_like(hidden_NS, memory_format=torch.contiguous_format) if wants_hidden else None
        )
        self.head_grad_VS = None
        if wants_head:  # the first tile's product is written, not added; padding stays 0
            single = rows == len(hidden_NS) and operand == head.dtype
            self.head_grad_VS = torch.empty(head.shape, dtype=head.dtype if single else self.dtype, device=device)
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
                gradient_nB = None if self.gradient_tile is None else tile_view(self.gradient_tile, n, len(columns))
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
        student_nB = self.student.project(self.hidden_NS[tile], columns, tile_view(self.student_tile, n, len(columns)))
        if self.teacher is None:
            return student_nB, None
        hidden_nT = self.problem.teacher_hidden_NT[tile].detach()
        return student_nB, self.teacher.project(hidden_nT, columns, tile_view(self.teacher_tile, n, len(columns)))

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
                raw_rV = self.teacher.project(hidden_rT, columns, tile_view(buffer, len(hidden_rT), self.v))
            else:
                raw_rV = teacher_nV[some.start - tile.start : some.stop - tile.start]
            logits_rV = logits_of(raw_rV.to(self.dtype), rule)
            found.append(head_threshold(logits_rV, problem.spec.head_mass, problem.temperature))
        return torch.cat(found)
