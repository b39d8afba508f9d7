"""Weights that transformers keeps in fp32 beside bf16 ones: routers and their correction biases, a few buffers.

zero.Init makes every tensor in the run's precision, and deepspeed's optimizers take parameters of one dtype alone. So
frozen ones (a teacher's, those under adapters) are kept as transformers would have them. Trained ones become bf16 with
fp32 copies in the optimizer, as all trained weights are, and a warning says what that changes.
"""

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.models import zero
from toolkit.ranks import collectives
from toolkit.ranks.output import say


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of each parameter and buffer, by name; of a tied one under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.dtype for name, tensor in named}


def train_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give trained parameters the dtype that deepspeed trains in, before it takes them, and tell on rank 0 how far that
    moves the model's own. Collective."""
    # By name, without the numbers of layers: how far each weight moves, relative to its size.
    moved: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dtype == dtype:
            continue
        with zero.gathered([parameter]):
            weight = parameter.detach()
            error = (weight - weight.to(dtype)).norm() / weight.norm().clamp(min=1e-30)
        zero.set_dtype(parameter, dtype)
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
