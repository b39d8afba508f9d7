"""A build of an operator, by deepspeed and a compiler, that is killed, and the next start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder
from toolkit.ranks import builds
class Tiny(CPUOpBuilder):
    absolute_name = lambda self: "tiny"
    sources = lambda self: [sys.argv[1]]
    include_paths = lambda self: []
builds.outlive_killed_builds()
builds.outlive_killed_builds()
print("loaded", Tiny("tiny").load(verbose=False).__name__)
"""
SOURCE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny"};
PyMODINIT_FUNC PyInit_tiny() { return PyModule_Create(&module); }
"""


@pytest.mark.multiprocess
def test_a_build_that_was_killed_holds_nobody_up(tmp_path):
    (tmp_path / "tiny.cpp").write_text(SOURCE)

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "tiny.cpp")], cwd=ROOT,
            env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    folder = tmp_path / "tiny"
    killed = start()
    until_s = time.monotonic() + 120
    while not (folder / "lock").exists() and killed.poll() is None and time.monotonic() < until_s:
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL, killed.stdout.read()
    assert (folder / "lock").exists()
    starts = [start() for _ in range(2)]
    for process in starts:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0 and "loaded tiny" in said, said
    assert not (folder / "lock").exists()
