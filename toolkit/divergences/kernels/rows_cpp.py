"""The row passes in C++, for fp32 and bf16 tiles on a CPU; `rows_torch` is the readable twin.

`rows.cpp` is compiled at first use, into PyTorch's folder of extensions, once for each kind of CPU and version of
torch; under a name of its own that is renamed when it is whole: ranks that start together, or a build that was killed,
leave nothing that another would wait for.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from toolkit.divergences.head import Head
from toolkit.divergences.kernels.rows import Passes, RowTask

SOURCE = Path(__file__).with_name("rows.cpp")
#: What torch itself is compiled with for each capability; any other gets the compiler's default.
CAPABILITY_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
}


class _Tile(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("is_half", ctypes.c_int64)]


class _Head(ctypes.Structure):
    _fields_ = [("bias", ctypes.c_void_p), ("scale", ctypes.c_float), ("cap", ctypes.c_float)]


class _Task(ctypes.Structure):
    _fields_ = [
        *((name, _Tile) for name in ("student", "teacher", "out")),
        *((name, _Head) for name in ("student_head", "teacher_head")),
        *((name, ctypes.c_int64) for name in ("n", "columns", "first_column", "code", "passes")),
        ("state", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("state_row_stride", "state_token_stride")),
        *((name, ctypes.c_void_p) for name in ("alpha", "weights", "threshold", "targets")),
        *((name, ctypes.c_float) for name in ("temperature", "cross_entropy_weight", "abkd_alpha", "beta")),
    ]


def is_available() -> bool:
    """Whether the kernel is built, or could be; a build that fails is reported once. DISTILL_CPP=0 switches it off."""
    return os.environ.get("DISTILL_CPP") != "0" and _library() is not None


def run(
    task: RowTask, state: Tensor, *, student_nB: Tensor, teacher_nB: Tensor | None, out_nB: Tensor | None,
    passes: Passes,
) -> None:  # fmt: skip
    """The `RowKernel` of this module: state in fp32, products in fp32 or bf16."""
    library = _library()
    assert library is not None, "choose_backend asks is_available first"
    objective, spec = task.objective, task.objective.divergence
    keep: list[Tensor] = []  # copies, which the kernel reads after `pointer` has returned

    def pointer(x: Tensor | None) -> int | None:
        if x is None:
            return None
        keep.append(x.contiguous())
        return keep[-1].data_ptr()

    def head_of(head: Head | None) -> _Head:
        if head is None:
            return _Head(bias=None, scale=1.0, cap=0.0)
        return _Head(bias=pointer(head.bias_V), scale=head.scale, cap=head.cap or 0.0)

    n, columns = student_nB.shape
    row_stride, token_stride = state.stride()
    library.distil_rows_run(ctypes.byref(_Task(
        student=_tile(student_nB), teacher=_tile(teacher_nB), out=_tile(out_nB),
        student_head=head_of(task.student), teacher_head=head_of(task.teacher),
        n=n, columns=columns, first_column=task.first_column, code=task.code, passes=int(passes),
        state=state.data_ptr(), state_row_stride=row_stride, state_token_stride=token_stride,
        alpha=pointer(task.alpha_n), weights=pointer(task.weights_n), threshold=pointer(task.threshold_n),
        targets=pointer(task.targets_n), temperature=objective.temperature,
        cross_entropy_weight=objective.cross_entropy_weight, abkd_alpha=0.0 if spec is None else spec.alpha,
        beta=0.0 if spec is None else spec.beta,
    )))  # fmt: skip


def _tile(x: Tensor | None) -> _Tile:
    return _Tile(None, 0, 0) if x is None else _Tile(x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16)


@functools.cache
def _library() -> ctypes.CDLL | None:
    capability = torch.backends.cpu.get_cpu_capability()
    made_of = f"{SOURCE.read_text()}{Path(__file__).read_text()}{torch.__version__}"
    version = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "distil_rows"
    path = folder / f"rows_{platform.machine()}_{capability.lower()}_{version}.so"
    try:
        if not path.exists():
            _build(path, capability)
        library = ctypes.CDLL(str(path))
        if (found := library.distil_rows_task_bytes()) != ctypes.sizeof(_Task):
            raise OSError(f"{path} has a task of {found} bytes, this module one of {ctypes.sizeof(_Task)}")
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the loss runs without its C++ kernel, slower: {str(reason).strip()[-300:]}. Install a C++17 compiler "
            "(g++), or set DISTILL_CPP=0 to say that this is meant",
            stacklevel=2,
        )
        return None
    return library


def _build(path: Path, capability: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler was found (CXX, g++, clang++, c++)")
    path.parent.mkdir(parents=True, exist_ok=True)
    includes = [part for folder in cpp_extension.include_paths() for part in ("-isystem", folder)]
    libraries = str(Path(torch.__file__).with_name("lib"))
    flags = ["-DCPU_CAPABILITY=DEFAULT"]
    if capability in CAPABILITY_FLAGS:
        macros = f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"
        flags = [*CAPABILITY_FLAGS[capability], *macros]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # No contraction: q - p of equal models has to be 0.
        built = Path(folder) / path.name
        subprocess.run(
            [compiler, "-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden",
             "-ffp-contract=off", *flags, *includes, str(SOURCE), "-o", str(built), f"-L{libraries}",
             f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"],
            check=True, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        built.replace(path)
