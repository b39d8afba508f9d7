"""Divergences between teacher and student: `Divergence` names one, `token_divergence` is the readable
formula, `fused_linear_divergence` the same from hidden states, with gradients and without logits in
memory."""

from toolkit.divergences.formulas import token_cross_entropy, token_divergence
from toolkit.divergences.fused import FusedLoss, fused_linear_cross_entropy, fused_linear_divergence
from toolkit.divergences.spec import Divergence
from toolkit.divergences.top_k import TopKTeacher

__all__ = [
    "Divergence",
    "FusedLoss",
    "TopKTeacher",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "token_cross_entropy",
    "token_divergence",
]
