"""The arithmetic of benchmarks/methods_study.py and alpha_study.py: readings between validations, coefficients."""

import pytest
import torch

from benchmarks.alpha_study import coefficients
from benchmarks.methods_study import time_to, value_at
from toolkit.divergences import Divergence
from toolkit.divergences.formulas import token_divergence

CURVE = [(0.0, 4.0), (10.0, 2.0), (20.0, 3.0), (30.0, 1.0)]


def test_value_at_a_time():
    found = [value_at(CURVE, seconds) for seconds in (0.0, 5.0, 10.0, 17.5, 30.0, 31.0)]
    assert found == [4.0, 3.0, 2.0, 2.75, 1.0, None]


def test_first_time_at_a_value():
    assert [time_to(CURVE, kl) for kl in (5.0, 3.0, 2.5, 1.5, 1.0, 0.9)] == [0.0, 5.0, 7.5, 27.5, 30.0, None]


@pytest.mark.parametrize("divergence", ["skl", "srkl"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9])
def test_coefficients_are_the_derivative_by_the_probability(divergence, alpha):
    """By autograd: the divergence's gradient in the logits is J^T c, with J the softmax's Jacobian."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    token_divergence(Divergence(divergence, alpha=alpha), student, teacher).sum().backward()
    log_q, log_p = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    found = torch.stack([coefficients(divergence, alpha, log_p[:, v], log_q[:, v]) for v in range(5)], 1)
    expected = log_q.exp() * (found - (log_q.exp() * found).sum(-1, keepdim=True))
    torch.testing.assert_close(student.grad, expected)
