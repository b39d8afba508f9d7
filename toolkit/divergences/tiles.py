"""All tiles of one loss: the memory budget's plan, each tile's products and row passes, and the gradients' sums.

Legend: N tokens, V vocabulary, S and T hidden sizes of student and teacher, n tokens and B columns of a tile, K ids a
token of a stored teacher. Where the whole vocabulary fits (B = V), one matrix product per model fills a tile, one
kernel turns the student's logits into their gradient, and two matrix products consume that. Where it does not fit, the
tile is projected once for each pass over its columns: slower, and bounded whatever V is.

Softmax and row sums are fp32 (float64 for float64 inputs). So is the head gradient where several tiles add to it; that
of a single tile is one product, which sums in fp32 and is rounded once, to the head's own dtype.
"""

import functools
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.divergences.formulas import compute_dtype, head_threshold
from toolkit.divergences.head import Hidden
from toolkit.divergences.kernels import rows
from toolkit.divergences.kernels.backends import choose_backend, row_kernel
from toolkit.divergences.kernels.rows import CODES, Passes, RowTask
from toolkit.divergences.plan import Plan, make_plan, new_tile, tile_view
from toolkit.divergences.products import Projection, adds_by_parts
from toolkit.divergences.spec import WITH_ALPHA, Objective
from toolkit.divergences.top_k import TopKTeacher, TopKTile


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


class Wanted(NamedTuple):
    """Which gradients are asked for, of the student's hidden states, head and bias."""

    hidden: bool
    head: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of the student's hidden states, head and bias; None where one is not asked for."""

    hidden_NS: Tensor | None
    head_VS: Tensor | None
    bias_V: Tensor | None


