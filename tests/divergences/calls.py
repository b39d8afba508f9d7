"""The fused operations on bare tensors: tests of them name a model's hidden states, its head's weight, and no more."""

from toolkit.divergences import Head, Hidden, Objective, fused_linear_cross_entropy, fused_linear_divergence


def fused(spec, h, w, ht=None, wt=None, *, top_k=None, student=None, teacher=None, cross_entropy_weight=0.0,
          temperature=1.0, **options):  # fmt: skip
    """`fused_linear_divergence` of a student and a teacher, or a stored one; student, teacher: what their heads have
    beside their weights."""
    return fused_linear_divergence(
        Objective(spec, cross_entropy_weight=cross_entropy_weight, temperature=temperature),
        student=Hidden(h, Head(w, **(student or {}))),
        teacher=Hidden(ht, Head(wt, **(teacher or {}))) if top_k is None else top_k,
        **options,
    )


def fused_cross_entropy(h, w, targets_N, *, student=None, **options):
    """`fused_linear_cross_entropy` of a student."""
    return fused_linear_cross_entropy(student=Hidden(h, Head(w, **(student or {}))), targets_N=targets_N, **options)
