"""What a checkpoint costs in seconds and bytes, how long a signal takes to end a run, and how long a start takes to the
first resumed step: the quickstart's models on two ranks, four steps of two short rows.

    python benchmarks/resume_cost.py
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    "name=cost", "train.steps=6", "train.rows_per_step=2", "train.rows_per_micro_batch=1", "validation.rows=2",
    "validation.scored_rows=0", "validation.samples=0", "schedule.policy=off", "data.max_rows=40",
    "checkpoint.every_steps=1", "optimizer.warmup_steps=0", "precision=fp32",
]  # fmt: skip


def start(folder: Path) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    command = [sys.executable, "-u", str(ROOT / "recipes/quickstart.py"), *SETTINGS, f"output_dir={folder}"]
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL
        )
        for rank in range(2)
    ]


def steps(folder: Path) -> int:
    file = folder / "cost" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def wait_for_step(folder: Path, step: int, ranks: list[subprocess.Popen]) -> None:
    while steps(folder) < step:
        if any(rank.poll() is not None for rank in ranks):
            raise SystemExit(f"a rank ended with {[rank.poll() for rank in ranks]} before step {step}")
        time.sleep(0.02)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        folder, checkpoints = Path(made), Path(made) / "cost" / "checkpoints"
        ranks = start(folder)
        wait_for_step(folder, 2, ranks)
        started_s = time.monotonic()
        while not (checkpoints / "step-00000002").is_dir():
            time.sleep(0.01)
        print(f"a save: {time.monotonic() - started_s:.1f} s", flush=True)
        files = list((checkpoints / "step-00000002").iterdir())
        print(f"bytes: {sum(file.stat().st_size for file in files):,} in {len(files)} files", flush=True)
        time.sleep(0.2)
        signalled_s = time.monotonic()
        for rank in ranks:
            rank.send_signal(signal.SIGUSR1)
        codes = [rank.wait(300) for rank in ranks]
        print(f"from signal to exit: {time.monotonic() - signalled_s:.1f} s, exit codes {codes}", flush=True)
        before, started_s = steps(folder), time.monotonic()
        ranks = start(folder)
        wait_for_step(folder, before + 1, ranks)
        print(f"from start to the end of the first resumed step: {time.monotonic() - started_s:.1f} s", flush=True)
        for rank in ranks:
            rank.kill()
