"""One model's output projection: its three matrix products, in the best precision and speed the machine offers.

Legend: n tokens of a tile, B columns of a tile, H hidden size, V vocabulary.

Logits are fp32 (float64 for float64 inputs) where the machine has a product that returns them: on CUDA (`out_dtype`),
and with fp32 operands on CPU. torch has no CPU product from bf16 to fp32, so a CPU has two ways. With bf16 instructions
(AVX512-BF16 or AMX) operands stay bf16 and logits are rounded to bf16, as in the plain formula and with its error,
because there the bf16 product is the faster one. Without them torch's bf16 product is several times slower than its
fp32 one, so blocks of the head are widened to fp32, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


class Projection:
    """Products of one head with tiles. `block_bytes` bounds each of its own buffers."""

    def __init__(self, head_VH: Tensor, hidden_dtype: torch.dtype, dtype: torch.dtype, block_bytes: int):
        self.weight_VH, self.dtype, self.block_bytes = head_VH, dtype, block_bytes
        self.operand, self.logits_dtype = operand_dtypes(head_VH, hidden_dtype, dtype)
        self.wide_out = self.logits_dtype != self.operand  # products return fp32
        self.wide_BH: Tensor | None = None
        self.wide_rows: range | None = None

    def project(self, hidden_nH: Tensor, columns: range, out_nB: Tensor) -> Tensor:
        """Raw products of the columns, in `out_nB`."""
        hidden_nH = hidden_nH.to(self.operand).contiguous()  # see `tile_view`: behind a view there may be anything
        for part, weight_bH in self._blocks(columns):
            if self.wide_out:
                torch.mm(hidden_nH, weight_bH.t(), out_dtype=self.logits_dtype, out=out_nB[:, part])
            else:
                torch.mm(hidden_nH, weight_bH.t(), out=out_nB[:, part])
        return out_nB

    def add_to_hidden(self, total_nH: Tensor, gradient_nB: Tensor, columns: range) -> None:
        """total += gradient @ head[columns], in the computing dtype."""
        for part, weight_bH in self._blocks(columns):
            _add_product(total_nH, gradient_nB[:, part], weight_bH)

    def add_to_head(
        self, total_VH: Tensor, gradient_nB: Tensor, hidden_nH: Tensor, columns: range, first: bool
    ) -> None:
        """total[columns] += gradient.T @ hidden; = where it is the first. In the total's dtype."""
        hidden_nH = hidden_nH.to(self.operand)
        rows = len(columns)
        if adds_by_parts(self.operand, total_VH.dtype, total_VH.device):
            rows = max(64, self.block_bytes // (hidden_nH.shape[1] * self.operand.itemsize))
        for start in range(0, len(columns), rows):
            part = slice(start, min(start + rows, len(columns)))
            total_bH = total_VH[columns.start + part.start : columns.start + part.stop]
            _add_product(total_bH, gradient_nB[:, part].t(), hidden_nH, first)

    def _blocks(self, columns: range) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the columns (within the tile), and their rows of the head as operands."""
        if self.operand == self.weight_VH.dtype:
            yield slice(0, len(columns)), self.weight_VH[columns.start : columns.stop]
            return
        v, hidden_size = self.weight_VH.shape
        fit = min(v, max(64, self.block_bytes // (hidden_size * self.operand.itemsize)))
        if self.wide_BH is None:
            self.wide_BH = torch.empty(fit, hidden_size, dtype=self.operand, device=self.weight_VH.device)
        size = math.ceil(len(columns) / math.ceil(len(columns) / fit))
        for start in range(columns.start, columns.stop, size):
            rows = range(start, min(start + size, columns.stop))
            if rows != self.wide_rows:
                self.wide_BH[: len(rows)].copy_(self.weight_VH[rows.start : rows.stop])
                self.wide_rows = rows
            yield slice(rows.start - columns.start, rows.stop - columns.start), self.wide_BH[: len(rows)]


def operand_dtypes(head_VH: Tensor, hidden_dtype: torch.dtype, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """(of the products' operands, of the logits). `dtype` is the computing dtype."""
    if hidden_dtype != head_VH.dtype or hidden_dtype != torch.bfloat16 or dtype != torch.float32:
        return dtype, dtype
    if head_VH.is_cuda:
        return hidden_dtype, dtype
    if head_VH.device.type == "cpu" and cpu_has_bf16_products():
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
    """total += a @ b, or total = a @ b. Half-precision operands: summed in the total's dtype where the machine can,
    else product by product."""
    if a.dtype == total.dtype and first:
        torch.mm(a, b, out=total)
    elif a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_cuda and first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))
