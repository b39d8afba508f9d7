"""Which layers to keep: chosen by a rule, or by how much the teacher's predictions change without the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from toolkit.pruning.width import spread
from toolkit.settings import DEPTHS

MEASURED = ("importance", "greedy")

#: KL to the teacher, in nats, of each choice of layers to keep
Measure = Callable[[Sequence[tuple[int, ...]]], dict[tuple[int, ...], float]]


def listed(depth: str) -> tuple[int, ...] | None:
    """The layers of "0,1,5", ascending; None where `depth` is a word (settings have checked it)."""
    return None if depth in DEPTHS else tuple(sorted({int(part) for part in depth.split(",")}))


def choose_layers(depth: str, count: int, keep: int, seed: int) -> tuple[int, ...]:
    """For a choice that needs no measurement: "even" (first and last stay), "random", or a list."""
    if (layers := listed(depth)) is not None:
        return layers
    if depth == "even":
        return tuple(spread(count, keep))
    draws = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(count, generator=draws)[:keep].sort().values.tolist())


def best_block(count: int, keep: int, measure: Measure) -> tuple[tuple[int, ...], dict[str, float]]:
    """Leave out the contiguous block whose absence changes the teacher's next-token distribution least. Returns (layers
    to keep, KL in nats by "first-last" layer of the block left out)."""
    # Every place where a block of this size can be.
    size = count - keep
    starts = range(keep + 1)
    choices = {at: tuple(layer for layer in range(count) if not at <= layer < at + size) for at in starts}
    kl_nats = measure(list(choices.values()))
    best = min(choices.values(), key=kl_nats.__getitem__)
    return best, {f"{start}-{start + size - 1}": kl_nats[choice] for start, choice in choices.items()}


def greedy(count: int, keep: int, measure: Measure) -> tuple[tuple[int, ...], dict[str, float]]:
    """Leave out one layer after another, each time the one whose absence costs least now. Returns (layers to keep, KL
    in nats after each removal, by the layer removed, in that order)."""
    kept, path = tuple(range(count)), {}
    while len(kept) > keep:
        without = {layer: tuple(other for other in kept if other != layer) for layer in kept}
        kl_nats = measure(list(without.values()))
        layer = min(without, key=lambda number: kl_nats[without[number]])
        kept, path[str(layer)] = without[layer], kl_nats[without[layer]]
    return kept, path
