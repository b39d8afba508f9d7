"""What a tile's elementwise kernels share: the task, the numbers kept for every row, and how values come out of them.

A tile is n rows (tokens) x B columns (vocabulary entries from `first_column` on). Each kernel (`rows_torch`,
`rows_cpp`, `rows_triton`) is a function of the form `RowKernel`, and makes up to three passes:

STATISTICS  running maximum and sum of exponentials of each model's logits, and the logits that metrics need
SUMS        with log p and log q known, the row sums of f (the divergence's terms) and G = df/d log q
GRADIENT    out = weight * [ (G - q sum G) / T + w_ce (q1 - onehot) ] * d logit / d product

Over a whole vocabulary one call makes all passes; where B < V, each pass is run over all column tiles before the next,
on logits that are projected anew. p is the teacher, q the student, at temperature T; q1 is the student at 1;
d = log q - log p. Logits are cap(scale * (product + bias)), floored at LOG_ZERO, so minus infinity is legal everywhere.

Two orders matter in fp32. log q is (logit - max) / T - log sum: with max + log sum taken first, the rounding of that
sum shifts a whole row (the same in a cross entropy). And G = q h + r becomes q (h - sum G) + r: near convergence h is
nearly its mean, and their difference has to be taken before the product. (A multiple of q in G changes nothing, hence
some freedom in h and r.)

| name | f | h | r |
| --- | --- | --- | --- |
| fkl | -p d | 0 | -p |
| rkl | q d | d | 0 |
| symmetric_kl | (q - p) d / 2 | d / 2 | -p / 2 |
| tvd | abs(q - p) / 2 | sgn(q - p) / 2 | 0 |
| skl | p u, u = log p/m, m = a p + (1-a) q | 0 | -p c, c = (1-a) q/m |
| srkl | q u, u = log q/m, m = a q + (1-a) p | u + c, c = (1-a) p/m | 0 |
| jsd | b p log p/m + (1-b) q log q/m, m = b p + (1-b) q | (1-b) log q/m | 0 |
| abkd | [a/(a+b) p^(a+b) + b/(a+b) q^(a+b) - p^a q^b] / (a b) | 0 | (q^(a+b) - p^a q^b) / a |
| akl | w fkl + (1-w) rkl, w = share of sum abs(p - q) that lies in the teacher's head | (1-w) d | -w p |
| taid | fkl with log p from the logits (1-a) student + a teacher, a constant | 0 | -p |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from typing import Protocol

import torch
from torch import Tensor

from toolkit.divergences.head import LOG_ZERO, Head
from toolkit.divergences.spec import Objective

#: What all kernels know. none: no teacher. top_k: f = G = 0, and sum G is already in the state.
COMPILED = ("none", "top_k", "fkl", "rkl", "symmetric_kl", "tvd", "skl", "srkl", "jsd", "abkd", "akl", "taid")
#: What `rows_torch` alone knows: a new divergence can be tried before it is written for the compiled kernels.
TORCH_ONLY: tuple[str, ...] = ()
#: The number by which kernels know a divergence.
CODES = {name: code for code, name in enumerate(COMPILED + TORCH_ONLY)}


class Passes(IntFlag):
    """Which passes a kernel makes in one call."""

    STATISTICS = 1
    SUMS = 2
    GRADIENT = 4


class Row(IntEnum):
    """Rows of the state [len(Row), n]: numbers kept per token. Maxima start at LOG_ZERO, everything else at 0."""

    STUDENT_MAX = 0  # of the student's logits
    STUDENT_SUM = 1  # sum exp(logit - max)
    STUDENT_SUM_T = 2  # sum exp((logit - max) / T)
    TEACHER_MAX = 3
    TEACHER_SUM_T = 4
    MIXED_MAX = 5  # of taid's interpolated logits
    MIXED_SUM_T = 6
    AT_TEACHER_CHOICE = 7  # the student's logit where the teacher's is largest
    AT_TARGET = 8  # the student's logit at the target
    SUM_0 = 9  # sum f; akl: sum -p d
    SUM_1 = 10  # sum G; akl: sum q d
    SUM_2 = 11  # akl: sum abs(p - q) in the teacher's head
    SUM_3 = 12  # akl: the same outside of it


@dataclass(frozen=True, kw_only=True)
class RowTask:
    """What is asked of a tile's rows. Tensors [n] have an entry for each row, in the computing dtype (targets: int64).

    student, teacher: the heads of the tile's columns, biases in the computing dtype. threshold_n: akl's; the teacher's
    head of its distribution is where its logit is at least this.
    """

    code: int
    objective: Objective
    student: Head
    teacher: Head | None
    alpha_n: Tensor | None
    weights_n: Tensor | None
    targets_n: Tensor | None  # in columns of the whole vocabulary
    threshold_n: Tensor | None
    first_column: int

    def rows(self, rows: slice) -> RowTask:
        """The task of some of the rows."""
        return replace(
            self, alpha_n=rows_of(self.alpha_n, rows), weights_n=rows_of(self.weights_n, rows),
            targets_n=rows_of(self.targets_n, rows), threshold_n=rows_of(self.threshold_n, rows),
        )  # fmt: skip


class RowKernel(Protocol):
    """Makes `passes` on the products of both models, [n, B], reads and writes `state`, [len(Row), n], and writes the
    gradient to `out_nB`, which may be the student's tile. teacher_nB: None without a teacher. out_nB: None without
    GRADIENT."""

    def __call__(
        self, task: RowTask, state: Tensor, *, student_nB: Tensor, teacher_nB: Tensor | None, out_nB: Tensor | None,
        passes: Passes,
    ) -> None: ...  # fmt: skip


def rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Some of the rows of a tensor of any shape, None of none."""
    return None if tensor is None else tensor[rows]


def new_state(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The state [len(Row), n] of rows of which nothing is known yet."""
    state = torch.zeros(len(Row), n, dtype=dtype, device=device)
    state[[Row.STUDENT_MAX, Row.TEACHER_MAX, Row.MIXED_MAX]] = LOG_ZERO
    return state


def sum_of_gradients(code: int, state: Tensor) -> tuple[Tensor, Tensor | None]:
    """(sum G [n], akl's weight of the forward KL [n]) of every row, after SUMS."""
    if code != CODES["akl"]:
        return state[Row.SUM_1], None
    w_n = forward_weight(state)
    return (1.0 - w_n) * state[Row.SUM_1] - w_n, w_n


def forward_weight(state: Tensor) -> Tensor:
    """akl's weight of the forward KL [n]; one half where p == q."""
    head_n, tail_n = state[Row.SUM_2], state[Row.SUM_3]
    total_n = head_n + tail_n
    return torch.where(total_n > 0, head_n / total_n.clamp(min=torch.finfo(state.dtype).tiny), 0.5)


def divergence_values(code: int, state: Tensor) -> Tensor:
    """The divergence of every row [n] in nats, after SUMS."""
    if code != CODES["akl"]:
        return state[Row.SUM_0]
    w_n = forward_weight(state)
    return w_n * state[Row.SUM_0] + (1.0 - w_n) * state[Row.SUM_1]


def cross_entropy_values(state: Tensor) -> Tensor:
    """-log q1(target) of every row [n] in nats, after STATISTICS."""
    return (state[Row.STUDENT_MAX] - state[Row.AT_TARGET]) + state[Row.STUDENT_SUM].log()


def agreements(state: Tensor) -> Tensor:
    """Whether the teacher's first choice is also the student's [n], after STATISTICS."""
    return state[Row.AT_TEACHER_CHOICE] == state[Row.STUDENT_MAX]
