"""The student's fp32 master weights and optimizer states, as the pieces that this rank owns of each parameter.

A piece is named by its parameter and by where it starts in the flattened parameter, so what is written down says
nothing about the number of ranks or the ZeRO stage: any other layout reads the ranges that it needs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import deepspeed
import torch
from torch import Tensor

from toolkit.models import zero

#: kinds of a piece: the weights, and the optimizer's state under the optimizer's own name for it
WEIGHTS = "weights"


class Piece(NamedTuple):
    """A view of what this rank owns: `tensor` is elements [start, start + numel) of the flattened parameter `name`."""

    kind: str
    name: str
    start: int
    tensor: Tensor

    @property
    def key(self) -> str:
        """Its name in a checkpoint's file."""
        return f"{self.kind}/{self.name}@{self.start}"


def pieces(engine: deepspeed.DeepSpeedEngine) -> Iterator[Piece]:
    """Every piece of this rank: views, nothing is copied or communicated."""
    states = zero.inner_optimizer(engine).state
    for owned in zero.owned(engine):
        yield Piece(WEIGHTS, owned.name, owned.start, owned.flat.detach().narrow(0, owned.at, owned.numel))
        for kind, value in states.get(owned.flat, {}).items():
            if _is_per_element(value, owned.flat):
                yield Piece(kind, owned.name, owned.start, value.narrow(0, owned.at, owned.numel))


def optimizer_scalars(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """State that is one number for all parameters: AdamW's count of steps. Empty before the first step."""
    found: dict[str, float] = {}
    for flat, state in zero.inner_optimizer(engine).state.items():
        found |= {kind: float(value) for kind, value in state.items() if not _is_per_element(value, flat)}
    return found


def load_pieces(
    engine: deepspeed.DeepSpeedEngine, kinds: list[str], scalars: dict[str, float], read: Callable[[Piece], None]
) -> None:
    """Make the optimizer's states of `kinds` (beside the weights), let `read` fill each piece in place, and bring the
    weights that training computes with in line. Collective."""
    # States exist once the optimizer has taken a step: before it, zeros of the same shapes take their place.
    optimizer = zero.inner_optimizer(engine)
    for flat in {id(owned.flat): owned.flat for owned in zero.owned(engine)}.values():
        state = optimizer.state[flat]
        for kind in kinds:
            state.setdefault(kind, torch.zeros_like(flat, requires_grad=False))
        state.update({name: _scalar(optimizer, flat, value) for name, value in scalars.items()})
    for piece in pieces(engine):
        read(piece)
    zero.load_weights_from_masters(engine)


def _is_per_element(value: object, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == flat.shape and value.dim() == 1


def _scalar(optimizer: torch.optim.Optimizer, flat: Tensor, value: float) -> Tensor | int:
    """As the optimizer keeps it: torch a tensor, on the device if fused; deepspeed's CPU Adam an int."""
    if not type(optimizer).__module__.startswith("torch."):
        return int(value)
    return torch.tensor(value, dtype=torch.float32, device=flat.device if optimizer.defaults.get("fused") else "cpu")
