"""Divergences between two next-token distributions: readable, exact, differentiated by autograd.

Legend: N tokens, V vocabulary. p is the teacher, q the student, log_p_NV and log_q_NV their
log-probabilities. Every value is in nats per token, includes the teacher's entropy (so it is 0 where p ==
q), and is formed in log space: `fused` computes the same numbers without anything of size [N, V].
"""

import math

import torch
from torch import Tensor

from toolkit.divergences.spec import SKEWED, Divergence

#: Stands for log 0. Finite, so that 0 * log 0 is 0 and a difference of two of them is 0, in values and in
#: gradients.
LOG_ZERO = -1e30


def token_divergence(
    spec: Divergence,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    temperature: float = 1.0,
    alpha_N: Tensor | None = None,
) -> Tensor:
    """The divergence of every token [N], in nats; differentiable in the student's logits, constant in the
    teacher's.

    Works in fp32, or float64 if either input is. Logits may hold minus infinity (not a whole row of it).
    Where a divergence is infinite (fkl with q = 0 < p, rkl with p = 0 < q) the value is finite and of the
    order 1e30, so that a weight of 0 still removes it. `alpha_N` replaces `spec.alpha` token by token.
    Logits are divided by `temperature`; no factor T^2 is applied.

    Raises ValueError for a temperature that is not positive, shapes that differ, or an unfit `alpha_N`.
    """
    check_temperature(temperature)
    if student_logits_NV.shape != teacher_logits_NV.shape:
        raise ValueError(
            f"student logits are {tuple(student_logits_NV.shape)}, "
            f"teacher logits {tuple(teacher_logits_NV.shape)}: "
            "cut both to the tokenizer's real vocabulary and to the same tokens"
        )
    dtype = compute_dtype(student_logits_NV, teacher_logits_NV)
    log_q_NV = log_probabilities(student_logits_NV.to(dtype) / temperature)
    log_p_NV = log_probabilities(teacher_logits_NV.detach().to(dtype) / temperature)
    alpha = check_alpha(spec, alpha_N, len(log_q_NV))
    match spec.name:
        case "fkl":
            return forward_kl(log_p_NV, log_q_NV)
        case "rkl":
            return forward_kl(log_q_NV, log_p_NV)
        case "symmetric_kl":
            return symmetric_kl(log_p_NV, log_q_NV)
        case "jsd":
            return jensen_shannon(log_p_NV, log_q_NV, spec.beta)
        case "tvd":
            return total_variation(log_p_NV, log_q_NV)
        case "skl":
            return skewed_kl(log_p_NV, log_q_NV, alpha)
        case "srkl":
            return skewed_kl(log_q_NV, log_p_NV, alpha)
    raise AssertionError(spec.name)


def token_cross_entropy(student_logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log q(target) per token [N], in nats, at temperature 1; fp32, or float64 if the logits are."""
    log_q_NV = log_probabilities(student_logits_NV.to(compute_dtype(student_logits_NV)))
    return -log_q_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)


def forward_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p, q) = sum p (log p - log q); with the arguments exchanged, reverse KL. Hinton et al., arXiv
    1503.02531."""
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def symmetric_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """0.5 KL(p, q) + 0.5 KL(q, p) = 0.5 sum (p - q)(log p - log q)."""
    return 0.5 * ((log_p_NV.exp() - log_q_NV.exp()) * (log_p_NV - log_q_NV)).sum(-1)


def skewed_kl(log_p_NV: Tensor, log_q_NV: Tensor, alpha: float | Tensor) -> Tensor:
    """KL(p, a p + (1-a) q) = -sum p log(a + (1-a) e^d), d = log q - log p; exchanged, skewed reverse KL.

    Between 0 and -log a. DistiLLM, arXiv 2402.03898.
    """
    log_ratio_NV = log_mix(alpha, log_q_NV - log_p_NV)
    return -(log_p_NV.exp() * log_ratio_NV).sum(-1)


def jensen_shannon(log_p_NV: Tensor, log_q_NV: Tensor, beta: float) -> Tensor:
    """b KL(p, m) + (1-b) KL(q, m), m = b p + (1-b) q. GKD, arXiv 2306.13649."""
    of_teacher_N = skewed_kl(log_p_NV, log_q_NV, beta)
    of_student_N = skewed_kl(log_q_NV, log_p_NV, 1.0 - beta)
    return beta * of_teacher_N + (1.0 - beta) * of_student_N


def total_variation(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """0.5 sum |p - q|, between 0 and 1. f-distill, arXiv 2307.15190."""
    return 0.5 * (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1)


def log_mix(alpha: float | Tensor, d_NV: Tensor) -> Tensor:
    """log(a + (1-a) e^d), exact at a = 0 (d), at d = 0 (0) and for any size of d."""
    alpha = torch.as_tensor(alpha, dtype=d_NV.dtype, device=d_NV.device)
    return torch.logaddexp(alpha.log(), (-alpha).log1p() + d_NV)


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """Log-softmax with `LOG_ZERO` in place of minus infinity."""
    return logits_NV.log_softmax(-1).clamp(min=LOG_ZERO)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}, but must be positive and finite; 1.0 leaves logits as they are"
        )


def check_alpha(spec: Divergence, alpha_N: Tensor | None, n_tokens: int) -> float | Tensor:
    """`spec.alpha`, or `alpha_N` as a column [N, 1] in float64 after checking it."""
    if alpha_N is None:
        return spec.alpha
    if spec.name not in SKEWED:
        raise ValueError(f"alpha_N was given, but {spec.name!r} has no alpha; use one of {', '.join(SKEWED)}")
    if alpha_N.shape != (n_tokens,):
        raise ValueError(f"alpha_N has shape {tuple(alpha_N.shape)}, but there are {n_tokens} tokens: give one each")
    if n_tokens and not ((alpha_N >= 0) & (alpha_N < 1)).all():
        low, high = alpha_N.min().item(), alpha_N.max().item()
        raise ValueError(f"alpha_N spans [{low}, {high}], but must lie in [0, 1): clamp it before the loss")
    return alpha_N.detach().double().unsqueeze(-1)
