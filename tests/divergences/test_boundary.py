"""How the fused operations are called: the documented call, the former one, and alphas that depend on sequences."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from toolkit.divergences import (
    Divergence,
    Head,
    Hidden,
    Objective,
    TopKTeacher,
    fused_linear_cross_entropy,
    fused_linear_divergence,
    token_cross_entropy,
    token_divergence,
)
from toolkit.divergences.formulas import sequence_alpha
from toolkit.divergences.fused import mean_log_probs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
N, V, S, T = 13, 301, 24, 40


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_documented_call_is_the_formula():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    torch.manual_seed(0)
    names = {}
    exec(example, names)
    states, weight = names["states_NS"], names["weight_VS"]
    products = names["teacher_states_NT"] @ names["teacher_weight_VT"].T + names["bias_V"]
    student_logits, teacher_logits = states @ weight.T, 30.0 * torch.tanh(0.5 * products / 30.0)
    divergence_N = token_divergence(Divergence("skl", alpha=0.1), student_logits, teacher_logits)
    torch.testing.assert_close(names["found"].divergence_N, divergence_N.detach())
    loss = (divergence_N + 0.2 * token_cross_entropy(student_logits, names["targets_N"])).mean()
    torch.testing.assert_close(names["found"].loss, loss)
    for found, wanted in zip((states.grad, weight.grad), torch.autograd.grad(loss, (states, weight)), strict=True):
        torch.testing.assert_close(found, wanted)


def parts(kind):
    """(the former call's arguments, today's) of a divergence of one kind."""
    h, w, ht, wt, bias, teacher_bias = (drawn(*shape) for shape in ((N, S), (V, S), (N, T), (V, T), (V,), (V,)))
    h, w, bias = (x.requires_grad_() for x in (h, w, bias))
    shared = {"weights_N": torch.linspace(0.1, 1, N), "targets_N": torch.arange(N), "valid_vocab": 290}
    student = Hidden(h, Head(w, bias_V=bias, scale=0.5, cap=9.0))
    rules = {"student_bias_V": bias, "student_logit_scale": 0.5, "student_soft_cap": 9.0}
    if kind == "top k":
        teacher = TopKTeacher(torch.arange(5).expand(N, 5), torch.full((N, 5), -2.0), torch.full((N,), 0.3))
        flat = (Divergence("skl"), h, w), {"teacher_top_k": teacher, "cross_entropy_weight": 0.4} | rules | shared
        objective = Objective(Divergence("skl"), cross_entropy_weight=0.4)
    else:
        teacher = Hidden(ht, Head(wt, bias_V=teacher_bias, scale=2.0, cap=7.0))
        rules |= {"teacher_bias_V": teacher_bias, "teacher_logit_scale": 2.0, "teacher_soft_cap": 7.0}
        rules |= {"temperature": 1.5, "alpha_N": torch.linspace(0.1, 0.5, N)}
        names = ("spec", "student_hidden_NS", "student_head_VS", "teacher_hidden_NT", "teacher_head_VT")
        tensors = (Divergence("srkl"), h, w, ht, wt)
        by_name = kind == "by name"
        flat = () if by_name else tensors, (dict(zip(names, tensors, strict=True)) if by_name else {}) | rules | shared
        objective = Objective(Divergence("srkl"), temperature=1.5)
        shared = shared | {"alpha_N": rules["alpha_N"]}
    return flat, ((objective,), {"student": student, "teacher": teacher} | shared), (h, w, bias)


@pytest.mark.parametrize("kind", ["by position", "by name", "top k"])
def test_the_former_call_gives_the_same_bits(kind):
    flat, new, leaves = parts(kind)
    assert same(fused_linear_divergence(*flat[0], **flat[1]), fused_linear_divergence(*new[0], **new[1]), leaves)


def test_the_former_call_of_the_cross_entropy_gives_the_same_bits():
    h, w, bias = (x.requires_grad_() for x in (drawn(N, S), drawn(V, S), drawn(V)))
    rules, targets_N = {"bias_V": bias, "logit_scale": 0.5, "soft_cap": 9.0}, torch.arange(N)
    student = Hidden(h, Head(w, bias_V=bias, scale=0.5, cap=9.0))
    new = fused_linear_cross_entropy(student=student, targets_N=targets_N, valid_vocab=290)
    former = fused_linear_cross_entropy(h, w, targets_N, valid_vocab=290, **rules)
    assert same(former, new, (h, w, bias))
    by_name = fused_linear_cross_entropy(hidden_NS=h, head_VS=w, targets_N=targets_N, valid_vocab=290, **rules)
    assert torch.equal(by_name.loss, new.loss)


def same(former, new, leaves):
    """Whether values and gradients of both calls have the same bits, and are not all 0."""
    gradients = [torch.autograd.grad(found.loss, leaves) for found in (former, new)]
    pairs = [*zip(former, new, strict=True), *zip(*gradients, strict=True)]
    return new.loss > 0 and all(torch.equal(one, other) for one, other in pairs)


def test_the_former_call_wants_one_teacher():
    (given, options), _, _ = parts("by position")
    top_k = parts("top k")[0][1]["teacher_top_k"]
    for wrong in ((given[:3], options), (given, options | {"teacher_top_k": top_k})):
        with pytest.raises(ValueError, match="the teacher must be given once"):
            fused_linear_divergence(*wrong[0], **wrong[1])


@pytest.fixture
def sequences():
    """(lengths, targets, [student, teacher], their mean log-probabilities [B] on full logits), all in float64."""
    lengths_B = torch.tensor([6, 1, 10])
    n = int(lengths_B.sum())
    targets_N = torch.arange(n) * 7 % 50
    states = [drawn(n, 8, seed=seed).double() for seed in (0, 1)]
    hidden = [Hidden(one, Head(drawn(56, 8, seed=2 + i).double(), scale=0.7)) for i, one in enumerate(states)]
    means = []
    for one in hidden:
        log_probs = (0.7 * one.states_NH @ one.head.weight_VH.T)[:, :50].log_softmax(-1)
        at_targets_N = log_probs[torch.arange(n), targets_N]
        means.append(torch.stack([part.mean() for part in at_targets_N.split(lengths_B.tolist())]))
    return lengths_B, targets_N, hidden, means


def test_alpha_of_each_sequence_is_distillm_2s(sequences):
    lengths_B, targets_N, hidden, means = sequences
    found = [mean_log_probs(one, targets_N, lengths_B, valid_vocab=50) for one in hidden]
    torch.testing.assert_close(found, means)
    log_q_B, log_p_B = means
    for name, (of, other) in {"skl": (1, 0), "srkl": (0, 1)}.items():
        gap = means[of].exp() - means[other].exp()
        wanted = (1 - 0.9 * gap.mean() / (gap + 1e-5)).clamp(0.01, 0.1)
        assert wanted.unique().numel() > 1
        divergence = Divergence(name, alpha=0.1)
        torch.testing.assert_close(sequence_alpha(divergence, log_p_B, log_q_B), wanted)
        broken = log_q_B * float("nan")  # such a step is skipped, not an error of one rank
        assert (sequence_alpha(divergence, log_p_B, broken) == 0.1).all()

        # The operation chooses them by itself where the objective says so.
        options = {"student": hidden[0], "teacher": hidden[1], "targets_N": targets_N, "valid_vocab": 50}
        objective = Objective(divergence, alpha_per_sequence=True)
        chosen = fused_linear_divergence(objective, sequence_lengths_B=lengths_B, **options)
        given = fused_linear_divergence(
            replace(objective, alpha_per_sequence=False), alpha_N=wanted.repeat_interleave(lengths_B), **options
        )
        torch.testing.assert_close(chosen, given)
        assert not torch.equal(chosen.loss, fused_linear_divergence(Objective(divergence), **options).loss)


def test_what_an_alpha_of_each_sequence_needs_is_asked_for(sequences):
    lengths_B, targets_N, (student, teacher), _ = sequences
    n = len(targets_N)
    top_k = TopKTeacher(torch.zeros(n, 1).long(), torch.full((n, 1), -0.1), torch.full((n,), 0.1))
    options = {"student": student, "teacher": teacher, "targets_N": targets_N, "sequence_lengths_B": lengths_B}
    objective = Objective(Divergence("skl"), alpha_per_sequence=True)
    for wrong, message in (
        ({"teacher": top_k}, r"needs the teacher's hidden states.*teacher is a TopKTeacher, targets_N \(17,\)"),
        ({"sequence_lengths_B": None}, r"sequence_lengths_B None: pass them all"),
        ({"sequence_lengths_B": lengths_B + 1}, r"add up to 20, but there are 17 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_linear_divergence(objective, **(options | wrong))
    with pytest.raises(ValueError, match=r"alpha_per_sequence is for skl and srkl, but the divergence is 'fkl'"):
        Objective(Divergence("fkl"), alpha_per_sequence=True)
