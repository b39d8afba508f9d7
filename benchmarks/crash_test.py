"""Kill a training run with SIGKILL at random moments, start it again each time, and hold its end against a run that was
left alone: weights bit for bit, every computed metric equal.

    python benchmarks/crash_test.py --kills 50

Real ranks, ZeRO-3, AdamW, generation, replay and validation on a tiny model. Each kill takes one rank or all of them,
at a random moment, while a checkpoint is written, or while the student is exported. Exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import deepspeed  # noqa: F401 (ranks are forked from here: each start is then seconds shorter)
import torch

from tests.tiny import make_tokenizer, save_llama, save_rows, tiny_overrides
from toolkit.settings import RunConfig

#: of a metrics record, what is measured and not computed
MEASURED = {"seconds", "tokens_per_s", "peak_rss_gib", "peak_device_gib"}
SETTLE_S = 90.0  # the ranks that are left have to end by themselves within this time
SETTINGS = {
    "schedule.policy": "adaptive", "schedule.phi_initial": 0.6, "schedule.epsilon": 0, "rollout.capacity": 30,
    "optimizer.name": "adamw", "optimizer.lr": 0.003, "optimizer.max_grad_norm": 1.0, "validation.every_steps": 10,
    "validation.scored_rows": 2, "checkpoint.every_steps": 3, "resume": "auto", "faults.hang_s": 20,
}  # fmt: skip


def rank_main(rank: int, world: int, port: int, log: Path, overrides: list[str]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    from toolkit.run.recipe import main

    main(RunConfig(), overrides)


def start(world: int, log: Path, overrides: list[str]) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_main, args=(r, world, port, log, overrides)) for r in range(world)]
    for process in processes:
        process.start()
    return processes


def wait(processes: list, limit_s: float) -> bool:
    """Whether all of them ended in time."""
    deadline = time.monotonic() + limit_s
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_for_kill(processes: list, moment: str, folder: Path, draw: random.Random, usual_s: float) -> bool:
    """Returns at the moment to kill; False if the run ended before it came."""
    started_s = time.monotonic()
    delay_s = draw.uniform(0.0, usual_s) if moment == "any moment" else draw.uniform(0.0, 0.02)
    pattern = {"checkpoint": "checkpoints/*.unfinished", "export": "student.unfinished"}.get(moment)
    skip = draw.randrange(6) if moment == "checkpoint" else 0  # not always the first one after a start
    seen = None
    while any(process.is_alive() for process in processes):
        if pattern is None and time.monotonic() - started_s > delay_s:
            return True
        found = next(iter(folder.glob(pattern)), None) if pattern else None
        if found is not None and found != seen:
            seen, skip = found, skip - 1
            if skip < 0:
                time.sleep(delay_s)
                return any(process.is_alive() for process in processes)
        time.sleep(0.001)
    return False


def outcome(folder: Path) -> tuple[bytes, list[dict], dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("steps", "tokens", "validation", "rouge_l", "source_counts", "phi_history")
    return (
        (folder / "student" / "model.safetensors").read_bytes(),
        [{key: value for key, value in record.items() if key not in MEASURED} for record in records],
        {key: summary[key] for key in kept},
    )


def steps_saved(folder: Path) -> int:
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/step-????????")), default=0)


def crash_test(root: Path, kills: int, world: int, steps: int, seed: int) -> int:
    """Problems found; prints what was done."""
    tokenizer, draw = make_tokenizer(), random.Random(seed)
    save_llama(root / "teacher", tokenizer, seed=1, hidden=48, extra_rows=5)
    save_llama(root / "student", tokenizer, seed=2)
    save_rows(root / "rows.jsonl")
    changes = SETTINGS | {"train.steps": steps, "train.rows_per_micro_batch": 4 if world <= 2 else 1}

    def overrides(name: str) -> list[str]:
        return tiny_overrides(root, name=name, **changes)

    started_s = time.monotonic()
    alone = start(world, root / "alone.log", overrides("alone"))
    if not wait(alone, 1200) or any(process.exitcode for process in alone):
        print((root / "alone.log").read_text()[-4000:])
        raise SystemExit("the run that is left alone did not end well")
    usual_s = time.monotonic() - started_s
    wanted = outcome(root / "runs" / "alone")
    sources = collections.Counter(record["source"] for record in wanted[1])
    print(f"left alone: {steps} steps in {usual_s:.1f} s, {dict(sources)}", flush=True)

    done, problems, runs, starts = collections.Counter(), 0, 0, 0
    settle_s: list[float] = []
    while sum(done.values()) < kills or runs == 0:
        name = f"killed-{runs}"
        folder, log = root / "runs" / name, root / f"{name}.log"
        while True:
            left = kills - sum(done.values())
            # Every fifth kill waits for the export at the end of the run, the others come early.
            moment = (
                "export" if sum(done.values()) % 5 == 2 else draw.choice(("any moment", "any moment", "checkpoint"))
            )
            processes, starts = start(world, log, overrides(name)), starts + 1
            # Short lives on purpose: a start, and some steps.
            if left and wait_for_kill(processes, moment, folder, draw, 0.4 * usual_s):
                victims = processes if draw.random() < 0.5 else [draw.choice(processes)]
                for victim in victims:
                    os.kill(victim.pid, signal.SIGKILL)
                killed_s = time.monotonic()
                done[moment] += 1
                if not wait(processes, SETTLE_S):
                    problems += 1
                    print(f"PROBLEM: ranks left alone after a kill ({moment}) still ran after {SETTLE_S:.0f} s")
                    print(log.read_text()[-2000:])
                    for process in processes:
                        process.kill()
                settle_s.append(time.monotonic() - killed_s)
                which = "all ranks" if len(victims) == world else f"rank {processes.index(victims[0])}"
                print(f"kill {sum(done.values())}: {which}, {moment}, {steps_saved(folder)} steps saved", flush=True)
                continue
            if not wait(processes, 1200):
                raise SystemExit(f"{name} hangs, see {log}")
            if all(process.exitcode == 0 for process in processes):
                break
            problems += 1
            print(f"PROBLEM: exit codes {[process.exitcode for process in processes]}\n{log.read_text()[-3000:]}")
            if problems > 3:
                return problems
        runs += 1
        found = outcome(folder)
        for what, ours, theirs in zip(("weights", "metrics", "summary"), found, wanted, strict=True):
            if ours != theirs:
                problems += 1
                print(f"PROBLEM: the {what} of {name} are not those of the run left alone")
        left_over = [path.name for path in folder.rglob("*.unfinished")]
        if left_over:
            problems += 1
            print(f"PROBLEM: left behind: {left_over}")
        shutil.rmtree(folder)
    moments = ", ".join(f"{count} {moment}" for moment, count in done.items())
    verdict = f"{problems} PROBLEMS" if problems else "nothing was lost"
    print(
        f"{sum(done.values())} kills ({moments}) over {runs} runs and {starts} starts in "
        f"{time.monotonic() - started_s:.0f} s; ranks left behind ended within {max(settle_s):.1f} s; {verdict}"
    )
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        found = crash_test(Path(made), arguments.kills, arguments.ranks, arguments.steps, arguments.seed)
    sys.exit(1 if found else 0)
