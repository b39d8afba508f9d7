"""A rank that hangs, stops or falls behind ends the job: real processes, which the watchdog ends."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.run import run_cases
from tests.tiny import tiny_overrides
from toolkit.ranks import collectives
from toolkit.ranks.collectives import started_as
from toolkit.ranks.signals import EXIT_LATER, SAME_REQUEST_S
from toolkit.ranks.watchdog import EXIT_STUCK, Sign, Watchdog, _where, verdict

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 6
SLACK_S = 60  # for a busy machine; what has to hold is that the job does end, and not how soon
SCRIPT = """
import sys, time, os, signal
sys.path.insert(0, {root!r})
import torch
from toolkit.settings import RunConfig
from toolkit.run.loop import DistillationLoop
from toolkit.run.recipe import main
original, fault = DistillationLoop.choose_examples, os.environ["FAULT"]
step_of = DistillationLoop.step
def step(self, index):
    if fault == "a step less" and index == 2 and os.environ["RANK"] == "1":
        print("FAULT", flush=True)
        return self.last_record
    self.last_record = step_of(self, index)
    return self.last_record
DistillationLoop.step = step
def choose(self, step):
    if step == 2 and os.environ["RANK"] == "1" and fault != "a step less":
        print("FAULT", flush=True)
        if fault == "another call":
            torch.distributed.recv(torch.zeros(1), src=0)
        if fault == "hang":
            time.sleep(600)
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "silence":
            import ctypes
            ctypes.PyDLL(None).sleep(600)  # C code that keeps the interpreter's lock
    return original(self, step)
DistillationLoop.choose_examples = choose
main(RunConfig(), sys.argv[1:])
"""


@pytest.fixture
def start(tiny):
    """Starts two ranks with a fault in the third step of rank 1; they are gone afterwards."""
    started = []

    def run(fault, **changes):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {"name": fault, "train.steps": 6, "faults.hang_s": LIMIT_S} | changes
        overrides = tiny_overrides(tiny, **settings)
        for rank in range(2):
            env = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "FAULT": fault,
            }  # fmt: skip
            started.append(subprocess.Popen(
                [sys.executable, "-c", SCRIPT.format(root=str(ROOT)), *overrides], env=env, cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ))  # fmt: skip
        for line in started[1].stdout:
            if "FAULT" in line:
                break
        return started, time.monotonic()

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.multiprocess
def test_a_rank_that_hangs_is_named_and_every_rank_ends(start):
    (zero, one), began_s = start("hang")
    said = zero.communicate(timeout=120)[1]
    assert one.wait(60) == zero.returncode == EXIT_STUCK
    assert time.monotonic() - began_s < LIMIT_S + 10 * LIMIT_S / 4 + SLACK_S
    assert "rank 1 holds the others up, in phase data of step 3" in said
    assert "rank 0: in phase data of step 3, waiting for other ranks, at toolkit/" in said


@pytest.mark.multiprocess
def test_a_stopped_process_is_named_by_the_other(start):
    (zero, _), _ = start("stop")
    said = zero.communicate(timeout=120)[1]
    assert zero.returncode == EXIT_STUCK and "rank 1 does not answer: its process is dead or stopped" in said


@pytest.mark.multiprocess
def test_a_rank_stuck_in_c_code_ends_though_its_python_is_frozen(start):
    (_, one), began_s = start("silence")
    said = one.communicate(timeout=120)[1]
    assert one.returncode == 1 and "Timeout" in said, said
    assert time.monotonic() - began_s < LIMIT_S + 10 * LIMIT_S / 4 + SLACK_S


@pytest.mark.multiprocess
def test_a_rank_that_waits_in_another_call_is_told_with_both_places(start):
    """Nobody can say which of two is right; both are told, with the lines that they wait in."""
    (zero, one), _ = start("another call")
    said = zero.communicate(timeout=120)[1]
    assert one.wait(60) == zero.returncode == EXIT_STUCK
    assert "The ranks wait in different calls: one of them is out of step." in said
    place = r"toolkit/run/totals\.py:\d+ count_tokens"
    assert re.search(rf"rank 0: in phase data of step 3, waiting for other ranks, at {place}", said)
    assert re.search(r"rank 1: in phase data of step 3, waiting for other ranks, at .*recv", said), said


@pytest.mark.multiprocess
def test_a_rank_that_leaves_a_step_out_ends_the_job(start):
    """The step's own reduction tells it, before an optimizer step is taken."""
    ranks, _ = start("a step less")
    for rank, process in enumerate(ranks):
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert f"this rank is at step {2 + rank}, the mean of all ranks is 2.5" in said


