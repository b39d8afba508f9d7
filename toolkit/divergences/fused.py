"""Projection and divergence in one operation: gradients are formed in forward, tile by tile, and memory stays within a
budget whatever the numbers of tokens and vocabulary entries are.

`formulas` is the readable twin; tests hold the two together. `tiles` goes over the tiles, `plan` says how large one is,
`products` has its matrix products, `rows` the mathematics of its elementwise work, which `rows_torch`, `rows_cpp` and
`rows_triton` do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.divergences.formulas import check_alpha, check_temperature
from toolkit.divergences.spec import Divergence
from toolkit.divergences.tiles import FusedLoss, Problem, Side, Tiles
from toolkit.divergences.top_k import TopKTeacher, check_top_k

SCALED_BYTES = 2**22  # of a gradient in the computing dtype at a time


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

    `memory_budget_mib` (by default 256 on a CPU, 3,072 on a GPU) bounds all buffers but the head gradient [V, S], rows
    of N numbers, and what the caller passed in; smaller is slower. The head gradient is fp32 where several tiles add to
    it, the head's own dtype where one tile holds all. `backend`: "triton" (GPU), "cpp" (CPU with a
    C++ compiler), "torch" (anywhere), or "auto", the fastest of these that can run here.

    Gradients reach student hidden, head and bias, each only if it requires grad; they are formed here, so the
    weights must be final, and backward only scales them by the incoming scalar. The heads are not kept for
    backward. Without grad mode the same values are computed and the gradient work is left out. N = 0 gives
    0, connected.

    Raises ValueError for shapes, token ids, weights' or alpha's shapes that do not fit, fp16, unequal vocabularies
    without `valid_vocab`, a cross-entropy weight without targets, a missing or double teacher, a budget too small for
    one token, and a backend that cannot run here. Source: skewed divergences of DistiLLM, arXiv 2402.03898; the others
    as in `formulas`.
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
    student = Side(student_head_VS, student_bias_V, student_logit_scale, student_soft_cap)
    teacher = None
    if teacher_top_k is None:
        teacher = Side(teacher_head_VT, teacher_bias_V, teacher_logit_scale, teacher_soft_cap)
    problem = Problem(
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
    problem = Problem(
        None, Side(head_VS, bias_V, logit_scale, soft_cap), None, None, None, _weights(weights_N, hidden_NS),
        _targets(targets_N, len(hidden_NS), v_valid), 1.0, 1.0, v_valid, 0.0, memory_budget_mib, backend,
    )  # fmt: skip
    return _solve(hidden_NS, head_VS, bias_V, problem)


def _solve(hidden_NS: Tensor, head_VS: Tensor, bias_V: Tensor | None, problem: Problem) -> FusedLoss:
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
    """total * factor in `dtype`, in one pass; none for a factor of 1 on a CPU, where reading it costs nothing."""
    if total.dtype == dtype and factor.device.type == "cpu" and factor == 1:
        return total
    scaled = total.new_empty(total.shape, dtype=dtype)
    rows = len(total)
    if total.device.type == "cpu":  # where the product is whole in the wider dtype before it is rounded
        rows = max(1, SCALED_BYTES // (max(1, total[:1].numel()) * total.itemsize))
    for wide, narrow in zip(total.split(max(1, rows)), scaled.split(max(1, rows)), strict=True):
        torch.mul(wide, factor, out=narrow)
    return scaled


def _run_tiles(hidden_NS: Tensor, problem: Problem, wanted: tuple[bool, bool, bool]):
    """The whole operation: `FusedLoss` and the gradients of hidden, head and bias (None where not wanted)."""
    hidden_NS = hidden_NS.detach()
    with torch.autocast(hidden_NS.device.type, enabled=False):
        return Tiles(hidden_NS, problem, wanted).run()


def _check_side(name: str, hidden_NH: Tensor, head_VH: Tensor, bias_V: Tensor | None) -> None:
    if hidden_NH.dim() != 2 or head_VH.dim() != 2 or hidden_NH.shape[1] != head_VH.shape[1]:
        raise ValueError(
            f"the {name}'s hidden states are {tuple(hidden_NH.shape)}, its head {tuple(head_VH.shape)}: pass "
            "[tokens, hidden] and [vocabulary, hidden]; under ZeRO-3 gather the head first"
        )
    if torch.float16 in (hidden_NH.dtype, head_VH.dtype):
        raise ValueError(
            f"the {name}'s hidden states are {hidden_NH.dtype}, its head {head_VH.dtype}: in fp16 the gradients of "
            "tokens with small weights underflow; use bf16 or fp32"
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
