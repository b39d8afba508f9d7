"""The student's fp32 master weights and optimizer states, as the pieces that this rank owns of each parameter.

A piece is named by its parameter and by where it starts in the flattened parameter, so what is written down says
nothing about the number of ranks or the ZeRO stage: any other layout reads the ranges that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
        return f"{self.kind}/{self.name}@{self.start}"


class Owned(NamedTuple):
    """Where a parameter's piece lies in a flat fp32 buffer: `at` elements in, `numel` long."""

    name: str
    start: int
    flat: Tensor
    at: int
    numel: int


def pieces(engine: Any) -> Iterator[Piece]:
    """Every piece of this rank: views, nothing is copied or communicated."""
    states = engine.optimizer.optimizer.state
    for owned in _owned(engine):
        yield Piece(WEIGHTS, owned.name, owned.start, owned.flat.detach().narrow(0, owned.at, owned.numel))
        for kind, value in states.get(owned.flat, {}).items():
            if _is_per_element(value, owned.flat):
                yield Piece(kind, owned.name, owned.start, value.narrow(0, owned.at, owned.numel))


def optimizer_scalars(engine: Any) -> dict[str, float]:
    """State that is one number for all parameters: AdamW's count of steps. Empty before the first step."""
    found: dict[str, float] = {}
    for flat, state in engine.optimizer.optimizer.state.items():
        found |= {kind: float(value) for kind, value in state.items() if not _is_per_element(value, flat)}
    return found


def load_pieces(engine: Any, kinds: list[str], scalars: dict[str, float], read: Callable[[Piece], None]) -> None:
    """Make the optimizer's states of `kinds` (beside the weights), let `read` fill each piece in place, and bring the
    weights that training computes with in line. Every rank calls it: persistent parameters are gathered again.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_partition_all_parameters"):
        optimizer._partition_all_parameters()  # ZeRO-3 keeps small parameters whole: their copies are old now
    for flat in {id(owned.flat): owned.flat for owned in _owned(engine)}.values():
        state = optimizer.optimizer.state[flat]
        for kind in kinds:
            state.setdefault(kind, torch.zeros_like(flat, requires_grad=False))
        state.update({name: _scalar(optimizer.optimizer, flat, value) for name, value in scalars.items()})
    for piece in pieces(engine):
        read(piece)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
    else:
        optimizer.update_lp_params()


def _owned(engine: Any) -> Iterator[Owned]:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        if getattr(optimizer, "swap_optimizer", False):
            raise ValueError("the student's optimizer is offloaded to NVMe, which checkpoints cannot read; use cpu")
        for name, parameter in named:
            group, at, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = share * optimizer._get_param_partition_rank(parameter)
            numel = min(share, parameter.ds_numel - start)  # the last ranks' shares are padded
            if numel > 0:
                yield Owned(name, start, optimizer.fp32_partitioned_groups_flat[group], at, numel)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        for name, parameter in named:
            if (mapping := parameter._hp_mapping) is not None:
                flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                ours, theirs = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Owned(name, theirs.start, flat, ours.start, ours.numel)
    else:
        raise ValueError(
            f"the student's DeepSpeed config has ZeRO stage {stage}, and checkpoints are made of stages 1, 2 and 3; "
            "set zero_optimization.stage, for example with ds_configs/student_zero2.json"
        )


def _is_per_element(value: Any, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == flat.shape and value.dim() == 1


def _scalar(optimizer: torch.optim.Optimizer, flat: Tensor, value: float) -> Any:
    """As the optimizer keeps it: torch a tensor, on the device if fused; deepspeed's CPU Adam an int."""
    if not type(optimizer).__module__.startswith("torch."):
        return int(value)
    return torch.tensor(value, dtype=torch.float32, device=flat.device if optimizer.defaults.get("fused") else "cpu")