MAIN_RANK_WORKS = """
import sys, time
sys.path.insert(0, {root!r})
from toolkit.ranks import collectives, heartbeat, launch
from toolkit.ranks.watchdog import Watchdog
def work():
    for _ in range(10):
        time.sleep({limit_s} / 5)
        heartbeat.beat() if {beats} else None
launch.start()
with Watchdog({limit_s}):
    collectives.main_rank_first(lambda: work() if collectives.rank() == 0 else None)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("beats", [True, False])
def test_what_rank_0_does_alone_may_take_long_while_it_goes_on(beats):
    """The others wait for as long, without a collective that would end by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    script = MAIN_RANK_WORKS.format(root=str(ROOT), limit_s=LIMIT_S, beats=beats)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        ) for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == ([0, 0] if beats else [EXIT_STUCK] * 2), said
    assert beats or "rank 0 holds the others up" in "".join(said) or "different calls" in "".join(said)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("grace_s", "times", "message"), [
    (600, 2, "SIGTERM again: rank {rank} exits at once"),
    (3, 1, "no step ended within faults.grace_s = 3 s of the signal, rank {rank} exits"),
])  # fmt: skip
def test_ranks_that_cannot_end_their_step_end_by_signal_and_go_on_later(start, tiny, ranks2, grace_s, times, message):
    changes = {
        "name": f"stopped {times}", "faults.hang_s": 600, "faults.grace_s": grace_s, "checkpoint.every_steps": 1,
        "resume": "auto",
    }  # fmt: skip
    ranks, _ = start("hang", **changes)
    for number in range(times):
        if number:
            time.sleep(SAME_REQUEST_S + 1)  # sooner it would be the same request, sent by two
        for process in ranks:
            process.send_signal(signal.SIGTERM)
    for rank, process in enumerate(ranks):
        said = process.communicate(timeout=120)[1]
        assert process.returncode == EXIT_LATER and message.format(rank=rank) in said, said
    code, out, _ = ranks2.run(run_cases.run_saying, tiny_overrides(tiny, train__steps=6, **changes))[0]
    assert code == 0 and "step-00000002, written by 2 ranks" in out


BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes of C code: no handler of Python runs


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("grace_s", "sent_s", "code", "message"),
    [
        (60, {"SIGTERM": [0.5, 3.0]}, EXIT_LATER, "SIGTERM again: rank 0 exits at once"),
        (1, {"SIGUSR1": [0.5]}, EXIT_LATER, "no step ended within faults.grace_s = 1 s"),
        (60, {"SIGINT": [0.5], "SIGTERM": [0.6, 0.7], "SIGKILL": [6.0]}, -9, "SIGINT: the run saves and stops"),
    ],
    ids=["again", "grace", "Ctrl-C, passed on by a launcher too"],
)
def test_what_follows_a_signal_does_not_need_the_main_thread(grace_s, sent_s, code, message):
    script = (
        "import os, signal, threading\nfrom toolkit.ranks.signals import StopSignals\n"
        f"with StopSignals({grace_s}).watched():\n"
        f"    for name, times_s in {sent_s}.items():\n"
        "        for time_s in times_s:\n"
        "            threading.Timer(time_s, os.kill, (os.getpid(), getattr(signal, name))).start()\n"
        f"    {BUSY}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and message in done.stderr


@pytest.mark.multiprocess
def test_a_run_that_has_saved_nothing_is_not_to_be_repeated():
    script = (
        "import os, signal, threading\nfrom toolkit.ranks.signals import StopSignals\n"
        "with StopSignals(1).watched() as signals:\n"
        "    signals.in_vain = True\n"
        "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()\n"
        f"    {BUSY}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "nothing was saved since the start" in done.stderr


@pytest.mark.multiprocess
def test_a_job_that_is_too_short_for_its_start_is_not_repeated_for_ever(tmp_path):
    """One start may be ended early, by a preemption; the second in a row shows that the time does not do."""
    script = (
        "import os, pathlib, signal, sys, threading\nfrom toolkit.ranks.signals import StopSignals\n"
        "with StopSignals(0.5).watched() as signals:\n"
        f"    signals.count_start(pathlib.Path({str(tmp_path / 'starts')!r}))\n"
        "    signals.kept() if sys.argv[1:] else None\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()\n"
        f"    {BUSY}"
    )
    codes = []
    for kept in ([], [], ["kept"], [], []):
        done = subprocess.run([sys.executable, "-c", script, *kept], cwd=ROOT, capture_output=True, text=True)
        codes.append(done.returncode)
    assert codes == [EXIT_LATER, 2, EXIT_LATER, EXIT_LATER, 2]
    assert "2 starts in a row have saved nothing: give the job more time" in done.stderr


def test_a_rank_that_srun_started_knows_its_place_before_it_joins(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert started_as() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert started_as() == (3, 4)
    told, joined = [], {"RANK": "2", "WORLD_SIZE": "4"}
    watchdog = Watchdog(0.2, end=lambda text, code: told.append(text))
    with watchdog, pytest.MonkeyPatch.context() as later:
        for name, value in joined.items():  # as `distributed.start` does, after the watchdog
            later.setenv(name, value)
        until_s = time.monotonic() + 20
        while not told and time.monotonic() < until_s:
            time.sleep(0.05)
    assert told and "rank 2 of 4 found no other rank" in told[0]


@pytest.mark.multiprocess
def test_a_forked_child_has_its_signals_to_itself():
    """Pools of workers end theirs by SIGTERM."""
    script = (
        "import os, signal, sys, time\nfrom toolkit.ranks.signals import StopSignals\n"
        "with StopSignals(60).watched() as signals:\n"
        "    child = os.fork()\n"
        "    time.sleep(0.5 if child else 60)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    status = os.waitpid(child, 0)[1]\n"
        "    time.sleep(0.3)\n"
        "sys.exit(int(signals.received or os.WTERMSIG(status) != signal.SIGTERM))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120).returncode == 0


def test_verdicts():
    waits = Sign(step=3, phase="student", changes=20, waits=True)
    held = Sign(step=3, phase="student", changes=20)
    behind = Sign(step=2, phase="rollout", changes=15, waits=True)
    assert "rank 1 holds the others up, in phase student of step 3" in verdict({0: waits, 1: held}, set(), 9)
    assert "rank 2 holds the others up, in phase rollout of step 2" in verdict(
        {0: waits, 1: waits, 2: behind}, set(), 9
    )
    assert "All ranks stand in the same place" in verdict({0: waits, 1: waits}, set(), 9)
    elsewhere = dataclasses.replace(waits, where="at toolkit/run/loop.py:9 save")
    assert "wait in different calls" in verdict({0: waits, 1: elsewhere}, set(), 9)
    assert "rank 1 does not answer" in verdict({0: waits, 1: held}, {1}, 9)


def test_a_rank_inside_of_an_agreement_waits_for_others():
    """There it may wait without any collective of torch: for what rank 0 does alone."""
    entered, over = threading.Event(), threading.Event()

    def work():
        entered.set()
        over.wait()

    for call, waits in ((lambda: collectives.together(work), True), (work, False)):
        entered.clear()
        over.clear()
        thread = threading.Thread(target=call)
        thread.start()
        entered.wait()
        assert _where(thread.ident)[1] is waits
        over.set()
        thread.join()
