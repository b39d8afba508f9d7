"""Layers of a frozen model that work on a part of their rows at a time, where memory runs out."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolkit.models import zero
from toolkit.ranks.memory import Halving


def split_where_memory_runs_out(model: PreTrainedModel) -> None:
    """Lets each decoder layer of a frozen model work on half of its rows, a quarter, ..., once memory runs out. ZeRO-3
    gathers a layer as a whole then: inside it nothing communicates, and a rank that repeats a layer keeps in step with
    the others. To be called before `zero.initialize`."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        return
    zero.gather_at_once(model, layers)
    halving = Halving("the teacher's window", "rows")
    for layer in layers:
        layer.forward = _in_parts(layer.forward, halving)


def _in_parts(forward: Callable[..., Any], halving: Halving) -> Callable[..., Any]:
    """A layer's `forward` that goes through its rows in parts of the size that `halving` has come to."""

    @functools.wraps(forward)
    def run(hidden_BTH: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = len(hidden_BTH)
        # Generation halves its batch by itself, and its cache holds all of the rows.
        if any(kwargs.get(name) is not None for name in ("past_key_values", "cache")):
            return forward(hidden_BTH, *args, **kwargs)

        def part(value: Any, start: int, end: int) -> Any:
            """Of an argument with one entry a row, those of the rows [start, end); any other argument whole."""
            if isinstance(value, tuple):
                return tuple(part(item, start, end) for item in value)
            is_per_row = torch.is_tensor(value) and value.dim() >= 2 and len(value) == rows
            return value[start:end] if is_per_row else value

        def work(size: float | None) -> Any:
            if size is None or size >= rows:
                return forward(hidden_BTH, *args, **kwargs)
            outs = []
            for start in range(0, rows, int(size)):
                at = start, min(rows, start + int(size))
                named = {name: part(value, *at) for name, value in kwargs.items()}
                outs.append(forward(*(part(value, *at) for value in (hidden_BTH, *args)), **named))
            if torch.is_tensor(outs[0]):
                return torch.cat(outs)
            # T5's position bias is one for all rows, and comes back beside the hidden states.
            return tuple(
                torch.cat(same) if torch.is_tensor(same[0]) and len(same[0]) == int(size) else same[0]
                for same in zip(*outs, strict=True)
            )

        return halving.run(work, whole=rows)

    return run
