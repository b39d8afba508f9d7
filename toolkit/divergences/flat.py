"""The fused operations' former form, which goes on working: every tensor and every number of a head is an argument.

    fused_linear_divergence(spec, student_hidden_NS, student_head_VS, teacher_hidden_NT, teacher_head_VT, ...)
    fused_linear_cross_entropy(hidden_NS, head_VS, targets_N, ...)

The functions here turn its arguments into those of today's form. New code has no reason to use it.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from toolkit.divergences.head import Head, Hidden
from toolkit.divergences.spec import Divergence, Objective
from toolkit.divergences.top_k import TopKTeacher

P = ParamSpec("P")
R = TypeVar("R")


def or_flat(converted: Callable[..., dict[str, Any]]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: a call whose first argument is a `Divergence` or a tensor, by position or by its former name, is
    flat, and gets its arguments from `converted`."""

    def decorate(operation: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(operation)
        def call(*args: P.args, **named: P.kwargs) -> R:
            first = args[0] if args else named.get("spec", named.get("hidden_NS"))
            is_flat = isinstance(first, Divergence | Tensor)
            if not is_flat:
                return operation(*args, **named)
            return operation(**converted(*args, **named))  # type: ignore[call-arg]  # flat arguments are not in P

        return call

    return decorate


def divergence(
    spec: Divergence, student_hidden_NS: Tensor, student_head_VS: Tensor, teacher_hidden_NT: Tensor | None = None,
    teacher_head_VT: Tensor | None = None, *, teacher_top_k: TopKTeacher | None = None,
    cross_entropy_weight: float = 0.0, temperature: float = 1.0, student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None, student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0,
    student_soft_cap: float | None = None, teacher_soft_cap: float | None = None, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `fused_linear_divergence`. Raises ValueError unless there is one teacher."""
    if (teacher_top_k is None) == (teacher_hidden_NT is None or teacher_head_VT is None):
        raise ValueError("the teacher must be given once: by teacher_hidden_NT and teacher_head_VT, or teacher_top_k")
    student = _hidden(student_hidden_NS, student_head_VS, student_bias_V, student_logit_scale, student_soft_cap)
    live = _hidden(teacher_hidden_NT, teacher_head_VT, teacher_bias_V, teacher_logit_scale, teacher_soft_cap)
    objective = Objective(spec, cross_entropy_weight=cross_entropy_weight, temperature=temperature)
    return {"objective": objective, "student": student, "teacher": teacher_top_k or live, **others}


def cross_entropy(
    hidden_NS: Tensor, head_VS: Tensor, targets_N: Tensor, *, bias_V: Tensor | None = None, logit_scale: float = 1.0,
    soft_cap: float | None = None, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `fused_linear_cross_entropy`."""
    student = _hidden(hidden_NS, head_VS, bias_V, logit_scale, soft_cap)
    return {"student": student, "targets_N": targets_N, **others}


def _hidden(states_NH: Any, weight_VH: Any, bias_V: Tensor | None, scale: float, cap: float | None) -> Hidden:
    return Hidden(states_NH, Head(weight_VH, bias_V=bias_V, scale=scale, cap=cap))
