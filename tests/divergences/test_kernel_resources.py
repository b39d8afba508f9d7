"""The Triton kernel compiled ahead of time for three architectures, and the assembler's report of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.divergences.kernels.backends import has_triton

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_resources.py"
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # a block's, from CUDA's programming guide


@pytest.mark.multiprocess
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_no_variant_spills_and_shared_memory_fits(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    subprocess.run(
        [sys.executable, PROGRAM, "--json", tmp_path / "report.json"], check=True, env=environment, timeout=550
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == 54 and {row["architecture"] for row in report} == set(SHARED_LIMIT_BYTES)
    assert [row for row in report if row["spilled_bytes"]] == []
    assert all(0 < row["registers"] <= 255 for row in report)
    assert all(row["shared_bytes"] <= SHARED_LIMIT_BYTES[row["architecture"]] for row in report)
