"""The Triton kernel on a GPU: against float64 autograd of the readable formulas, with every option, and in bf16."""

import pytest
import torch
import torch.nn.functional as F

from tests.divergences.calls import fused, fused_cross_entropy
from toolkit.divergences import Divergence, TopKTeacher
from toolkit.divergences.formulas import token_divergence
from toolkit.divergences.spec import KNOWN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs(n, v, hs=64, ht=96, std=2.0, dtype=torch.float32):
    g = torch.Generator("cuda").manual_seed(0)

    def draw(rows, columns, scale=1.0):
        return (torch.randn(rows, columns, generator=g, device="cuda") * scale).to(dtype)

    h, w = draw(n, hs).requires_grad_(), draw(v, hs, std / hs**0.5).requires_grad_()
    return h, w, draw(n, ht), draw(v, ht, std / ht**0.5)


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("std", [2.0, 8.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KNOWN)
def test_error_is_within_twice_the_plain_formula(name, dtype, std):
    h, w, ht, wt = inputs(200, 32003, std=std, dtype=dtype)
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    truth_N = token_divergence(Divergence(name), h64 @ w64.T, ht.double() @ wt.double().T)
    truth = [truth_N.detach(), *torch.autograd.grad(truth_N.sum(), (h64, w64))]
    plain_N = token_divergence(Divergence(name), F.linear(h, w), F.linear(ht, wt))
    plain = [plain_N.detach(), *torch.autograd.grad(plain_N.sum(), (h, w))]
    for backend in ("triton", "torch"):
        result = fused(Divergence(name), h, w, ht, wt, backend=backend)
        ours = [result.divergence_N, *torch.autograd.grad(result.loss, (h, w))]
        for a, b, c in zip(ours, plain, truth, strict=True):
            assert relative_error(a, c) <= 2 * relative_error(b, c) + 1e-5, (backend, relative_error(b, c))


@pytest.mark.parametrize("budget", [None, 8.0], ids=["whole", "columns tiled"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", KNOWN)
def test_options_agree_with_the_torch_passes_in_float64(name, temperature, budget):
    h, w, ht, wt = inputs(130, 5003)
    bias = torch.randn(5003, device="cuda").requires_grad_()
    teacher_bias = torch.randn(5003, device="cuda")
    with torch.no_grad():
        bias[17] = teacher_bias[17] = -torch.inf
    options = dict(
        weights_N=torch.linspace(0.1, 1.5, 130, device="cuda"), targets_N=torch.arange(130, device="cuda") * 37 + 1,
        cross_entropy_weight=0.3, temperature=temperature, valid_vocab=5001,
    )  # fmt: skip
    if name in ("skl", "srkl"):
        options["alpha_N"] = torch.linspace(0.0, 0.9, 130, device="cuda")
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        tensors = [x.detach().to(dtype) for x in (h, w, ht, wt, bias, teacher_bias)]
        for i in (0, 1, 4):
            tensors[i].requires_grad_()
        result = fused(
            Divergence(name), *tensors[:4], student=dict(bias_V=tensors[4], scale=0.5, cap=6.0),
            teacher=dict(bias_V=tensors[5], cap=9.0), backend=backend,
            memory_budget_mib=budget if backend == "triton" else None, **options,
        )  # fmt: skip
        wanted = (tensors[0], tensors[1], tensors[4])
        found.append([*result[1:3], result.agreement_N, *torch.autograd.grad(result.loss, wanted)])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [None, 8.0], ids=["whole", "columns tiled"])
def test_stored_teacher_and_cross_entropy_alone(budget):
    h, w, ht, wt = inputs(130, 5003)
    log_probs, ids = (ht @ wt.T).log_softmax(-1).topk(50)
    teacher = TopKTeacher(ids, log_probs, 1 - log_probs.exp().sum(-1))
    targets = torch.arange(130, device="cuda") * 37 + 1
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        a, b = (x.detach().to(dtype).requires_grad_() for x in (h, w))
        limit = budget if backend == "triton" else None
        top = fused(
            Divergence("skl"), a, b, top_k=teacher, targets_N=targets, cross_entropy_weight=0.5,
            memory_budget_mib=limit, backend=backend,
        )  # fmt: skip
        alone = fused_cross_entropy(a, b, targets, memory_budget_mib=limit, backend=backend)
        found.append([*top[1:3], *torch.autograd.grad(top.loss, (a, b)), alone.cross_entropy_N,
                      *torch.autograd.grad(alone.loss, (a, b))])  # fmt: skip
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-4, atol=1e-5)
