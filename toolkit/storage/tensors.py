"""safetensors files written without a second copy of them in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One tensor after the other: the library's own writer would hold a second copy of all of them in memory.

    Returns the SHA-256 of what was to be written; on disk when it returns."""
    tensors = list(tensors)
    header, at = {}, 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for _, tensor in tensors:
            content = tensor.detach().cpu().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
