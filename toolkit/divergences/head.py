"""A model's output projection, and hidden states together with the projection that makes logits of them.

Legend: N tokens, V rows of the head, H hidden size, n tokens and B columns of a tile, K ids a token.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

#: Stands for log 0. Finite, so that 0 * log 0 is 0 and a difference of two of them is 0.
LOG_ZERO = -1e30


@dataclass(frozen=True)
class Head:
    """A model's output projection: logits_NV = cap * tanh(scale * (hidden_NH @ weight_VH.T + bias_V) / cap).

    weight_VH: [V, H], whole on this rank. bias_V: [V], may hold minus infinity; None: no bias. cap: None: no cap, the
    logits are scale * (hidden_NH @ weight_VH.T + bias_V).
    """

    weight_VH: Tensor
    _: KW_ONLY
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def part(self, columns: range, bias_dtype: torch.dtype) -> Head:
        """The head of these vocabulary entries alone: views, but for a bias that comes in another dtype."""
        part = slice(columns.start, columns.stop)
        bias_V = None if self.bias_V is None else self.bias_V[part].to(bias_dtype)
        return replace(self, weight_VH=self.weight_VH[part], bias_V=bias_V)

    def to_logits_(self, products: Tensor, ids_nK: Tensor | None = None) -> Tensor:
        """Turns products hidden @ weight.T into logits of at least LOG_ZERO, in place, and returns them.

        products: [n, V], or [n, K], which are those of `ids_nK`.
        """
        if self.bias_V is not None:
            products.add_(self.bias_V if ids_nK is None else self.bias_V[ids_nK])
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.cap is not None:
            # The cap would make a finite logit of minus infinity.
            is_nothing = products == -torch.inf
            products.div_(self.cap).tanh_().mul_(self.cap).masked_fill_(is_nothing, LOG_ZERO)
        return products.clamp_(min=LOG_ZERO)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logit / d product at logits of any shape: a number where it is the same for all of them."""
        if self.cap is None:
            return self.scale
        return self.scale * (1.0 - (logits / self.cap).square().clamp(max=1.0))


@dataclass(frozen=True)
class Hidden:
    """What a model says of N tokens: hidden states, [N, H], and the head that makes logits of them."""

    states_NH: Tensor
    head: Head

    def check(self, name: str) -> None:
        """Raises ValueError for shapes that do not fit each other, and for fp16. `name`: whose they are."""
        states, weight, bias = self.states_NH, self.head.weight_VH, self.head.bias_V
        if states.dim() != 2 or weight.dim() != 2 or states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"the {name}'s hidden states are {tuple(states.shape)}, its head {tuple(weight.shape)}: pass "
                "[tokens, hidden] and [vocabulary, hidden]; under ZeRO-3 gather the head first"
            )
        if torch.float16 in (states.dtype, weight.dtype):
            raise ValueError(
                f"the {name}'s hidden states are {states.dtype}, its head {weight.dtype}: in fp16 the gradients of "
                "tokens with small weights underflow; use bf16 or fp32"
            )
        if bias is not None and bias.shape != (len(weight),):
            raise ValueError(f"the {name}'s bias is {tuple(bias.shape)}, its head {len(weight)} rows: give one each")
