"""A teacher that was stored: its K most probable tokens, and the probability mass of all others as one more class.

The divergence is that of K + 1 classes, so it is a lower bound of the full one, and exact where K is the vocabulary.
The student's mass outside of the K ids is summed exactly: their logits are taken out of the tile before the row
statistics are made, so nothing is lost to 1 - sum q.

Legend: N tokens (n of a tile), K ids a token, B columns of a tile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.divergences.kernels.rows import LOG_ZERO, LogitRule, Row, RowTask
from toolkit.divergences.kernels.rows_torch import gradient, logits_of, slope_of, terms
from toolkit.divergences.spec import Divergence

WITH_TOP_K = ("fkl", "rkl", "skl", "srkl")


class TopKTeacher(NamedTuple):
    """ids_NK: token ids, different from each other in a row. log_probs_NK: their log-probabilities in nats, at the
    temperature of the loss. tail_mass_N: the probability of all other tokens together; float64 where that may be below
    e^-87. offset_N: nats that are added to the divergence; a constant, as the entropy that random draws of a
    distribution have too little of."""

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_mass_N: Tensor
    offset_N: Tensor | None = None

    def rows(self, part: slice) -> TopKTeacher:
        return TopKTeacher(*(None if x is None else x[part] for x in self))


class Merged(NamedTuple):
    """Of a tile: values for metrics, and what the gradient needs at single columns."""

    cross_entropy_n: Tensor | None
    agreement_n: Tensor
    gradient_nK: Tensor
    target_gradient_n: Tensor | None  # at targets outside of the ids; 0 where it is inside


def check_top_k(spec: Divergence, teacher: TopKTeacher, n_tokens: int, v: int, temperature: float,
                cross_entropy_weight: float) -> None:  # fmt: skip
    """Raises ValueError for what the operation cannot use."""
    if spec.name not in WITH_TOP_K:
        raise ValueError(f"{spec.name!r} needs the teacher's whole distribution; with top-k: {', '.join(WITH_TOP_K)}")
    ids_NK, log_probs_NK, tail_mass_N, offset_N = teacher
    if ids_NK.dim() != 2 or ids_NK.shape != log_probs_NK.shape or len(ids_NK) != n_tokens:
        raise ValueError(
            f"top-k ids are {tuple(ids_NK.shape)}, log-probabilities {tuple(log_probs_NK.shape)}: both must be "
            f"[{n_tokens}, K], a row for each of the student's hidden states"
        )
    for name, given in (("tail_mass_N", tail_mass_N), ("offset_N", offset_N)):
        if given is not None and given.shape != (n_tokens,):
            raise ValueError(f"{name} is {tuple(given.shape)}, but there are {n_tokens} tokens: give one each")
    if ids_NK.numel() and (ids_NK.min() < 0 or ids_NK.max() >= v):
        low, high = ids_NK.min().item(), ids_NK.max().item()
        raise ValueError(
            f"top-k ids span [{low}, {high}], but the vocabulary is 0 to {v - 1}: was it stored by another?"
        )
    if cross_entropy_weight and temperature != 1.0:
        raise ValueError(
            f"a stored teacher at temperature {temperature} with cross_entropy_weight {cross_entropy_weight}: "
            "use temperature=1.0, or add the cross entropy by fused_linear_cross_entropy"
        )


def take_top_k(student_nB: Tensor, ids_nK: Tensor, first_column: int, v: int, raw_nK: Tensor) -> None:
    """Moves the student's products at the ids, as far as they lie in this tile, to `raw_nK`; minus infinity stays."""
    if student_nB.shape[1] == v:
        raw_nK.copy_(student_nB.gather(1, ids_nK))
        student_nB.scatter_(1, ids_nK, -torch.inf)
        return
    row, k, column = _inside(student_nB, ids_nK, first_column)
    raw_nK[row, k] = student_nB[row, column].to(raw_nK.dtype)
    student_nB[row, column] = -torch.inf


