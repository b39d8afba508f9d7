"""safetensors files: written one tensor at a time, and mapped into memory instead of read."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> str:
    """Writes the named tensors, on any device, in their order. The file is on disk when this returns.

    Returns the SHA-256 of the bytes that were to be written, which what is read back can be held against.
    """
    # safetensors.torch.save_file would do but for two things: it brings all tensors of an accelerator to the host at
    # once, where this loop brings one at a time, and it does not say what the bytes were to be.

    # The header says where each tensor lies.
    header, at = {}, 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the first tensor begins at a multiple of 8 bytes
    head = len(text).to_bytes(8, "little") + text

    # Then come their bytes; what is hashed is what is written.
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for _, tensor in tensors:
            # Through bytes, as numpy has no bf16. A tensor without elements has no memory to view.
            content = tensor.detach().cpu().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU. They are views of the file, which is read as they are used; writing to
    one changes this process's copy alone.

    Raises ValueError for a file that is not a safetensors file, or is shorter than it says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
