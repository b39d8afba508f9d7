"""Weights laid out as a CPU's matrix products read them, once for all passes of a generation.

A step of generation multiplies few rows with every weight, which oneDNN does faster in its blocked layout than in that
of training. Making it costs one pass over the weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from toolkit.divergences.products import cpu_has_bf16_products

ROWS = 32  # the layout is chosen for products of about so many rows


def packs(model: nn.Module) -> bool:
    """Whether `packed_weights` makes copies of this model's weights: on a CPU, in a dtype that it multiplies."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and cpu_has_bf16_products())


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers multiply with packed copies of the weights that they have when it is entered; no gradients.
    It takes as much memory again as those weights. Nothing is done where `packs` says no."""
    kinds = (nn.Linear, Conv1D) if packs(model) else ()
    layers = [part for part in model.modules() if isinstance(part, kinds) and type(part) in kinds]
    try:
        for layer in layers:
            vars(layer)["forward"] = _packed_forward(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _packed_forward(layer: nn.Linear | Conv1D) -> Callable[[Tensor], Tensor]:
    weight_OI = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t().contiguous()
    packed_OI, bias_O = torch.ops.mkldnn._reorder_linear_weight(weight_OI, ROWS), layer.bias

    def forward(input_NI: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input_NI, packed_OI, bias_O, "none", [], "")

    return forward
