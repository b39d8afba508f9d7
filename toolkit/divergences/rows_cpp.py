"""The row passes in C++, for fp32 and bf16 tiles on a CPU; `rows_torch` is the readable twin.

`rows_cpu.cpp` is compiled at first use, once for each kind of CPU, and kept in PyTorch's folder of extensions. It has a
plain C interface: no binding is compiled, which takes most of the time in an ordinary extension.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from toolkit.divergences.rows import LogitRule, Passes, Row, RowTask

SOURCE = Path(__file__).with_name("rows_cpu.cpp")
FLAGS = ("-O3", "-fopenmp")
#: As torch compiles its own kernels for each capability; other names take the compiler's default.
CAPABILITY_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
}
DTYPES = (torch.float32, torch.bfloat16)


def run(task: RowTask, state: Tensor, student_nB: Tensor, teacher_nB: Tensor | None, out_nB: Tensor | None,
        passes: Passes) -> None:  # fmt: skip
    """The passes of `rows`, on all of torch's threads. `state` is fp32; tiles are fp32 or bf16 with adjacent columns.

    out_nB may be student_nB itself. With STATISTICS and another pass in one call each thread takes 8 bytes a column.
    Raises ValueError for a dtype, shape or stride that it cannot take.
    """
    n, columns = student_nB.shape
    keep_alive: list[Tensor] = []

    def pointer(x: Tensor | None, dtype: torch.dtype, length: int) -> int | None:
        if x is None:
            return None
        if x.dtype != dtype or x.shape != (length,) or x.device.type != "cpu":
            raise ValueError(f"expected {dtype} [{length}] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}")
        keep_alive.append(x.contiguous())
        return keep_alive[-1].data_ptr()

    def tile(x: Tensor | None) -> _Tile:
        if x is None:
            return _Tile()
        if x.dtype not in DTYPES or x.device.type != "cpu" or x.shape != (n, columns) or x.stride(1) != 1 < columns:
            raise ValueError(
                f"a tile is {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}, but the C++ kernel takes "
                f"fp32 or bf16 {[n, columns]} with adjacent columns on the CPU: use the torch kernel"
            )
        return _Tile(x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16)

    def rule(x: LogitRule) -> _LogitRule:
        return _LogitRule(pointer(x.bias_B, torch.float32, columns), x.scale, x.cap or 0.0)

    if state.dtype != torch.float32 or state.shape != (len(Row), n) or state.device.type != "cpu":
        raise ValueError(f"the state is {state.dtype} {list(state.shape)}, but must be fp32 {[len(Row), n]} on the CPU")
    if Passes.GRADIENT in passes and out_nB is None:
        raise ValueError("the gradient was asked for without a tile to write it to")
    spec = task.spec
    _library().distil_rows_run(
        ctypes.byref(
            _Task(
                student=tile(student_nB),
                teacher=tile(teacher_nB),
                out=tile(out_nB),
                student_rule=rule(task.student),
                teacher_rule=rule(task.teacher) if teacher_nB is not None else _LogitRule(None, 1.0, 0.0),
                n=n,
                columns=columns,
                first_column=task.first_column,
                code=task.code,
                passes=int(passes),
                state=state.data_ptr(),
                state_row_stride=state.stride(0),
                state_token_stride=state.stride(1),
                alpha=pointer(task.alpha_n, torch.float32, n),
                weights=pointer(task.weights_n, torch.float32, n),
                threshold=pointer(task.threshold_n, torch.float32, n),
                targets=pointer(task.targets_n, torch.int64, n),
                temperature=task.temperature,
                cross_entropy_weight=task.cross_entropy_weight,
                abkd_alpha=spec.alpha if spec else 0.0,
                beta=spec.beta if spec else 0.0,
            )
        )
    )


def is_available() -> bool:
    """Whether the kernel can be used here; the first call compiles it. DISTILL_CPP=0 switches it off."""
    return os.environ.get("DISTILL_CPP") != "0" and _library_or_none() is not None


class _Tile(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("is_half", ctypes.c_int64))


class _LogitRule(ctypes.Structure):
    _fields_ = (("bias", ctypes.c_void_p), ("scale", ctypes.c_float), ("cap", ctypes.c_float))


class _Task(ctypes.Structure):
    """`Task` in the source, field by field."""

    _fields_ = (
        *((name, _Tile) for name in ("student", "teacher", "out")),
        *((name, _LogitRule) for name in ("student_rule", "teacher_rule")),
        *((name, ctypes.c_int64) for name in ("n", "columns", "first_column", "code", "passes")),
        ("state", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("state_row_stride", "state_token_stride")),
        *((name, ctypes.c_void_p) for name in ("alpha", "weights", "threshold", "targets")),
        *((name, ctypes.c_float) for name in ("temperature", "cross_entropy_weight", "abkd_alpha", "beta")),
    )


@functools.cache
def _library_or_none() -> ctypes.CDLL | None:
    try:
        return _library()
    except Exception as error:
        reason = str(error).strip().splitlines()
        warnings.warn(
            "the C++ row kernel could not be built, so the slower torch kernel is used; it needs a C++ compiler and "
            f"ninja (DISTILL_CPP=0 silences this): {type(error).__name__}: {' ... '.join(reason[:1] + reason[-1:])}",
            stacklevel=2,
        )
        return None


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled source for this CPU. Raises what the compiler or the loader raised."""
    capability = torch.backends.cpu.get_cpu_capability()
    name = capability if capability in CAPABILITY_FLAGS else "DEFAULT"
    flags = (*FLAGS, *CAPABILITY_FLAGS.get(name, ()), f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}")
    digest = hashlib.sha256(repr((SOURCE.read_text(), flags, torch.__version__)).encode()).hexdigest()[:12]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    path = root / f"distil_rows_{os.uname().machine}_{name}_{digest}.so".lower()
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                _build(path, flags)
    library = ctypes.CDLL(str(path))
    library.distil_rows_run.restype = None
    library.distil_rows_task_bytes.restype = ctypes.c_int64
    if library.distil_rows_task_bytes() != ctypes.sizeof(_Task):
        raise RuntimeError(f"{path} and its loader disagree about the task's layout")
    return library


def _build(path: Path, flags: tuple[str, ...]) -> None:
    """Compiles in a private folder and puts the result in its place in one step.

    So a build that was killed leaves neither half a library nor the lock file on which torch's own loader would wait
    for ever, and ranks on machines whose shared folder has no locks do no harm by building twice.
    """
    with tempfile.TemporaryDirectory(prefix="distil_rows_") as folder:
        cpp_extension.load(
            name=path.stem,
            sources=[str(SOURCE)],
            extra_cflags=list(flags),
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        whole = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
        try:
            shutil.copyfile(Path(folder, path.name), whole)
            os.replace(whole, path)
        finally:
            whole.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with its process; none where the file system has no locks."""
    import fcntl

    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
