"""A teacher that was stored: its K most probable tokens, and the probability mass of all others as one more class.

The divergence is that of K + 1 classes, so it is a lower bound of the full one, and exact where K is the vocabulary.
The student's mass outside of the K ids is summed exactly: their logits are taken out of the tile before the row
statistics are made, so nothing is lost to 1 - sum q.

Legend: N tokens (n of a tile), K ids a token, B columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.divergences.head import LOG_ZERO
from toolkit.divergences.kernels.rows import Row, RowTask
from toolkit.divergences.kernels.rows_torch import gradient, terms
from toolkit.divergences.spec import Objective

WITH_TOP_K = ("fkl", "rkl", "skl", "srkl")


@dataclass(frozen=True)
class TopKTeacher:
    """What is kept of a teacher's distributions at N tokens.

    ids_NK: token ids, different from each other in a row. log_probs_NK: their log-probabilities in nats, at the
    temperature of the loss. tail_mass_N: the probability of all other tokens together; float64 where that may be below
    e^-87. offset_N: nats that are added to the divergence; a constant, for instance the entropy by which random draws
    fall short of the distribution's.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_mass_N: Tensor
    offset_N: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> TopKTeacher:
        """The same with each of its tensors changed: `teacher.map(lambda x: x[:8])` has the first 8 tokens."""
        offset_N = None if self.offset_N is None else change(self.offset_N)
        return TopKTeacher(change(self.ids_NK), change(self.log_probs_NK), change(self.tail_mass_N), offset_N)

    def check(self, objective: Objective, n_tokens: int, v: int) -> None:
        """Raises ValueError for what the operation cannot use: v is the size of the vocabulary."""
        name = None if objective.divergence is None else objective.divergence.name
        if name not in WITH_TOP_K:
            raise ValueError(f"{name!r} needs the teacher's whole distribution; with top-k: {', '.join(WITH_TOP_K)}")
        ids_NK, log_probs_NK = self.ids_NK, self.log_probs_NK
        if ids_NK.dim() != 2 or ids_NK.shape != log_probs_NK.shape or len(ids_NK) != n_tokens:
            raise ValueError(
                f"top-k ids are {tuple(ids_NK.shape)}, log-probabilities {tuple(log_probs_NK.shape)}: both must be "
                f"[{n_tokens}, K], a row for each of the student's hidden states"
            )
        for field, given in (("tail_mass_N", self.tail_mass_N), ("offset_N", self.offset_N)):
            if given is not None and given.shape != (n_tokens,):
                raise ValueError(f"{field} is {tuple(given.shape)}, but there are {n_tokens} tokens: give one each")
        if ids_NK.numel() and (ids_NK.min() < 0 or ids_NK.max() >= v):
            low, high = ids_NK.min().item(), ids_NK.max().item()
            raise ValueError(f"top-k ids span [{low}, {high}], the vocabulary is 0 to {v - 1}: stored by another?")
        if objective.cross_entropy_weight and objective.temperature != 1.0:
            raise ValueError(
                f"a stored teacher at temperature {objective.temperature} with cross_entropy_weight "
                f"{objective.cross_entropy_weight}: use temperature=1.0, or add the cross entropy by "
                "fused_linear_cross_entropy"
            )


