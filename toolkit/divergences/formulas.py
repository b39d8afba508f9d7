"""Divergences between two next-token distributions: readable, exact, differentiated by autograd.

Legend: N tokens, V vocabulary. p is the teacher, q the student, log_p_NV and log_q_NV their
log-probabilities. Every value is in nats per token, includes the teacher's entropy (so it is 0 where p ==
q), and is formed in log space: `fused` computes the same numbers without anything of size [N, V].
"""

import torch
from torch import Tensor

from toolkit.divergences.head import LOG_ZERO
from toolkit.divergences.spec import WITH_ALPHA, Divergence, check_temperature

#: The least alpha that `sequence_alpha` chooses.
LEAST_ALPHA = 0.01


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
    # What was given has to fit together, and is brought to one dtype and temperature.
    check_temperature(temperature)
    if student_logits_NV.shape != teacher_logits_NV.shape:
        raise ValueError(
            f"student logits are {tuple(student_logits_NV.shape)}, teacher logits {tuple(teacher_logits_NV.shape)}: "
            "cut both to the tokenizer's real vocabulary and to the same tokens"
        )
    dtype = compute_dtype(student_logits_NV, teacher_logits_NV)
    student_logits_NV = student_logits_NV.to(dtype) / temperature
    teacher_logits_NV = teacher_logits_NV.detach().to(dtype) / temperature
    alpha = check_alpha(spec, alpha_N, len(student_logits_NV))

    # taid's target takes the teacher's place; the rest is a formula of both log-probabilities.
    if spec.name == "taid":
        teacher_logits_NV = interpolated_logits(student_logits_NV.detach(), teacher_logits_NV, alpha)
    log_q_NV, log_p_NV = log_probabilities(student_logits_NV), log_probabilities(teacher_logits_NV)
    match spec.name:
        case "fkl" | "taid":
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
        case "abkd":
            return alpha_beta(log_p_NV, log_q_NV, spec.alpha, spec.beta)
        case "akl":
            return adaptive_kl(log_p_NV, log_q_NV, spec.head_mass)
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


def alpha_beta(log_p_NV: Tensor, log_q_NV: Tensor, alpha: float, beta: float) -> Tensor:
    """[a/(a+b) sum p^(a+b) + b/(a+b) sum q^(a+b) - sum p^a q^b] / (a b); (1, 0) is the forward, (0, 1) the reverse KL.

    ABKD, arXiv 2505.04560.
    """
    total = alpha + beta
    cross_NV = (alpha * log_p_NV + beta * log_q_NV).exp()
    own_NV = alpha / total * (total * log_p_NV).exp() + beta / total * (total * log_q_NV).exp()
    return (own_NV - cross_NV).sum(-1) / (alpha * beta)


def adaptive_kl(log_p_NV: Tensor, log_q_NV: Tensor, head_mass: float) -> Tensor:
    """w KL(p, q) + (1-w) KL(q, p), w = share of sum |p - q| that lies in the teacher's head; w is a constant.

    The head is the most probable tokens that together hold at most `head_mass`, and always the first (with all that tie
    with its last). AKL, arXiv 2404.02657.
    """
    error_NV = (log_p_NV.exp() - log_q_NV.exp()).detach().abs()
    in_head_NV = log_p_NV >= head_threshold(log_p_NV, head_mass).unsqueeze(-1)
    head_N, total_N = (error_NV * in_head_NV).sum(-1), error_NV.sum(-1)
    w_N = torch.where(total_N > 0, head_N / total_N.clamp(min=1e-30), 0.5)
    return w_N * forward_kl(log_p_NV, log_q_NV) + (1.0 - w_N) * forward_kl(log_q_NV, log_p_NV)


