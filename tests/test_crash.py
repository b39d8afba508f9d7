"""The short form of benchmarks/crash_test.py: three kills with SIGKILL, one of them during the export."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.multiprocess
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_ends_like_one_that_was_left_alone():
    command = [sys.executable, "benchmarks/crash_test.py", "--kills", "3", "--steps", "15"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "nothing was lost" in done.stdout and "1 export" in done.stdout