def merge_top_k(task: RowTask, spec: Divergence, state: Tensor, raw_nK: Tensor, teacher: TopKTeacher) -> Merged:
    """After STATISTICS of the other columns: the divergence goes to `state`, and what GRADIENT there needs."""
    temperature, weight = task.temperature, task.cross_entropy_weight
    rule = _at_ids(task.student, teacher.ids_NK)
    s_nK = logits_of(raw_nK, rule)
    max_n = torch.maximum(state[Row.STUDENT_MAX], s_nK.amax(-1))
    others_n, shifted_nK = state[Row.STUDENT_MAX] - max_n, s_nK - max_n.unsqueeze(-1)
    tail_n = others_n / temperature + state[Row.STUDENT_SUM_T].log()
    z = torch.cat([shifted_nK / temperature, tail_n.unsqueeze(-1)], -1)
    lse_n = z.logsumexp(-1)
    log_q = (z - lse_n.unsqueeze(-1)).clamp(min=LOG_ZERO)
    log_tail_n1 = teacher.tail_mass_N.double().log().to(state.dtype).unsqueeze(-1)
    log_p = torch.cat([teacher.log_probs_NK.to(state.dtype), log_tail_n1], -1).clamp(min=LOG_ZERO)
    q = log_q.exp()
    alpha = None if task.alpha_n is None else task.alpha_n.unsqueeze(-1)
    f, sum_g, h, r = terms(spec, log_p, log_q.clone(), q, alpha, torch.empty_like(q), torch.empty_like(q))
    g = gradient(q, h, r, sum_g.unsqueeze(-1)) / temperature
    state[Row.SUM_0] = f if teacher.offset_N is None else f + teacher.offset_N.to(f.dtype)
    # The kernel's q is the student's distribution within the tail.
    state[Row.SUM_1] = -temperature * (g[:, -1] + weight * q[:, -1])

    first_n1 = teacher.log_probs_NK.argmax(-1, keepdim=True)
    chosen_n = s_nK.gather(-1, first_n1).squeeze(-1)
    agreement_n = (chosen_n == s_nK.amax(-1)) & (chosen_n >= state[Row.STUDENT_MAX])
    gradient_nK, cross_entropy_n, target_gradient_n = g[:, :-1], None, None
    if task.targets_n is not None:
        is_target_nK = teacher.ids_NK == task.targets_n.unsqueeze(-1)
        stored_n = is_target_nK.any(-1)
        inside_n = torch.where(is_target_nK, s_nK, 0.0).sum(-1)
        at_target_n = torch.where(stored_n, inside_n, state[Row.AT_TARGET])
        lse_1_n = lse_n
        if temperature != 1.0:
            lse_1_n = torch.logaddexp(others_n + state[Row.STUDENT_SUM].log(), shifted_nK.logsumexp(-1))
        cross_entropy_n = lse_1_n - (at_target_n - max_n)
        if weight:
            gradient_nK = gradient_nK + weight * (q[:, :-1] - is_target_nK.to(q.dtype))
            slope_n = slope_of(at_target_n, task.student)
            target_gradient_n = torch.where(stored_n, torch.zeros_like(at_target_n), -weight * slope_n)
            if task.weights_n is not None:
                target_gradient_n = target_gradient_n * task.weights_n
    gradient_nK = gradient_nK * slope_of(s_nK, rule)
    if task.weights_n is not None:
        gradient_nK = gradient_nK * task.weights_n.unsqueeze(-1)
    return Merged(cross_entropy_n, agreement_n, gradient_nK, target_gradient_n)


def finish_gradient(out_nB: Tensor, task: RowTask, ids_nK: Tensor, v: int, merged: Merged) -> None:
    """Puts the gradients at the ids, and the targets' share, into the tile after its GRADIENT pass."""
    if out_nB.shape[1] == v:
        out_nB.scatter_(1, ids_nK, merged.gradient_nK.to(out_nB.dtype))
    else:
        row, k, column = _inside(out_nB, ids_nK, task.first_column)
        out_nB[row, column] = merged.gradient_nK[row, k].to(out_nB.dtype)
    if merged.target_gradient_n is not None:
        local_n = task.targets_n - task.first_column
        inside_n = (local_n >= 0) & (local_n < out_nB.shape[1])
        share_n = torch.where(inside_n, merged.target_gradient_n, 0.0).to(out_nB.dtype)
        out_nB.scatter_add_(1, local_n.clamp(0, out_nB.shape[1] - 1).unsqueeze(-1), share_n.unsqueeze(-1))


def _inside(tile_nB: Tensor, ids_nK: Tensor, first_column: int) -> tuple[Tensor, Tensor, Tensor]:
    local_nK = ids_nK - first_column
    row, k = ((local_nK >= 0) & (local_nK < tile_nB.shape[1])).nonzero(as_tuple=True)
    return row, k, local_nK[row, k]


def _at_ids(rule: LogitRule, ids_nK: Tensor) -> LogitRule:
    return rule if rule.bias_B is None else replace(rule, bias_B=rule.bias_B[ids_nK])
