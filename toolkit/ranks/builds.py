"""DeepSpeed's C++ operators, compiled at first use: a build that was killed does not hold up later starts.

Beside `toolkit/models/zero.py` and `gathers.py` this is the only file that relies on DeepSpeed's insides. It stands
here because ranks start before any model is imported.
"""

import fcntl
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

MARK = b"this build has not ended"


def outlive_killed_builds() -> None:
    """From now on, DeepSpeed's builds in this process are made under a lock that the kernel frees with its holder.

    PyTorch's own lock is a file that stays where its process was killed, and every later one waits for it without end.
    """
    # DeepSpeed 0.19.8 compiles every operator that is not there yet in OpBuilder.jit_load, by torch's extension
    # builder, in the folder that torch has for the operator's name.
    from deepspeed.ops.op_builder.builder import OpBuilder

    if hasattr(OpBuilder.jit_load, "__wrapped__"):
        return
    build = OpBuilder.jit_load

    @functools.wraps(build)
    def jit_load(self: Any, verbose: bool = True) -> Any:
        with _sole_builder(Path(cpp_extension._get_build_directory(self.name, verbose=False))):
            return build(self, verbose)

    OpBuilder.jit_load = jit_load


@contextmanager
def _sole_builder(folder: Path) -> Iterator[None]:
    """Inside the `with` block no other process builds in this folder. Its file holds MARK while a build lasts."""
    with (folder / "distil.lock").open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: PyTorch's has to do
            yield
            return
        file.seek(0)
        # The last holder of this lock died in a build, and left PyTorch's lock behind.
        if file.read():
            (folder / "lock").unlink(missing_ok=True)
        file.write(MARK)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
