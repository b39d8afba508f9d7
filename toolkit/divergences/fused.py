"""Projection and divergence in one operation: gradients are formed in forward, tile by tile, and memory stays within a
budget whatever the numbers of tokens and vocabulary entries are.

`formulas` is the readable twin; tests hold the two together. `tiles` goes over the tiles, `plan` says how large one is,
`products` has its matrix products, `kernels.rows` the mathematics of its elementwise work, which `rows_torch`,
`rows_cpp` and `rows_triton` do. `flat` has the operations' former form.

Legend: N tokens, B sequences, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from toolkit.divergences import flat
from toolkit.divergences.formulas import check_alpha, sequence_alpha
from toolkit.divergences.head import Hidden
from toolkit.divergences.spec import CROSS_ENTROPY, Divergence, Objective
from toolkit.divergences.tiles import FusedLoss, Gradients, Tiles, Wanted
from toolkit.divergences.top_k import TopKTeacher

SCALED_BYTES = 2**22  # of a gradient in the computing dtype at a time


@flat.or_flat(flat.divergence)
def fused_linear_divergence(
    objective: Objective,
    *,
    student: Hidden,
    teacher: Hidden | TopKTeacher | None = None,
    targets_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    alpha_N: Tensor | None = None,
    sequence_lengths_B: Tensor | None = None,
    valid_vocab: int | None = None,
    memory_budget_mib: float | None = None,
    backend: str = "auto",
) -> FusedLoss:
    """Weighted sum over tokens of what `objective` says, from hidden states, with its gradients.

    student: hidden states [N, S] and the head that makes logits of them. teacher: the same with its own size T, or its
    stored top k (for fkl, rkl, skl and srkl); None where the objective is a cross entropy alone. It is constant.
    targets_N: token ids, which the cross entropy needs. weights_N: a factor for each token, 1 by default.
    alpha_N replaces the divergence's alpha token by token (skl, srkl, taid). With `objective.alpha_per_sequence` it is
    chosen here: tokens are those of B sequences one after the other, of `sequence_lengths_B` [B] tokens each.
    valid_vocab: columns from there on are minus infinity on both sides, so that the heads may be padded to different
    sizes.

    `memory_budget_mib` (by default 256 on a CPU, 3,072 on a GPU) bounds all buffers but the head gradient [V, S], rows
    of N numbers, and what the caller passed in; smaller is slower. The head gradient is fp32 where several tiles add to
    it, the head's own dtype where one tile holds all. `backend`: "triton" (GPU), "cpp" (CPU with a
    C++ compiler), "torch" (anywhere), or "auto", the fastest of these that can run here.

    Gradients reach the student's hidden states, weight and bias, each only if it requires grad; they are formed here,
    so the weights must be final, and backward only scales them by the incoming scalar. The heads are not kept for
    backward. Without grad mode the same values are computed and the gradient work is left out. N = 0 gives 0,
    connected.

    Raises ValueError for shapes, token ids, weights' or alpha's shapes that do not fit, fp16, unequal vocabularies
    without `valid_vocab`, a cross-entropy weight without targets, a divergence without a teacher or the reverse, a
    budget too small for one token, and a backend that cannot run here. Source: skewed divergences of DistiLLM, arXiv
    2402.03898; the others as in `formulas`.
    """
    # What was given has to fit together.
    n_tokens, v = _checked_sizes(objective, student, teacher, valid_vocab)
    targets_N = _targets(targets_N, n_tokens, v)
    if (weight := objective.cross_entropy_weight) and targets_N is None:
        raise ValueError(f"cross_entropy_weight is {weight}, but targets_N is None: pass the target ids")
    if weights_N is not None and weights_N.shape != (n_tokens,):
        raise ValueError(f"weights_N is {tuple(weights_N.shape)}, but there are {n_tokens} tokens: give one each")

    # The divergence's alpha: one for all tokens, each token's own, or chosen here for each sequence.
    if objective.alpha_per_sequence:
        alpha_N = _alpha_per_sequence(
            objective, student, teacher, targets_N, sequence_lengths_B, valid_vocab=v,
            memory_budget_mib=memory_budget_mib, backend=backend,
        )  # fmt: skip
    alpha: float | Tensor = 0.0
    if objective.divergence is None:
        if alpha_N is not None:
            raise ValueError("alpha_N was given, but the objective has no divergence: leave it out, or name one")
    else:
        alpha = check_alpha(objective.divergence, alpha_N, n_tokens)
        if alpha_N is None:
            objective = replace(objective, divergence=_plain(objective.divergence))

    # The work itself, inside of autograd where a gradient is asked for.
    head = student.head
    parameters = (student.states_NH, head.weight_VH, head.bias_V)
    grad = torch.is_grad_enabled()
    wanted = Wanted(*(grad and x is not None and x.requires_grad for x in parameters))

    def work() -> tuple[FusedLoss, Gradients]:
        with torch.no_grad(), torch.autocast(student.states_NH.device.type, enabled=False):
            return Tiles(
                objective, student=student, teacher=teacher, targets_N=targets_N, weights_N=weights_N, alpha=alpha,
                valid_vocab=v, wanted=wanted, budget_mib=memory_budget_mib, backend=backend,
            ).run()  # fmt: skip

    return FusedLoss(*_GradientsInForward.apply(*parameters, work)) if any(wanted) else work()[0]


@flat.or_flat(flat.cross_entropy)
def fused_linear_cross_entropy(
    *,
    student: Hidden,
    targets_N: Tensor,
    weights_N: Tensor | None = None,
    valid_vocab: int | None = None,
    memory_budget_mib: float | None = None,
    backend: str = "auto",
) -> FusedLoss:
    """Weighted sum over tokens of the cross entropy, in nats: `fused_linear_divergence` without a teacher, same
    arguments."""
    return fused_linear_divergence(
        CROSS_ENTROPY, student=student, targets_N=targets_N, weights_N=weights_N, valid_vocab=valid_vocab,
        memory_budget_mib=memory_budget_mib, backend=backend,
    )  # fmt: skip


class _GradientsInForward(torch.autograd.Function):
    """Does the whole work in forward and keeps the gradients, which backward scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NS: Tensor, weight_VS: Tensor, bias_V: Tensor | None,
        work: Callable[[], tuple[FusedLoss, Gradients]],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        result, gradients = work()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*result[1:])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x if x is None else x.dtype for x in (hidden_NS, weight_VS, bias_V)]
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if total is None else _scaled(total, grad_loss, dtype) for total, dtype in pairs), None


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor in `dtype`, in one pass; none for a factor of 1 on a CPU, where reading it costs nothing."""
    if total.dtype == dtype and factor.device.type == "cpu" and factor == 1:
        return total
    scaled = total.new_empty(total.shape, dtype=dtype)
    rows = len(total)
    if total.device.type == "cpu":  # where the product is whole in the wider dtype before it is rounded
        rows = SCALED_BYTES // (max(1, total[:1].numel()) * total.itemsize)
    for wide, narrow in zip(total.split(max(1, rows)), scaled.split(max(1, rows)), strict=True):
        torch.mul(wide, factor, out=narrow)
    return scaled


def _checked_sizes(
    objective: Objective, student: Hidden, teacher: Hidden | TopKTeacher | None, valid_vocab: int | None
) -> tuple[int, int]:
    """(tokens, vocabulary entries that count) of models that fit each other and the objective."""
    # There is a teacher exactly where there is a divergence.
    student.check("student")
    n_tokens, heads = len(student.states_NH), [len(student.head.weight_VH)]
    if (objective.divergence is None) != (teacher is None):
        asked = "no divergence" if objective.divergence is None else f"the divergence {objective.divergence.name!r}"
        given = "no teacher was" if teacher is None else "a teacher was"
        raise ValueError(
            f"the objective has {asked}, but {given} given: pass teacher=Hidden(states, head) or a TopKTeacher exactly "
            "where there is a divergence"
        )

    # A teacher that is asked now has said something of the same tokens, over the same vocabulary.
    if isinstance(teacher, Hidden):
        teacher.check("teacher")
        heads.append(len(teacher.head.weight_VH))
        if len(teacher.states_NH) != n_tokens:
            raise ValueError(
                f"student hidden states hold {n_tokens} tokens, the teacher's {len(teacher.states_NH)}: pass the same "
                "response positions to both"
            )
        if valid_vocab is None and heads[0] != heads[1]:
            raise ValueError(
                f"the student's head has {heads[0]} rows, the teacher's {heads[1]}: pass valid_vocab, "
                "the size of the tokenizer's real vocabulary, so that padding is cut on both sides"
            )

    # Head rows from there on are padding.
    v = min(heads) if valid_vocab is None else valid_vocab
    if not 1 <= v <= min(heads):
        raise ValueError(
            f"valid_vocab is {v}, but the heads have {', '.join(map(str, heads))} rows: "
            "it must lie between 1 and the smallest; pass the tokenizer's len()"
        )
    if isinstance(teacher, TopKTeacher):
        teacher.check(objective, n_tokens, v)
    return n_tokens, v


def _targets(targets_N: Tensor | None, n_tokens: int, v: int) -> Tensor | None:
    """The targets as int64, after a check of their shape and ids."""
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


def _plain(spec: Divergence) -> Divergence:
    """The same divergence by its plain name where alpha is 0: that costs less."""
    plain = {"skl": "fkl", "srkl": "rkl"}.get(spec.name)
    return spec if plain is None or spec.alpha != 0.0 else replace(spec, name=plain)


def _alpha_per_sequence(
    objective: Objective, student: Hidden, teacher: Hidden | TopKTeacher | None, targets_N: Tensor | None,
    lengths_B: Tensor | None, **options: Any,
) -> Tensor:  # fmt: skip
    """alpha_N by `sequence_alpha`; `options` are those of `fused_linear_cross_entropy`."""
    assert objective.divergence is not None
    if not isinstance(teacher, Hidden) or targets_N is None or lengths_B is None:
        raise ValueError(
            "objective.alpha_per_sequence needs the teacher's hidden states, targets_N and sequence_lengths_B, but "
            f"teacher is a {type(teacher).__name__}, targets_N {_shape(targets_N)}, sequence_lengths_B "
            f"{_shape(lengths_B)}: pass them all, or set it to False"
        )
    if lengths_B.sum() != len(targets_N):
        raise ValueError(
            f"sequence_lengths_B add up to {int(lengths_B.sum())}, but there are {len(targets_N)} tokens: give the "
            "number of tokens of each sequence"
        )
    log_q_B, log_p_B = (mean_log_probs(hidden, targets_N, lengths_B, **options) for hidden in (student, teacher))
    return sequence_alpha(objective.divergence, log_p_B, log_q_B).repeat_interleave(lengths_B)


def _shape(tensor: Tensor | None) -> str:
    return "None" if tensor is None else str(tuple(tensor.shape))


@torch.no_grad()
def mean_log_probs(hidden: Hidden, targets_N: Tensor, lengths_B: Tensor, **options: Any) -> Tensor:
    """[B] mean log-probability in nats that a model gives to the targets of each sequence, of `lengths_B` tokens each.
    `options` are those of `fused_linear_cross_entropy`."""
    nats_N = fused_linear_cross_entropy(student=hidden, targets_N=targets_N, **options).cross_entropy_N
    sequences_N = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)
    return -nats_N.new_zeros(len(lengths_B)).index_add_(0, sequences_N, nats_N) / lengths_B.clamp(min=1)