class Tiles:
    """One run over all tiles of a loss, whose arguments are those of `fused_linear_divergence` after its checks.

    alpha: of each token [N, 1], or one for all.
    """

    def __init__(
        self, objective: Objective, *, student: Hidden, teacher: Hidden | TopKTeacher | None, targets_N: Tensor | None,
        weights_N: Tensor | None, alpha: float | Tensor, valid_vocab: int, wanted: Wanted, budget_mib: float | None,
        backend: str,
    ):  # fmt: skip
        self.objective, self.wanted, self.v = objective, wanted, valid_vocab
        self.n_tokens, self.device = len(student.states_NH), student.states_NH.device
        self.dtype = compute_dtype(student.states_NH, student.head.weight_VH)
        self.top_k = teacher if isinstance(teacher, TopKTeacher) else None
        self.student = Projection(student, self.dtype)
        self.teacher = Projection(teacher, self.dtype) if isinstance(teacher, Hidden) else None

        # What the rows of all tiles have in common; `_tile` asks for its own part of it.
        columns, alpha_N = range(self.v), None
        spec = objective.divergence
        if spec is not None and spec.name in WITH_ALPHA:
            given = torch.as_tensor(alpha, dtype=self.dtype, device=self.device).flatten()
            alpha_N = given.expand(self.n_tokens).contiguous()
        name = "none" if spec is None else "top_k" if self.top_k is not None else spec.name
        self.task = RowTask(
            code=CODES[name], objective=objective, student=student.head.part(columns, self.dtype),
            teacher=teacher.head.part(columns, self.dtype) if isinstance(teacher, Hidden) else None,
            alpha_n=alpha_N, weights_n=None if weights_N is None else weights_N.to(self.dtype), targets_n=targets_N,
            threshold_n=None, first_column=0,
        )  # fmt: skip

        backend = choose_backend(backend, self.device, self.dtype, name)
        self.plan = self._make_plan(backend, budget_mib)
        self._allocate()
        self.kernel = row_kernel(
            backend, rows=self.plan.tile_rows, columns=self.plan.tile_columns, buffer_bytes=self.plan.rows_bytes,
            dtype=self.dtype, device=self.device,
        )  # fmt: skip

    def _make_plan(self, backend: str, budget_mib: float | None) -> Plan:
        """How large a tile is, by what its tiles and buffers take."""
        models = [self.student] if self.teacher is None else [self.student, self.teacher]
        operand = self.student.operand
        element_bytes = sum(model.logits_dtype.itemsize for model in models)
        if self._has_gradient_tile():
            element_bytes += operand.itemsize
        return make_plan(
            n_tokens=self.n_tokens, v=self.v, element_bytes=element_bytes,
            blocks=sum(model.widens for model in models) + (self.task.code == CODES["akl"]),
            blocks_to_add=int(self.wanted.head and adds_by_parts(operand, self.dtype, self.device)),
            rows_buffered=backend == "torch", device=self.device, budget_mib=budget_mib,
        )  # fmt: skip

    def _has_gradient_tile(self) -> bool:
        """Whether the gradient has a tile of its own: else it is written over the student's products."""
        return any(self.wanted) and self.student.operand != self.student.logits_dtype

    def _allocate(self) -> None:
        """Makes the tiles and the gradients."""
        plan, student, weight_VS = self.plan, self.student, self.student.weight_VH
        for model in (student, self.teacher):
            if model is not None:
                model.allocate(rows=plan.tile_rows, columns=plan.tile_columns, block_bytes=plan.block_bytes)

        # Tiles add to these gradients. The first tile's share of the head's is written, not added, and padding stays 0.
        self.gradient_tile = student.tile
        if self._has_gradient_tile():
            self.gradient_tile = new_tile(plan.tile_rows, plan.tile_columns, student.operand, self.device)
        hidden_NS = head_VS = bias_V = None
        if self.wanted.hidden:
            hidden_NS = torch.zeros_like(student.states_NH, memory_format=torch.contiguous_format)
        if self.wanted.head:
            is_single = plan.tile_rows == self.n_tokens and not student.widens
            head_dtype = weight_VS.dtype if is_single else self.dtype
            head_VS = torch.empty(weight_VS.shape, dtype=head_dtype, device=self.device)
            head_VS[self.v if self.n_tokens else 0 :] = 0
        if self.wanted.bias:
            bias_V = torch.zeros(len(weight_VS), dtype=self.dtype, device=self.device)
        self.gradients = Gradients(hidden_NS, head_VS, bias_V)

    def run(self) -> tuple[FusedLoss, Gradients]:
        """The loss with its values per token, all detached, and the gradients of the loss."""
        # Each tile in turn gives the values of its tokens, and adds to the gradients.
        objective, task = self.objective, self.task
        divergence_N, cross_entropy_N = torch.zeros(2, self.n_tokens, dtype=self.dtype, device=self.device)
        agreement_N = torch.zeros(self.n_tokens, dtype=torch.bool, device=self.device)
        for start in range(0, self.n_tokens, self.plan.tile_rows):
            tokens = slice(start, min(start + self.plan.tile_rows, self.n_tokens))
            state, stored = self._tile(tokens)
            if objective.divergence is not None:
                divergence_N[tokens] = rows.divergence_values(task.code, state)
                agreement_N[tokens] = rows.agreements(state) if stored is None else stored.agreement_n
            if task.targets_n is not None:
                values_n = rows.cross_entropy_values(state) if stored is None else stored.cross_entropy_n
                cross_entropy_N[tokens] = values_n

        # The loss is their weighted sum.
        value_N = divergence_N + objective.cross_entropy_weight * cross_entropy_N
        loss = (value_N if task.weights_n is None else value_N * task.weights_n).sum()
        return FusedLoss(loss, divergence_N, cross_entropy_N, agreement_N), self.gradients

    def _tile(self, tokens: slice) -> tuple[Tensor, TopKTile | None]:
        """All passes over the rows of a tile: at once where it holds the whole vocabulary, else pass by pass. Returns
        the rows' state, and what a stored teacher says of them."""
        # What is kept of these rows from pass to pass.
        n, whole = tokens.stop - tokens.start, self.plan.whole(self.v)
        state = rows.new_state(n, self.dtype, self.device)
        total_nS = None
        if self.wanted.hidden:
            total_nS = torch.zeros(n, self.student.states_NH.shape[1], dtype=self.dtype, device=self.device)
        stored = None if self.top_k is None else TopKTile(self.top_k.map(lambda x: x[tokens]), self.v, self.dtype)
        task = self.task.rows(tokens)
        if task.code == CODES["akl"] and not whole:
            task = replace(task, threshold_n=self._thresholds(tokens, None))

        for passes in self._passes(whole):
            for columns in self._columns():
                # Both models' products at these columns.
                # After the first pass a whole tile still holds the products that a stored teacher needs for the second.
                if stored is None or not whole or Passes.STATISTICS in passes:
                    student_nB, teacher_nB = self._project(tokens, columns)
                    if stored is not None:
                        stored.take(student_nB, columns.start)

                # The kernel, which reads the products and writes the gradient where this pass makes one.
                here = self._at(task, columns)
                if task.code == CODES["akl"] and whole:
                    here = replace(here, threshold_n=self._thresholds(tokens, teacher_nB))
                gradient_nB = tile_view(self.gradient_tile, n, len(columns)) if any(self.wanted) else None
                self.kernel(
                    here if stored is None else stored.others(here), state, student_nB=student_nB,
                    teacher_nB=teacher_nB, out_nB=gradient_nB, passes=passes,
                )  # fmt: skip

                # The student's gradients take their share of the tile at once: the next columns overwrite it.
                if gradient_nB is not None and Passes.GRADIENT in passes:
                    if stored is not None:
                        stored.finish(gradient_nB, here)
                    self._use_gradient(gradient_nB, total_nS, tokens=tokens, columns=columns)
            if stored is not None and Passes.STATISTICS in passes:
                stored.merge(task, state)

        if self.gradients.hidden_NS is not None and total_nS is not None:
            self.gradients.hidden_NS[tokens] = total_nS
        return state, stored

    def _passes(self, whole: bool) -> list[Passes]:
        """What the kernel does in each walk over the columns."""
        wanted = [Passes.STATISTICS]
        if self.task.code not in (CODES["none"], CODES["top_k"]):
            wanted.append(Passes.SUMS)
        if any(self.wanted):
            wanted.append(Passes.GRADIENT)
        if whole and self.top_k is None:  # a stored teacher is merged in between
            return [functools.reduce(operator.or_, wanted)]
        return wanted

    def _columns(self) -> Iterator[range]:
        """The columns of one tile after the other."""
        for first in range(0, self.v, self.plan.tile_columns):
            yield range(first, min(first + self.plan.tile_columns, self.v))

    def _at(self, task: RowTask, columns: range) -> RowTask:
        """The task at these columns."""
        teacher = None if task.teacher is None else task.teacher.part(columns, self.dtype)
        student = task.student.part(columns, self.dtype)
        return replace(task, student=student, teacher=teacher, first_column=columns.start)

    def _project(self, tokens: slice, columns: range) -> tuple[Tensor, Tensor | None]:
        """Products of student and teacher, [n, B] each."""
        student_nB = self.student.project(tokens, columns)
        return student_nB, None if self.teacher is None else self.teacher.project(tokens, columns)

    def _use_gradient(self, gradient_nB: Tensor, total_nS: Tensor | None, *, tokens: slice, columns: range) -> None:
        """Adds a tile's share to the gradients; that of the hidden states to `total_nS`."""
        _, head_VS, bias_V = self.gradients
        if total_nS is not None:
            self.student.add_to_hidden(total_nS, gradient_nB, columns)
        if head_VS is not None:
            self.student.add_to_head(head_VS, gradient_nB, tokens=tokens, columns=columns, first=tokens.start == 0)
        if bias_V is not None:
            bias_V[columns.start : columns.stop] += gradient_nB.sum(0, dtype=self.dtype)

    def _thresholds(self, tokens: slice, teacher_nV: Tensor | None) -> Tensor:
        """akl's thresholds [n], for which the teacher's whole distribution is sorted: a few rows at a time. Their
        products are made here unless they are given."""
        spec, head, teacher = self.objective.divergence, self.task.teacher, self.teacher
        assert spec is not None and head is not None and teacher is not None
        found, columns = [], range(self.v)
        n_rows = max(1, self.plan.block_bytes // (self.v * 6 * self.dtype.itemsize))
        tile = None if teacher_nV is not None else new_tile(n_rows, self.v, teacher.logits_dtype, self.device)
        for start in range(tokens.start, tokens.stop, n_rows):
            some = slice(start, min(start + n_rows, tokens.stop))
            if teacher_nV is None:
                products_rV = teacher.project(some, columns, tile)
            else:
                products_rV = teacher_nV[some.start - tokens.start : some.stop - tokens.start]
            logits_rV = head.to_logits_(products_rV.to(self.dtype, copy=True))
            found.append(head_threshold(logits_rV, spec.head_mass, self.objective.temperature))
        return torch.cat(found)
