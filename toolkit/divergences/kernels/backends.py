"""Which kernel makes a tile's row passes: torch's, the C++ one or Triton's."""

import os

import torch

from toolkit.divergences.kernels.rows import COMPILED, RowKernel
from toolkit.divergences.kernels.rows_torch import TorchRows

BACKENDS = ("auto", "torch", "cpp", "triton")


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, divergence: str = "none") -> str:
    """The backend that runs: `name` itself, or for `auto` triton on a GPU, the C++ kernel on a CPU with a compiler, and
    torch else, for float64 and for a divergence that it alone knows. `dtype` is that of the computation.

    Raises ValueError for an unknown name, and for a backend that cannot run here.
    """
    # torch runs anywhere, and alone computes in float64.
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; known: {', '.join(BACKENDS)}")
    is_compiled = divergence in COMPILED
    if name == "torch" or (name == "auto" and not (is_compiled and dtype == torch.float32)):
        return "torch"
    if not is_compiled:
        raise ValueError(f"backend {name!r} does not know {divergence!r}: use backend='torch' or 'auto'")
    if name == "auto":
        if device.type == "cuda":
            return "triton" if has_triton() else "torch"
        return "cpp" if device.type == "cpu" and has_cpp() else "torch"

    # Any other that was asked for has to be able to run on these tensors.
    if dtype != torch.float32:
        raise ValueError(f"backend {name!r} computes in fp32, but the inputs are {dtype}: use backend='torch'")
    if name == "triton":
        if not has_triton():
            raise ValueError("backend is 'triton', but triton is not installed: pip install triton, or backend='torch'")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend is 'triton', but the tensors are on {device.type}: use a GPU, or backend='auto'")
    if name == "cpp" and not (device.type == "cpu" and has_cpp()):
        raise ValueError(f"backend is 'cpp', but the tensors are on {device}, or there is no compiler: use 'auto'")
    return name


def has_triton() -> bool:
    """Whether triton is installed and can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def has_cpp() -> bool:
    """Whether the C++ kernel is built here, or could be."""
    from toolkit.divergences.kernels import rows_cpp  # torch's tools for extensions take long to import

    return rows_cpp.is_available()


def row_kernel(
    name: str, *, rows: int, columns: int, buffer_bytes: int, dtype: torch.dtype, device: torch.device
) -> RowKernel:
    """The kernel of a backend that `choose_backend` returned, for tiles of up to [rows, columns]. torch's has buffers,
    which take at most `buffer_bytes`."""
    if name == "torch":
        return TorchRows(rows, columns, buffer_bytes, dtype, device)
    if name == "cpp":
        from toolkit.divergences.kernels import rows_cpp

        return rows_cpp.run
    from toolkit.divergences.kernels import rows_triton  # triton is not installed everywhere

    return rows_triton.run
