"""One model's output projection: its three matrix products, in the best precision and speed the machine offers.

Legend: n tokens and B columns of a tile, b columns of a block, N tokens, H hidden size, V vocabulary.

Logits are fp32 (float64 for float64 inputs) where the machine has a product that returns them: on CUDA (`out_dtype`),
and with fp32 operands on CPU. torch has no CPU product from bf16 to fp32, so a CPU has two ways. With bf16 instructions
(AVX512-BF16 or AMX) operands stay bf16 and logits are rounded to bf16, as in the plain formula and with its error,
because there the bf16 product is the faster one. Without them torch's bf16 product is several times slower than its
fp32 one, so blocks of the head are widened to fp32, which is exact.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from toolkit.divergences.head import Hidden
from toolkit.divergences.plan import new_tile, tile_view


class Projection:
    """Products of one model's hidden states and head, tile by tile.

    `dtype` is that of the computation. `operand` and `logits_dtype` say what this machine's products take and return;
    `allocate` makes room for them, and has to be called before the first product.
    """

    tile: Tensor
    block_bytes: int

    def __init__(self, hidden: Hidden, dtype: torch.dtype):
        self.states_NH, self.weight_VH = hidden.states_NH, hidden.head.weight_VH
        self.operand, self.logits_dtype = operand_dtypes(self.weight_VH, self.states_NH.dtype, dtype)
        self.widens = self.operand != self.weight_VH.dtype
        # The block of the head that was widened last, and which rows of the head it holds.
        self.wide_bH: Tensor | None = None
        self.wide_rows: range | None = None

    def allocate(self, *, rows: int, columns: int, block_bytes: int) -> None:
        """Makes the tile for products of up to [rows, columns]; `block_bytes` bounds each other buffer."""
        self.tile = new_tile(rows, columns, self.logits_dtype, self.weight_VH.device)
        self.block_bytes = block_bytes

    def project(self, tokens: slice, columns: range, tile: Tensor | None = None) -> Tensor:
        """Products [n, B] of these tokens' hidden states and these rows of the head, in a view of the tile."""
        hidden_nH = self.states_NH[tokens].to(self.operand).contiguous()  # see `tile_view`: a view reads on behind it
        out_nB = tile_view(self.tile if tile is None else tile, len(hidden_nH), len(columns))
        wider = {} if self.logits_dtype == self.operand else {"out_dtype": self.logits_dtype}
        for part, weight_bH in self._blocks(columns):
            torch.mm(hidden_nH, weight_bH.t(), out=out_nB[:, part], **wider)
        return out_nB

    def add_to_hidden(self, total_nH: Tensor, gradient_nB: Tensor, columns: range) -> None:
        """total += gradient @ head[columns], in the total's dtype."""
        for part, weight_bH in self._blocks(columns):
            _add_product(total_nH, gradient_nB[:, part], weight_bH)

    def add_to_head(self, total_VH: Tensor, gradient_nB: Tensor, *, tokens: slice, columns: range, first: bool) -> None:
        """total[columns] += gradient.T @ hidden[tokens], or = where it is the first, in the total's dtype."""
        # One product takes all columns, or some at a time where it needs a buffer of its own.
        hidden_nH = self.states_NH[tokens].to(self.operand)
        rows = len(columns)
        if adds_by_parts(self.operand, total_VH.dtype, total_VH.device):
            rows = max(64, self.block_bytes // (hidden_nH.shape[1] * self.operand.itemsize))
        for start in range(0, len(columns), rows):
            part = slice(start, min(start + rows, len(columns)))
            total_bH = total_VH[columns.start + part.start : columns.start + part.stop]
            _add_product(total_bH, gradient_nB[:, part].t(), hidden_nH, first)

    def _blocks(self, columns: range) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the columns (within the tile), and their rows of the head [b, H] as operands."""
        if not self.widens:
            yield slice(0, len(columns)), self.weight_VH[columns.start : columns.stop]
            return
        # As many rows of the head as the buffer holds, in blocks of about one size.
        v, hidden_size = self.weight_VH.shape
        fit = min(v, max(64, self.block_bytes // (hidden_size * self.operand.itemsize)))
        if self.wide_bH is None:
            self.wide_bH = torch.empty(fit, hidden_size, dtype=self.operand, device=self.weight_VH.device)
        size = math.ceil(len(columns) / math.ceil(len(columns) / fit))
        for start in range(columns.start, columns.stop, size):
            rows = range(start, min(start + size, columns.stop))
            if rows != self.wide_rows:
                self.wide_bH[: len(rows)].copy_(self.weight_VH[rows.start : rows.stop])
                self.wide_rows = rows
            yield slice(rows.start - columns.start, rows.stop - columns.start), self.wide_bH[: len(rows)]


def operand_dtypes(weight_VH: Tensor, hidden_dtype: torch.dtype, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """(of the products' operands, of the logits). `dtype` is that of the computation."""
    if hidden_dtype != weight_VH.dtype or hidden_dtype != torch.bfloat16 or dtype != torch.float32:
        return dtype, dtype
    if weight_VH.is_cuda:
        return hidden_dtype, dtype
    if weight_VH.device.type == "cpu" and cpu_has_bf16_products():
        return hidden_dtype, hidden_dtype
    return dtype, dtype


def adds_by_parts(operand: torch.dtype, total: torch.dtype, device: torch.device) -> bool:
    """Whether a product has a buffer of its own before it is added to its total: torch has no CPU product from bf16
    to fp32."""
    return operand != total and device.type == "cpu"


def cpu_has_bf16_products() -> bool:
    """Whether torch's CPU matrix products use bf16 instructions."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b, or total = a @ b where it is the first. Half-precision operands are summed in the total's dtype
    where the machine can, else product by product."""
    if adds_by_parts(a.dtype, total.dtype, total.device):
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
        return
    multiply = torch.mm if first else functools.partial(torch.addmm, total)
    if a.dtype == total.dtype:
        multiply(a, b, out=total)
    else:
        multiply(a, b, out_dtype=total.dtype, out=total)