class TopKTile:
    """A tile's rows where the teacher is stored. The kernel works on all columns but the ids', which `take` hides from
    it; `merge` adds those between its STATISTICS and its GRADIENT, and `finish` puts their gradients into the tile."""

    cross_entropy_n: Tensor
    agreement_n: Tensor
    gradient_nK: Tensor
    target_gradient_n: Tensor | None = None  # at targets outside of the ids; 0 where it is inside

    def __init__(self, teacher: TopKTeacher, v: int, dtype: torch.dtype):
        self.teacher, self.ids_nK, self.v = teacher, teacher.ids_NK.long(), v
        self.products_nK = torch.empty(self.ids_nK.shape, dtype=dtype, device=self.ids_nK.device)

    def others(self, task: RowTask) -> RowTask:
        """The kernel's task at the columns that are left: their gradients come from the numbers that `merge` leaves in
        the state, so it knows neither divergence nor cross entropy."""
        objective = Objective(None, temperature=task.objective.temperature)
        return replace(task, objective=objective, alpha_n=None)

    def take(self, student_nB: Tensor, first_column: int) -> None:
        """Moves the student's products at the ids, as far as they lie in this tile, to `products_nK`; minus infinity
        stays in their place."""
        if student_nB.shape[1] == self.v:
            self.products_nK.copy_(student_nB.gather(1, self.ids_nK))
            student_nB.scatter_(1, self.ids_nK, -torch.inf)
            return
        row, k, column = self._inside(student_nB, first_column)
        self.products_nK[row, k] = student_nB[row, column].to(self.products_nK.dtype)
        student_nB[row, column] = -torch.inf

    def merge(self, task: RowTask, state: Tensor) -> None:
        """After STATISTICS of the other columns: the divergence goes to `state`, and what GRADIENT there needs.
        `task`: with the student's whole head."""
        objective, teacher = task.objective, self.teacher
        temperature, weight, spec = objective.temperature, objective.cross_entropy_weight, objective.divergence
        assert spec is not None

        # The student's K + 1 classes: the ids, and all others together.
        s_nK = task.student.to_logits_(self.products_nK, self.ids_nK)
        max_n = torch.maximum(state[Row.STUDENT_MAX], s_nK.amax(-1))
        others_n, shifted_nK = state[Row.STUDENT_MAX] - max_n, s_nK - max_n.unsqueeze(-1)
        tail_n = others_n / temperature + state[Row.STUDENT_SUM_T].log()
        z = torch.cat([shifted_nK / temperature, tail_n.unsqueeze(-1)], -1)
        lse_n = z.logsumexp(-1)
        log_q = (z - lse_n.unsqueeze(-1)).clamp(min=LOG_ZERO)
        q = log_q.exp()

        # The teacher's, and the divergence with its gradient at every class.
        log_tail_n1 = teacher.tail_mass_N.double().log().to(state.dtype).unsqueeze(-1)
        log_p = torch.cat([teacher.log_probs_NK.to(state.dtype), log_tail_n1], -1).clamp(min=LOG_ZERO)
        alpha = None if task.alpha_n is None else task.alpha_n.unsqueeze(-1)
        f, sum_g, h, r = terms(spec, log_p, log_q.clone(), q, alpha, torch.empty_like(q), torch.empty_like(q))
        g = gradient(q, h, r, sum_g.unsqueeze(-1)) / temperature
        state[Row.SUM_0] = f if teacher.offset_N is None else f + teacher.offset_N.to(f.dtype)
        # The kernel's q is the student's distribution within the tail.
        state[Row.SUM_1] = -temperature * (g[:, -1] + weight * q[:, -1])

        # The gradients at the ids are those of the divergence and of the cross entropy, weighted.
        first_n1 = teacher.log_probs_NK.argmax(-1, keepdim=True)
        chosen_n = s_nK.gather(-1, first_n1).squeeze(-1)
        self.agreement_n = (chosen_n == s_nK.amax(-1)) & (chosen_n >= state[Row.STUDENT_MAX])
        self.gradient_nK = g[:, :-1]
        if task.targets_n is not None:
            lse_1_n = lse_n
            if temperature != 1.0:
                lse_1_n = torch.logaddexp(others_n + state[Row.STUDENT_SUM].log(), shifted_nK.logsumexp(-1))
            self._merge_targets(task, task.targets_n, state[Row.AT_TARGET], s_nK, lse_1_n, max_n, q)
        self.gradient_nK = self.gradient_nK * task.student.slope(s_nK)
        if task.weights_n is not None:
            self.gradient_nK = self.gradient_nK * task.weights_n.unsqueeze(-1)

    def _merge_targets(
        self, task: RowTask, targets_n: Tensor, at_target_n: Tensor, s_nK: Tensor, lse_n: Tensor, max_n: Tensor,
        q: Tensor,
    ) -> None:  # fmt: skip
        """The cross entropy, and its share of the gradient. at_target_n: the logit where it is none of the ids;
        lse_n: log of the sum of exponentials of all logits over max_n."""
        # The target's logit is among the ids', or the one that STATISTICS found.
        weight = task.objective.cross_entropy_weight
        is_target_nK = self.ids_nK == targets_n.unsqueeze(-1)
        stored_n = is_target_nK.any(-1)
        inside_n = torch.where(is_target_nK, s_nK, 0.0).sum(-1)
        at_target_n = torch.where(stored_n, inside_n, at_target_n)
        self.cross_entropy_n = lse_n - (at_target_n - max_n)
        if not weight:
            return

        # A target among the ids gets its gradient with them, another one by itself.
        self.gradient_nK = self.gradient_nK + weight * (q[:, :-1] - is_target_nK.to(q.dtype))
        slope_n = task.student.slope(at_target_n)
        target_gradient_n = torch.where(stored_n, torch.zeros_like(at_target_n), -weight * slope_n)
        self.target_gradient_n = target_gradient_n if task.weights_n is None else target_gradient_n * task.weights_n

    def finish(self, out_nB: Tensor, task: RowTask) -> None:
        """Puts the gradients at the ids, and the targets' share, into the tile after its GRADIENT pass."""
        columns = out_nB.shape[1]
        if columns == self.v:
            out_nB.scatter_(1, self.ids_nK, self.gradient_nK.to(out_nB.dtype))
        else:
            row, k, column = self._inside(out_nB, task.first_column)
            out_nB[row, column] = self.gradient_nK[row, k].to(out_nB.dtype)
        if self.target_gradient_n is not None and task.targets_n is not None:
            local_n = task.targets_n - task.first_column
            inside_n = (local_n >= 0) & (local_n < columns)
            share_n = torch.where(inside_n, self.target_gradient_n, 0.0).to(out_nB.dtype)
            out_nB.scatter_add_(1, local_n.clamp(0, columns - 1).unsqueeze(-1), share_n.unsqueeze(-1))

    def _inside(self, tile_nB: Tensor, first_column: int) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, places k, columns of the tile) of the ids that lie in this tile."""
        local_nK = self.ids_nK - first_column
        row, k = ((local_nK >= 0) & (local_nK < tile_nB.shape[1])).nonzero(as_tuple=True)
        return row, k, local_nK[row, k]
