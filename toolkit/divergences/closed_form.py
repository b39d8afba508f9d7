"""Values and closed-form gradients of a block of rows, in four buffers and without autograd; `formulas` is
the twin.

Legend: r rows. Buffers without a suffix are [r, V]. p is the teacher, q the student.
"""

import math

import torch
from torch import Tensor

from toolkit.divergences.formulas import log_mix
from toolkit.divergences.spec import Divergence

#: Below this alpha the ratio own / m is taken from logaddexp, which is slower and exact down to alpha = 0.
SMALL_ALPHA = 1e-6


def divergence_rows(spec: Divergence, log_p: Tensor, log_q: Tensor, x: Tensor, y: Tensor, alpha) -> Tensor:
    """Values [r]; leaves the gradient with respect to the student's logits in `log_q`. All four buffers
    are used up.

    d = log q - log p. For a mixture m = a own + (1-a) other, c = a own / m = sigmoid(-(d' + log((1-a)/a)))
    with d' = log other - log own, and u = log(own / m) = log c - log a.
    """
    p, q = log_p, log_q  # names of the buffers once they hold probabilities
    match spec.name:
        case "skl" if _is_zero(alpha):
            return divergence_rows(Divergence("fkl"), log_p, log_q, x, y, alpha)
        case "srkl" if _is_zero(alpha):
            return divergence_rows(Divergence("rkl"), log_p, log_q, x, y, alpha)
        case "fkl":  # sum p (-d); q - p
            torch.sub(log_p, log_q, out=x)
            value_r = x.mul_(p.exp_()).sum(-1)
            q.exp_().sub_(p)
        case "rkl":  # L = sum q d; q (d - L)
            torch.sub(log_q, log_p, out=x)
            value_r = torch.mul(x, q.exp_(), out=y).sum(-1)
            q.mul_(x.sub_(value_r.unsqueeze(-1)))
        case "symmetric_kl":
            torch.sub(log_q, log_p, out=x)
            forward_r = -torch.mul(x, p.exp_(), out=y).sum(-1)
            reverse_r = torch.mul(x, q.exp_(), out=y).sum(-1)
            q.mul_(x.sub_(reverse_r.unsqueeze(-1) - 1.0)).sub_(p).mul_(0.5)
            value_r = 0.5 * (forward_r + reverse_r)
        case "tvd":  # q/2 (sgn d - sum q sgn d)
            torch.sub(q.exp_(), p.exp_(), out=x)
            value_r = 0.5 * torch.abs(x, out=y).sum(-1)
            mean_r = torch.mul(q, x.sign_(), out=y).sum(-1, keepdim=True)
            q.mul_(x.sub_(mean_r)).mul_(0.5)
        case "skl":  # sum p u; q (1 - C) - p (1 - c), C = sum p c
            _mixture(torch.sub(log_q, log_p, out=x), alpha, y)
            p.exp_()
            value_r = y.mul_(p).sum(-1)
            rest_r = 1.0 - x.mul_(p).sum(-1, keepdim=True)
            q.exp_().mul_(rest_r).sub_(p).add_(x)
        case "srkl":  # sum q u; q [(u - c) - sum q (u - c)]
            _mixture(torch.sub(log_p, log_q, out=x), alpha, y)
            value_r = torch.mul(y, q.exp_(), out=p).sum(-1)
            mean_r = torch.mul(y.sub_(x), q, out=p).sum(-1, keepdim=True)
            q.mul_(y.sub_(mean_r))
        case "jsd":  # b sum p u_p + (1-b) K, K = sum q u_q; (1-b) q (u_q - K)
            beta = spec.beta
            _mixture(torch.sub(log_q, log_p, out=x), beta, y)
            teacher_r = y.mul_(torch.exp(log_p, out=x)).sum(-1)
            _mixture(torch.sub(log_p, log_q, out=x), 1.0 - beta, y)
            student_r = torch.mul(y, q.exp_(), out=p).sum(-1)
            value_r = beta * teacher_r + (1.0 - beta) * student_r
            q.mul_(y.sub_(student_r.unsqueeze(-1))).mul_(1.0 - beta)
        case _:
            raise AssertionError(spec.name)
    return value_r


def _mixture(d: Tensor, alpha, u: Tensor) -> None:
    """d = log other - log own becomes c = a own / m, and u becomes log(own / m)."""
    if isinstance(alpha, Tensor) or alpha < SMALL_ALPHA:
        alpha = torch.as_tensor(alpha, dtype=torch.float64, device=d.device)
        torch.neg(log_mix(alpha, d), out=u)
        d.add_(torch.logit(alpha).neg().to(d.dtype)).neg_().sigmoid_()
        return
    d.neg_().add_(math.log(alpha) - math.log1p(-alpha)).sigmoid_()
    # Where c underflows, own < e^-80 and its share of every sum is nil; the floor only keeps 0 * log 0
    # from NaN.
    torch.clamp(d, min=torch.finfo(d.dtype).tiny, out=u).log_().sub_(math.log(alpha))


def _is_zero(alpha) -> bool:
    return isinstance(alpha, float | int) and alpha == 0.0
