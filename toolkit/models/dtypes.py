"""Weights that transformers keeps in fp32 beside bf16 ones: routers and their correction biases, a few buffers.

zero.Init makes every tensor in the run's precision, and deepspeed's optimizers take parameters of one dtype alone. So
frozen ones (a teacher's, those under adapters) are kept as transformers would have them, and trained ones are bf16 as
all that is trained is, with fp32 copies in the optimizer; what that changes is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.ranks import collectives
from toolkit.ranks.output import say


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """By name, of parameters (tied ones under each of their names) and buffers."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.dtype for name, tensor in named}


@contextmanager
def keeping_dtypes(wanted: Mapping[str, torch.dtype]) -> Iterator[None]:
    """While it lasts, a model that is made under zero.Init has these dtypes, by name, before weights are read into it.

    transformers opens zero.Init itself, so its own class stands in for it.
    """
    original = deepspeed.zero.Init

    class Init(original):
        def _post_init_method(self, module: nn.Module) -> None:
            super()._post_init_method(module)
            self.made = module  # at last, the whole model

        def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
            super().__exit__(kind, error, trace)
            if kind is None:  # not before: inside, deepspeed gives every new tensor the run's precision
                _set_dtypes(self.made, wanted)

    deepspeed.zero.Init = Init
    try:
        yield
    finally:
        deepspeed.zero.Init = original


def _set_dtypes(model: nn.Module, wanted: Mapping[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != wanted.get(name, parameter.dtype):
            _set_dtype(parameter, wanted[name])
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(wanted.get(name, buffer.dtype))


def _set_dtype(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Also of a partitioned parameter, which is gathered and partitioned anew. Collective."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data = parameter.data.to(dtype)
        return
    parameter.all_gather()
    parameter.data = parameter.data.to(dtype)
    parameter.ds_tensor = parameter.ds_secondary_tensor = None  # made again, in this dtype
    parameter.partition()


def train_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters that are trained the dtype that deepspeed trains them in, before it takes them, and tell on
    rank 0 how far that moves the model's own. Collective."""
    moved: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dtype == dtype:
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            weight = parameter.detach()
            error = (weight - weight.to(dtype)).norm() / weight.norm().clamp(min=1e-30)
        _set_dtype(parameter, dtype)
        if ".lora_" not in name:  # adapters begin at random, in the dtype of what they stand beside
            moved.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(float(error))
    if moved and collectives.rank() == 0:
        names = ", ".join(f"{name} ({len(errors)} times)" for name, errors in moved.items())
        most = max(max(errors) for errors in moved.values())
        say(
            f"warning: transformers keeps {names} of the student, a {model.config.model_type} model, in fp32. They are "
            f"trained, and deepspeed trains in one precision: here they are {str(dtype).removeprefix('torch.')} as the "
            f"other weights, with an fp32 copy in the optimizer; rounding moves them by {most:.2%} at most"
        )


@contextmanager
def keeping_frozen(model: PreTrainedModel) -> Iterator[None]:
    """Around deepspeed.initialize, which casts all parameters of a model that zero.Init did not make: frozen ones are
    afterwards what they were before."""
    others = (p for p in model.parameters() if p.dtype != model.dtype and not hasattr(p, "ds_tensor"))
    kept = [(parameter, parameter.data) for parameter in others if not parameter.requires_grad]
    yield
    for parameter, data in kept:
        parameter.data = data.to(parameter.device)