def head_threshold(logits_NV: Tensor, head_mass: float, temperature: float = 1.0) -> Tensor:
    """What the logits (or log-probabilities) of the head exceed [N]; the head is the most probable tokens that together
    hold at most `head_mass`, and always the first. Halfway to the next token, so that rounding does not matter."""
    descending_NV = logits_NV.sort(-1, descending=True).values
    size_N1 = ((descending_NV / temperature).softmax(-1).cumsum(-1) <= head_mass).sum(-1, keepdim=True).clamp(min=1)
    last_N1 = descending_NV.gather(-1, size_N1 - 1)
    next_N1 = descending_NV.gather(-1, size_N1.clamp(max=descending_NV.shape[-1] - 1))
    return (0.5 * (last_N1 + next_N1)).squeeze(-1)


def interpolated_logits(student_logits_NV: Tensor, teacher_logits_NV: Tensor, alpha: float | Tensor) -> Tensor:
    """(1-a) student + a teacher, minus infinity where the teacher's is. TAID, arXiv 2501.16937."""
    floor_NV = student_logits_NV.clamp(min=LOG_ZERO)
    alpha = torch.as_tensor(alpha, dtype=floor_NV.dtype, device=floor_NV.device)
    return (1.0 - alpha) * floor_NV + alpha * teacher_logits_NV.clamp(min=LOG_ZERO)


def log_mix(alpha: float | Tensor, d_NV: Tensor) -> Tensor:
    """log(a + (1-a) e^d), exact at a = 0 (d), at d = 0 (0) and for any size of d."""
    alpha = torch.as_tensor(alpha, dtype=d_NV.dtype, device=d_NV.device)
    return torch.logaddexp(alpha.log(), (-alpha).log1p() + d_NV)


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """Log-softmax with `LOG_ZERO` in place of minus infinity."""
    return logits_NV.log_softmax(-1).clamp(min=LOG_ZERO)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What softmax and row sums are computed in: float64 where one of the tensors is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def sequence_alpha(spec: Divergence, log_p_B: Tensor, log_q_B: Tensor) -> Tensor:
    """DistiLLM-2's alpha of each sequence [B], from both models' mean log-probabilities [B] of its targets.

    Near q, log p - log((1 - a) q + a p) is about (1 - a) (p - q). It is held at its mean over the B sequences, where
    alpha is a0 = spec.alpha: a = 1 - (1 - a0) mean(p - q) / (p - q), clipped to [0.01, a0]. p and q are the geometric
    means per token; for srkl they change places. Source: arXiv 2503.07067.
    """
    gap_B = log_p_B.exp() - log_q_B.exp()
    if spec.name == "srkl":
        gap_B = -gap_B
    alpha_B = 1 - (1 - spec.alpha) * gap_B.mean() / (gap_B + 1e-5)
    # A model that is not finite makes a loss that is not, and the step is skipped; an alpha has to be one all the same.
    return alpha_B.nan_to_num(nan=spec.alpha).clamp(LEAST_ALPHA, spec.alpha)


def check_alpha(spec: Divergence, alpha_N: Tensor | None, n_tokens: int) -> float | Tensor:
    """`spec.alpha`, or `alpha_N` as a column [N, 1] in float64 after checking it."""
    if alpha_N is None:
        return spec.alpha
    if spec.name not in WITH_ALPHA:
        raise ValueError(f"alpha_N was given, but {spec.name!r} has no alpha per token: use {', '.join(WITH_ALPHA)}")
    if alpha_N.shape != (n_tokens,):
        raise ValueError(f"alpha_N has shape {tuple(alpha_N.shape)}, but there are {n_tokens} tokens: give one each")
    legal_N = (alpha_N > 0) & (alpha_N <= 1) if spec.name == "taid" else (alpha_N >= 0) & (alpha_N < 1)
    if n_tokens and not legal_N.all():
        low, high = alpha_N.min().item(), alpha_N.max().item()
        span = "(0, 1]" if spec.name == "taid" else "[0, 1)"
        raise ValueError(f"alpha_N spans [{low}, {high}], but must lie in {span}: clamp it before the loss")
    return alpha_N.detach().double().unsqueeze(-1)
