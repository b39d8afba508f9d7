"""Which hidden units, heads and MLP channels to keep, by their activations on calibration text.

Importance as NVIDIA's Minitron reports it (arXiv 2407.14679, section 2.2): of a hidden unit the outputs of the layer
norms, of a head its output, of an MLP channel what enters the second linear layer; the mean over a row's tokens of the
absolute value, then the L2 norm over rows (its best pair of aggregations), and for hidden units the sum over norms.

Legend: L layers, H hidden units, A query heads, K key-value heads, D numbers a head, M channels, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from toolkit.pruning.families import FUSED, HIDDEN, KEY_VALUE, LAYER, MLP, QUERY, Family


class Sizes(NamedTuple):
    """How large a model is. heads: of queries. mlp: channels of a layer's MLP. head_dim: numbers a head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig, layers: int) -> Sizes:
        """Those that a configuration says, and its architecture's defaults for what it leaves out."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        named = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
        mlp = next(filter(None, named), 4 * hidden)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(layers, hidden, heads, kv_heads, mlp, getattr(config, "head_dim", 0) or hidden // heads)


def check_sizes(teacher: Sizes, student: Sizes, family: Family) -> None:
    """Raises ValueError for a width that cannot be cut out of the teacher's."""
    # No size grows.
    for name in ("hidden", "heads", "kv_heads", "mlp"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if not 1 <= ours <= theirs:
            raise ValueError(f"{name} = {ours}, but the teacher has {theirs}; give a number from 1 to {theirs}")
    # Query heads share key-value heads in equal groups, of which each is cut out of one of the teacher's.
    if student.heads % student.kv_heads:
        raise ValueError(f"heads = {student.heads} is not a multiple of kv_heads = {student.kv_heads}; change one")
    if family.heads_fill_hidden and student.kv_heads != student.heads:
        raise ValueError(
            f"kv_heads = {student.kv_heads}, but this architecture has as many key-value heads as heads "
            f"({student.heads}); leave kv_heads out"
        )
    group, group_kept = teacher.heads // teacher.kv_heads, student.heads // student.kv_heads
    if group_kept > group:
        raise ValueError(
            f"heads = {student.heads} with kv_heads = {student.kv_heads} asks for {group_kept} query heads for each "
            f"key-value head, and the teacher has {group}; raise kv_heads or lower heads"
        )
    # The hidden size has to go with the heads.
    if family.heads_fill_hidden and student.hidden != student.heads * teacher.head_dim:
        raise ValueError(
            f"hidden = {student.hidden} and heads = {student.heads}: this architecture has hidden = heads x "
            f"{teacher.head_dim}, so give hidden={student.heads * teacher.head_dim} or other heads"
        )
    if student.hidden % student.heads:
        raise ValueError(
            f"hidden = {student.hidden} is not a multiple of heads = {student.heads}, which transformers asks for; "
            "change one of them"
        )


@dataclass
class Statistics:
    """Of the whole teacher on the calibration text: scores of units, heads and channels, larger for what matters more.
    shares_H: for each norm ("3.input_layernorm", "norm"), the mean over tokens of a unit's share in the sum of squares
    that the norm divides by."""

    hidden_H: Tensor
    heads_LA: list[Tensor] = field(default_factory=list)
    mlp_LM: list[Tensor] = field(default_factory=list)
    shares_H: dict[str, Tensor] = field(default_factory=dict)


class Meter:
    """Gathers `Statistics` through hooks around the teacher's own pass through each layer."""

    def __init__(self, family: Family, sizes: Sizes, row_tokens: int, centred: bool):
        self.family, self.sizes, self.row_tokens, self.centred = family, sizes, row_tokens, centred
        self.found = Statistics(torch.zeros(sizes.hidden, dtype=torch.float64))

    @contextmanager
    def watch(self, index: int, module: nn.Module) -> Iterator[None]:
        """Around the layer `index`, or around the last norm, whose index is the number of layers."""
        heads_out, mlp_out, is_layer = self.family.heads_out, self.family.mlp_out, index < self.sizes.layers
        norms = {f"{index}.{n}": module.get_submodule(n) for n in self.family.norms} if is_layer else {"norm": module}
        # Sums over the passes of all rows: of norms by what comes out, of heads and channels by what their sum reads.
        sums: dict[str, Tensor] = {}
        hooks = [norm.register_forward_hook(partial(self._see_norm, sums, name)) for name, norm in norms.items()]
        for name in (heads_out, mlp_out) if is_layer else ():
            hooks.append(module.get_submodule(name).register_forward_pre_hook(partial(self._see_input, sums, name)))
        yield
        for hook in hooks:
            hook.remove()
        # Scores of this layer's parts.
        for name in norms:
            self.found.hidden_H += sums[name].sqrt()
            self.found.shares_H[name] = sums[f"{name} share"] / sums[f"{name} tokens"]
        if is_layer:
            heads_AD = sums[heads_out].sqrt().view(self.sizes.heads, self.sizes.head_dim)
            self.found.heads_LA.append(heads_AD.norm(dim=1))
            self.found.mlp_LM.append(sums[mlp_out].sqrt())

    def _see_norm(self, sums: dict[str, Tensor], name: str, module: nn.Module, args: tuple, out_BTH: Tensor) -> None:
        _add(sums, name, self._row_squares(out_BTH))
        x_NH = args[0].detach().flatten(0, -2).float()
        if self.centred:
            x_NH = x_NH - x_NH.mean(-1, keepdim=True)
        squares_NH = x_NH.square()
        share_NH = squares_NH / squares_NH.sum(-1, keepdim=True).clamp_min(1e-30)
        _add(sums, f"{name} share", share_NH.sum(0))
        _add(sums, f"{name} tokens", torch.tensor(float(len(x_NH))))

    def _see_input(self, sums: dict[str, Tensor], name: str, module: nn.Module, args: tuple) -> None:
        _add(sums, name, self._row_squares(args[0]))

    def _row_squares(self, x_BTX: Tensor) -> Tensor:
        """Sum over rows of the squared mean over tokens of |x|."""
        rows_BTX = x_BTX.detach().reshape(-1, self.row_tokens, x_BTX.shape[-1])  # OPT's MLP works on flat tokens
        return rows_BTX.float().abs().mean(1).square().sum(0)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.double().cpu()
    sums[name] = sums[name] + value if name in sums else value


@dataclass(frozen=True)
class Width:
    """What is kept, by the teacher's own numbers, ascending; None where an axis is kept whole. heads_LA, kv_heads_LK
    and mlp_LM have an entry for each layer of the teacher. norm_factors: for a norm, what its weight is multiplied
    with."""

    sizes: Sizes
    hidden_H: Tensor | None
    heads_LA: list[Tensor] | None
    kv_heads_LK: list[Tensor] | None
    mlp_LM: list[Tensor] | None
    norm_factors: dict[str, float]

    def cut(self, family: Family, name: str, tensor: Tensor) -> Tensor:
        """The part of a parameter that stays; `name` and its layer's number are the teacher's."""
        match = LAYER.match(name)
        layer = int(match["index"]) if match else 0
        # Each axis loses what is not kept of it.
        for dim, axis in enumerate(family.axes_of(name)):
            kept = self._kept(axis, layer)
            if kept is not None:
                tensor = tensor.index_select(dim, kept)
        # A norm makes up for what it no longer divides by.
        norm = f"{layer}.{match['after'][1:].rpartition('.')[0]}" if match else "norm"
        if name.endswith(".weight") and tensor.dim() == 1 and norm in self.norm_factors:
            tensor = (tensor.float() * self.norm_factors[norm]).to(tensor.dtype)
        return tensor

    def _kept(self, axis: str | None, layer: int) -> Tensor | None:
        """The places that stay on an axis of a layer's parameter; None is all of them."""
        d = self.sizes.head_dim
        if axis == HIDDEN:
            return self.hidden_H
        if axis == MLP:
            return None if self.mlp_LM is None else self.mlp_LM[layer]
        if axis == KEY_VALUE:
            return None if self.kv_heads_LK is None else _of_heads(self.kv_heads_LK[layer], d)
        if axis in (QUERY, FUSED) and self.heads_LA is not None:
            units, width = _of_heads(self.heads_LA[layer], d), self.sizes.heads * d
            return units if axis == QUERY else torch.cat([units, units + width, units + 2 * width])
        return None


def choose_width(how: str, teacher: Sizes, student: Sizes, found: Statistics, seed: int, keep_scale: bool) -> Width:
    """`how`: "importance" (by `found`), "even" (spread over the numbers), or "random".

    Heads go by groups: the key-value heads whose query heads score highest together, then the highest of each group.
    keep_scale: multiply norm weights, so that what is kept of a normed state keeps its size on average. A norm over
    fewer units divides by another root mean square than the teacher's.
    """
    draws = torch.Generator().manual_seed(seed)

    def choose(scores: Tensor, keep: int) -> Tensor:
        if how == "importance":
            return scores.topk(keep).indices.sort().values
        if how == "random":
            return torch.randperm(len(scores), generator=draws)[:keep].sort().values
        return torch.tensor(spread(len(scores), keep))

    hidden = heads = kv_heads = mlp = None
    if student.hidden < teacher.hidden:
        hidden = choose(found.hidden_H, student.hidden)
    if student.mlp < teacher.mlp:
        mlp = [choose(scores_M, student.mlp) for scores_M in found.mlp_LM]
    # Key-value heads first, then as many query heads of each.
    if (student.heads, student.kv_heads) != (teacher.heads, teacher.kv_heads):
        heads, kv_heads, group = [], [], teacher.heads // teacher.kv_heads
        for scores_A in found.heads_LA:
            scores_KG = scores_A.view(teacher.kv_heads, group)
            groups = choose(scores_KG.sum(1), student.kv_heads)
            kept = [group * k + choose(scores_KG[k], student.heads // student.kv_heads) for k in groups]
            heads.append(torch.cat(kept))
            kv_heads.append(groups)
    factors = {}
    if hidden is not None and keep_scale:
        for name, shares_H in found.shares_H.items():
            factors[name] = (shares_H[hidden].sum() * teacher.hidden / student.hidden).sqrt().item()
    return Width(teacher, hidden, heads, kv_heads, mlp, factors)


def spread(count: int, keep: int) -> list[int]:
    """`keep` of range(count), evenly spaced, first and last included."""
    if keep == 1:
        return [0]
    return [round(index * (count - 1) / (keep - 1)) for index in range(keep)]


def _of_heads(heads: Tensor, head_dim: int) -> Tensor:
    """The places of these heads' numbers, one head after another."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
