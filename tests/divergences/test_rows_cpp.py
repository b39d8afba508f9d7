"""How the C++ kernel is built: its numbers are tested with those of the other kernels."""

import os
import subprocess
import sys

import pytest

from toolkit.divergences.kernels.backends import has_cpp

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import warnings, torch
from tests.divergences.calls import fused
from toolkit.divergences import Divergence
from toolkit.divergences.kernels.backends import choose_backend
h, w = torch.ones(3, 4), torch.ones(70, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        fused(Divergence("skl"), h, w, h, w)
print(choose_backend("auto", h.device, h.dtype), len(caught), *(str(x.message) for x in caught))
"""


def start(folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(folder)} | environment,
    )  # fmt: skip


@pytest.mark.skipif(not has_cpp(), reason="needs a C++ compiler")
def test_ranks_that_build_at_once_do_not_disturb_each_other(tmp_path):
    ranks = [start(tmp_path) for _ in range(2)]
    assert [rank.communicate(timeout=300)[0].split()[:2] for rank in ranks] == [["cpp", "0"]] * 2
    built = list((tmp_path / "distil_rows").iterdir())
    assert len(built) == 1 and built[0].suffix == ".so"


def test_without_a_compiler_torch_takes_over_and_says_so_once(tmp_path):
    out = start(tmp_path, CXX=str(tmp_path / "none")).communicate(timeout=300)[0]
    assert out.startswith("torch 1 the loss runs without its C++ kernel") and "Install a C++17 compiler" in out


def test_a_build_that_fails_leaves_nothing_and_is_reported_once(tmp_path):
    out = start(tmp_path, CXX="false").communicate(timeout=300)[0]
    assert out.startswith("torch 1 the loss runs without its C++ kernel")
    assert not list((tmp_path / "distil_rows").iterdir())


def test_the_kernel_can_be_switched_off(tmp_path):
    assert start(tmp_path, DISTILL_CPP="0").communicate(timeout=300)[0].split() == ["torch", "0"]
