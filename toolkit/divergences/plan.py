"""How large a tile is: the memory budget becomes rows, columns and block sizes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: A GPU needs tall tiles: each tile reads and writes the whole fp32 head gradient once.
DEFAULT_BUDGET_MIB = {"cpu": 256, "cuda": 3072}
#: With fewer rows than this a whole-vocabulary tile spends its time on the heads, and columns are tiled too.
USEFUL_ROWS = 64
TILED_ROWS = 256
#: Row strides of tiles are multiples of this many elements, so that every row is aligned.
ALIGNMENT = 64


class Plan(NamedTuple):
    """How many tokens (rows) and vocabulary entries (columns) a tile has, and how many bytes buffers may take."""

    tile_rows: int
    tile_columns: int
    rows_bytes: int  # for buffers of the row passes
    block_bytes: int  # for each block of a head, in another dtype or before it is added

    def whole(self, v: int) -> bool:
        """Whether a tile holds all columns."""
        return self.tile_columns >= v


def make_plan(
    *, n_tokens: int, v: int, element_bytes: int, blocks: int, blocks_to_add: int, rows_buffered: bool,
    device: torch.device, budget_mib: float | None,
) -> Plan:  # fmt: skip
    """A quarter of the budget for each block, the rest for tiles; of that, a quarter is for the buffers of the row
    passes where those need some. One tile for all tokens where that fits, else tiles of all columns, else of some.

    element_bytes: what one token takes in all tiles together, per column. blocks: block buffers that are always
    needed, blocks_to_add: those that only several tiles need. Raises ValueError for a budget too small for one token
    and one column block.
    """
    budget_mib = default_budget_mib(device, budget_mib)
    budget = int(budget_mib * 2**20) if budget_mib > 0 else 0
    if device.type != "cpu":
        budget = budget * 15 // 16  # the products have workspaces of their own
    block_bytes, n_tokens = budget // 4, max(n_tokens, 1)

    # One tile for everything: nothing is added up, so the blocks for that are not needed.
    for n_blocks in (blocks, blocks + blocks_to_add):
        tile_bytes = budget - n_blocks * block_bytes
        rows_bytes = tile_bytes // 4 if rows_buffered else 0
        elements = (tile_bytes - rows_bytes) // element_bytes
        fit = elements // padded(v)
        if fit >= n_tokens:
            return Plan(tile_rows=n_tokens, tile_columns=v, rows_bytes=rows_bytes, block_bytes=block_bytes)

    # Tiles of all columns, about equally high.
    if fit >= USEFUL_ROWS:
        rows = math.ceil(n_tokens / math.ceil(n_tokens / fit))
        aligned = math.ceil(rows / 128) * 128  # whole blocks of a matrix product
        rows = aligned if aligned <= fit else rows
        return Plan(tile_rows=rows, tile_columns=v, rows_bytes=rows_bytes, block_bytes=block_bytes)

    # Tiles of some columns, with fewer rows only where they would be too narrow.
    rows = min(n_tokens, TILED_ROWS)
    while rows > 1 and elements // rows < 4 * ALIGNMENT:
        rows //= 2
    columns = elements // rows // ALIGNMENT * ALIGNMENT
    if columns < ALIGNMENT:
        needed = math.ceil(budget_mib * ALIGNMENT / max(elements, 1) * 10) / 10
        raise ValueError(
            f"memory_budget_mib is {budget_mib}, but one token with {ALIGNMENT} columns needs {needed}: raise it "
            f"(default {default_budget_mib(device):g})"
        )
    return Plan(tile_rows=rows, tile_columns=min(columns, v), rows_bytes=rows_bytes, block_bytes=block_bytes)


def default_budget_mib(device: torch.device, asked_mib: float | None = None) -> float:
    """What was asked for, else the default of the device."""
    return DEFAULT_BUDGET_MIB.get(device.type, DEFAULT_BUDGET_MIB["cuda"]) if asked_mib is None else asked_mib


def padded(columns: int) -> int:
    """Elements from one row of a tile to the next."""
    return math.ceil(columns / ALIGNMENT) * ALIGNMENT


def new_tile(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for tiles of up to [rows, columns]: [rows, padded(columns)], uninitialised. `tile_view` gives one."""
    return torch.empty(rows, padded(columns), dtype=dtype, device=device)


def tile_view(tile: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows and columns of a tile, with zeros behind each row up to the next aligned column.

    torch's bf16 products on CPUs with AMX read a left operand's rows in blocks of 32 columns, so they read on behind a
    view of `columns`. What lies there is multiplied by zeros, which removes any number but a NaN or an infinity. Memory
    that was never written, and what a wider view left there, may hold both.
    """
    tile[:rows, columns : padded(columns)] = 0
    return tile[:rows, :columns]
