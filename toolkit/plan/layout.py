"""How a model is laid out over ranks: what its DeepSpeed file says, or whole on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.plan.shape import ModelShape, Weight
from toolkit.settings import ModelConfig
from toolkit.settings.ds_files import read_ds_config

SHARDED, RESIDENT = "sharded", "resident"
ZERO_3 = 3


@dataclass(frozen=True)
class Sharding:
    """What a DeepSpeed file says of memory and communication, with DeepSpeed 0.19.8's defaults; numbers are elements.

    persistence: parameters up to this size stay whole under ZeRO-3, as long as all of them stay below
    model_persistence. reuse: a parameter that is used again within so many elements is not released in between.
    secondary: ranks that keep a second copy among themselves (hpZ), 1 for none. accumulates_fp32: whether the file sums
    gradients in fp32, None where it does not say.
    """

    stage: int
    persistence: int
    model_persistence: float
    reduce_bucket: int
    prefetch: int
    reuse: int
    secondary: int
    parameters_offloaded: bool
    optimizer_offloaded: bool
    overlaps: bool
    accumulates_fp32: bool | None

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sharding:
        """Of a DeepSpeed configuration."""
        zero = config.get("zero_optimization", {})

        def is_offloaded(name: str) -> bool:
            return (zero.get(name) or {}).get("device", "none") != "none"

        stage, accum = int(zero.get("stage", 0)), config.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            stage=stage,
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            model_persistence=float(zero.get("stage3_model_persistence_threshold", float("inf"))),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            secondary=int(zero.get("zero_hpz_partition_size", 1)),
            parameters_offloaded=is_offloaded("offload_param"),
            optimizer_offloaded=is_offloaded("offload_optimizer"),
            overlaps=bool(zero.get("overlap_comm", stage == ZERO_3)),
            accumulates_fp32=None if accum is None else accum in ("fp32", "float32"),
        )

    @classmethod
    def of_model(cls, model: ModelConfig) -> Sharding:
        """Of the file that a model's settings name. Raises ValueError as `read_ds_config` does."""
        return cls.of(read_ds_config(model.ds_config))

    @property
    def is_partitioned(self) -> bool:
        """Whether each rank keeps a part of the weights alone."""
        return self.stage == ZERO_3

    def persistent(self, shape: ModelShape) -> list[Weight]:
        """Parameters that ZeRO-3 leaves whole between passes: the first small ones, up to model_persistence."""
        found, total = [], 0
        for weight in shape.weights:
            if weight.numel + total <= self.model_persistence and weight.numel <= self.persistence:
                found.append(weight)
                total += weight.numel
        return found


def share(weights: Sequence[Weight], world: int) -> int:
    """Elements that one rank keeps of each of these, the padding of the last share included."""
    return sum(-(-weight.numel // world) for weight in weights)


def bucket_fill(weights: Sequence[Weight], size: int) -> int:
    """The most elements that a bucket of gradients holds, filled from the last parameter to the first and emptied
    before it would overflow. A gradient larger than the bucket does not go through it."""
    most = filled = 0
    for weight in reversed(weights):
        if weight.numel > size:
            filled = 0
            continue
        filled = weight.numel if filled + weight.numel > size else filled + weight.numel
        most = max(most, filled)
    return most


def kept_for_backward(shape: ModelShape, reuse: int) -> int:
    """Elements that ZeRO-3 has gathered in the forward pass of a training step and keeps for the backward pass, the
    output projection included: it belongs to the module around the model, which ends last. A weight is used again after
    all that follow it have been passed twice, there and back."""
    behind, kept = 0, 0
    for weight in reversed(shape.weights):
        if 2 * behind < reuse:
            kept += weight.numel
        behind += weight.numel
    return max(kept, shape.head)
