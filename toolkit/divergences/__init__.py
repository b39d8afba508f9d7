"""Divergences between teacher and student, from formulas to a fused operation with its kernels; imports nothing else of
the toolkit.

`Objective` says what is minimised, `Divergence` names a divergence, `token_divergence` is the readable formula, and
`fused_linear_divergence` the same from hidden states, with gradients and without logits in memory.
"""

# ruff: noqa: F401 - the names imported here are what the room offers

from toolkit.divergences.formulas import token_cross_entropy, token_divergence
from toolkit.divergences.fused import FusedLoss, fused_linear_cross_entropy, fused_linear_divergence
from toolkit.divergences.head import Head, Hidden
from toolkit.divergences.plan import default_budget_mib
from toolkit.divergences.spec import CROSS_ENTROPY, Divergence, Objective
from toolkit.divergences.top_k import TopKTeacher
