"""`distill` from a program of one's own, by the words of docs/python.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tiny import make_tokenizer, save_llama, save_rows

PAGE = ROOT / "docs" / "python.md"


@pytest.mark.multiprocess
def test_the_page_s_code_runs_in_a_process_that_no_launcher_started(tmp_path):
    """And after it the process is as before: no group, its own signal handlers, its environment."""
    tokenizer = make_tokenizer()
    for seed, name in enumerate(("teacher", "student")):
        save_llama(tmp_path / "models" / name, tokenizer, seed, positions=1024)
    save_rows(tmp_path / "rows.jsonl")
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    assert code.count("distill(") == 3
    before = (
        "import os, signal, sys\nhook, handler = sys.excepthook, signal.getsignal(signal.SIGTERM)\n"
        "variables = dict(os.environ)\n"
    )
    after = (
        "import torch\nassert not torch.distributed.is_initialized()\n"
        "assert signal.getsignal(signal.SIGTERM) == handler and sys.excepthook == hook\n"
        "changed = {name for name in ('RANK', 'WORLD_SIZE', 'MASTER_PORT') if name in os.environ}\n"
        "assert changed == set(variables) & {'RANK', 'WORLD_SIZE', 'MASTER_PORT'}\n"
    )
    script = tmp_path / "train.py"
    script.write_text(before + code + after)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nats a token from the teacher" in done.stdout
    assert done.stdout.rstrip().endswith("it has to be at least 1")
    for name in ("small", "small-again"):
        assert Path(tmp_path, "runs", name, "student", "model.safetensors").is_file()
