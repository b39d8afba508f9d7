"""`python -m toolkit` as a user types it."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-m", "toolkit"]


def typed(command, **environment):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )


def test_help_lists_the_commands_and_imports_none():
    probe = "import sys, toolkit.cli; toolkit.cli.main(['--help']); assert 'torch' not in sys.modules"
    done = typed([sys.executable, "-c", probe])
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_what_the_table_asks_for(name):
    module = importlib.import_module(COMMANDS[name][0])
    assert callable(module.add_arguments) and callable(module.run)


def test_an_unknown_command_is_told_with_the_nearest():
    done = typed([*PYTHON, "evalute"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: the command = 'evalute'")
    assert "did you mean 'evaluate'" in done.stderr


@pytest.mark.multiprocess
def test_evaluate_by_plain_python_and_by_the_launcher_on_two_ranks(tiny, tmp_path):
    rows = [{"instruction": f"What is {i}?", "input": "", "output": "a number"} for i in range(5)]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "evaluate", "--model", f"{tiny}/student", "--data", f"{tmp_path}/valid.jsonl", "--seeds", "10,20",
        "data.max_length=190", "data.max_prompt_length=170", "precision=fp32", "--out",
    ]  # fmt: skip
    one = typed([*PYTHON, *arguments, f"{tmp_path}/one.jsonl"])
    assert one.returncode == 0, one.stderr
    assert "| ROUGE-L" in one.stdout and " ± " in one.stdout
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["deepspeed", "--log_level", "error", "--num_accelerators", "2", "--master_port", str(port)]
    two = typed([*launcher, "--module", "toolkit", *arguments, f"{tmp_path}/two.jsonl"], DS_ACCELERATOR="cpu")
    assert two.returncode == 0, two.stdout + two.stderr
    assert two.stdout.count("| ROUGE-L") == 1
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    found = json.loads((tmp_path / "one.summary.json").read_text())
    assert found["settings"]["rows"] == 5 and set(found["models"]) == {f"{tiny}/student"}
