import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest

from toolkit.models.ds_config import student_ds_config
from toolkit.ranks.memory import peak_device_gib, peak_rss_gib
from toolkit.run.monitor import Monitor, read_metrics
from toolkit.run.timer import PhaseTimer
from toolkit.settings import ModelConfig, RunConfig
from toolkit.tables import format_table


def lines(run_dir):
    return (run_dir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.multiprocess
def test_lines_that_found_no_room_come_later_and_none_is_torn(tmp_path):
    """A real limit on the file's size, as a full disk: longer than any buffer, in the middle of a line."""
    script = (
        "import json, resource, signal, sys\nfrom toolkit.run.monitor import Monitor\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"with Monitor({str(tmp_path)!r}, total_steps=60, rank=0, progress=False) as monitor:\n"
        "    for step in range(1, 61):\n"
        "        limit = 3333 if 5 < step < 50 else resource.RLIM_INFINITY\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "        monitor.log_step({'step': step, 'loss': 1.0, 'text': 'x' * 500})\n"
        f"        lines = open({str(tmp_path / 'metrics.jsonl')!r}).read().splitlines()\n"
        "        assert all(json.loads(line)['step'] == n for n, line in enumerate(lines, 1))\n"
        "        assert step >= 50 or len(lines) == min(step, 6), (step, len(lines))\n"
        "    assert len(lines) == 60\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "could not be written: [Errno " in done.stdout


def test_one_json_line_per_step_and_at_once(tmp_path):
    monitor = Monitor(tmp_path / "new", total_steps=2, rank=0, progress=False)
    monitor.log_step({"step": 1, "loss": 0.5, "source": "REPLAY", "seconds": {"teacher": 1.5}})
    expected = {"step": 1, "loss": 0.5, "source": "REPLAY", "seconds": {"teacher": 1.5}}
    assert [json.loads(line) for line in lines(tmp_path / "new")] == [expected]  # the file is still open
    monitor.close()
    monitor.close()


def test_not_finite_values_are_valid_json_and_come_back(tmp_path):
    with Monitor(tmp_path, total_steps=1, rank=0, progress=False) as monitor:
        monitor.log_step({"step": 1, "loss": math.nan, "norms": [math.inf, -math.inf, 1.0]})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    written = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    assert written == {"step": 1, "loss": "NaN", "norms": ["Infinity", "-Infinity", 1.0]}
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"]) and record["norms"] == [math.inf, -math.inf, 1.0]


def test_other_ranks_write_nothing(tmp_path, capsys):
    with Monitor(tmp_path / "run", total_steps=1, rank=1, progress=True) as monitor:
        monitor.log_step({"step": 1})
        monitor.note("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"loss": 1.0}, r"integer 'step', this one has None; its keys: \['loss'\]"),
        ({"step": 1.0}, "integer 'step', this one has 1.0"),
        ({"step": 1, "outer": {"inner": object()}}, "record.outer.inner is of type object"),
    ],
)
def test_bad_records_are_refused_and_leave_no_line(tmp_path, record, message):
    with (
        Monitor(tmp_path, total_steps=1, rank=0, progress=False) as monitor,
        pytest.raises(ValueError, match=message),
    ):
        monitor.log_step(record)
    assert lines(tmp_path) == []


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    with Monitor(tmp_path, total_steps=9, rank=0, progress=False) as monitor:
        for step in (1, 2, 3, 4):
            monitor.log_step({"step": step, "loss": float(step), "first_run": True})
        monitor.log_step({"step": 4, "validation_loss": 0.25})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed inside the write
    with Monitor(tmp_path, total_steps=9, rank=0, progress=False, start_step=2) as monitor:
        monitor.log_step({"step": 3, "loss": 30.0})
        monitor.log_step({"step": 3, "validation_loss": 0.5})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 1.0, "first_run": True},
        {"step": 2, "loss": 2.0, "first_run": True},
        {"step": 3, "loss": 30.0, "validation_loss": 0.5},
    ]


def test_plain_lines_are_few_and_hold_the_numbers(tmp_path, capsys):
    with Monitor(tmp_path, total_steps=25, rank=0, progress=False, line_every_steps=10, start_step=2) as monitor:
        for step in range(3, 26):
            monitor.log_step({"step": step, "loss": 1.23456, "phi": 0.5, "tokens_per_s": 12345.6})
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "step 3/25",
        "step 10/25",
        "step 20/25",
        "step 25/25",
    ]
    assert "loss 1.2346  phi 0.500  tokens_per_s 12,346  left 00:00" in out.splitlines()[-1]
    assert err == ""


def test_time_left_is_from_this_process_rate(tmp_path, capsys, monkeypatch):
    clock_s = iter([100.0, 130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock_s))
    with Monitor(tmp_path, total_steps=50, rank=0, progress=False, start_step=10, line_every_steps=20) as monitor:
        monitor.log_step({"step": 20})  # 10 steps in 30 s, 30 to go
    assert capsys.readouterr().out == "step 20/50  left 01:30\n"


def test_bar_goes_to_stderr_and_starts_at_the_resumed_step(tmp_path, capsys):
    with Monitor(tmp_path, total_steps=4, rank=0, progress=True, start_step=2) as monitor:
        monitor.note("validation: 0.25")
        monitor.log_step({"step": 3, "loss": 0.5})
        monitor.bar.refresh()
    out, err = capsys.readouterr()
    assert "3/4" in err and "loss=0.5000" in err
    assert out.replace("\r", "").strip() == "validation: 0.25"


def test_no_bar_where_stderr_is_a_file(tmp_path):
    assert Monitor(tmp_path, total_steps=1, rank=0).bar is None


def test_a_monitor_that_fails_loses_no_run_and_is_told_once(tmp_path, capsys):
    class Down:
        def write_events(self, events):
            if events[0][2] < 4:
                raise ConnectionError("no route")

    with Monitor(tmp_path, total_steps=5, rank=0, deepspeed_monitor=Down(), progress=False) as monitor:
        for step in range(1, 6):
            monitor.log_step({"step": step, "loss": 1.0})
    said = capsys.readouterr().out
    assert said.count("warning: deepspeed's monitors miss step") == 1 and "step 1: ConnectionError: no route" in said
    assert len(lines(tmp_path)) == 5


WRITER = """
import os, sys
import deepspeed
from toolkit.run.monitor import Monitor, monitor_master
deepspeed.init_distributed("gloo", verbose=False)
rank, run_dir = int(os.environ["RANK"]), sys.argv[1]
config = {"bf16": {}, "tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}}
assert monitor_master({"tensorboard": {"enabled": False}}, run_dir, rank) is None
master = monitor_master(config, run_dir, rank)
assert (master is None) == (rank != 0)
assert config["tensorboard"] == {"enabled": True}
with Monitor(run_dir, 2, rank, deepspeed_monitor=master, progress=False) as monitor:
    for step in (1, 2):
        record = {"step": step, "loss": 1 / step, "source": "DATASET", "seconds": {"teacher": 2.0 * step}}
        monitor.log_step(record)
"""


@pytest.mark.multiprocess
def test_deepspeed_monitor_gets_every_number_from_rank_0_only(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        # Long, because the first run builds deepspeed's operator, which takes minutes on a busy machine.
        outputs = [rank.communicate(timeout=550)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)

    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "seconds/teacher"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("seconds/teacher")] == [(1, 2.0), (2, 4.0)]
    assert (tmp_path / "csv_monitor" / "loss.csv").read_text().split() == ["step,loss", "1,1.0", "2,0.5"]
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 0.5]


def test_an_engine_is_given_no_monitors(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "wandb": {"enabled": True}}))
    config = RunConfig(student=ModelConfig(path="x", ds_config=str(tmp_path / "ds.json")))
    given = student_ds_config(config, "fp32", world=1)
    assert given["zero_optimization"] == {"stage": 2} and "wandb" not in given


def test_phases_and_other_sum_to_the_wall_time(monkeypatch):
    syncs, clock_s = [], [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock_s[0])

    def passes(seconds):
        clock_s[0] += seconds

    timer = PhaseTimer(sync=lambda: syncs.append(1))
    with timer.phase("teacher"):
        passes(0.03)
    passes(0.02)
    with timer.phase("student"):
        passes(0.01)
    with timer.phase("teacher"):
        passes(0.04)
    seconds = timer.take()
    assert list(seconds) == ["teacher", "student", "other"]
    assert seconds == pytest.approx({"teacher": 0.07, "student": 0.01, "other": 0.02})
    assert len(syncs) == 1 + 2 * 3 + 1  # construction, both edges of each phase, take

    with timer.phase("student"):
        passes(0.5)
    second = timer.take()
    assert second == pytest.approx({"student": 0.5, "other": 0.0})
    assert timer.totals["student"] == seconds["student"] + second["student"]
    assert sum(timer.totals.values()) == pytest.approx(sum(seconds.values()) + sum(second.values()))


def test_phases_do_not_nest_and_survive_an_exception():
    timer = PhaseTimer()
    with timer.phase("outer"):
        with pytest.raises(AssertionError, match="'inner' inside phase 'outer'"), timer.phase("inner"):
            pass
        with pytest.raises(AssertionError, match="inside phase 'outer'"):
            timer.take()
    with pytest.raises(RuntimeError), timer.phase("broken"):
        raise RuntimeError
    assert set(timer.take()) == {"outer", "broken", "other"}


def test_peak_rss_is_a_high_mark_in_gib():
    before_gib = peak_rss_gib()
    block = bytearray(b"x" * 2**28)
    with_block_gib = peak_rss_gib()
    del block
    assert with_block_gib - before_gib > 0.2 or before_gib > 0.5
    assert peak_rss_gib() >= with_block_gib
    assert peak_device_gib() >= 0.0


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is inherited on Linux")
def test_peak_rss_of_a_small_child_is_not_its_parent_s():
    block = bytearray(b"x" * 2**30)
    code = "from toolkit.ranks.memory import peak_rss_gib; print(peak_rss_gib())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    child_gib = float(child.stdout)
    assert child_gib < 0.9 < peak_rss_gib()
    del block


def test_table_is_aligned_and_shows_numbers_to_the_right():
    table = format_table(["name", "GiB", "tokens/s"], [["student", 1.23456, 12345.6], ["teacher of it", 13, None]])
    assert table == "\n".join(
        [
            "| name          |   GiB | tokens/s |",
            "|:--------------|------:|---------:|",
            "| student       | 1.235 |   12,346 |",
            "| teacher of it |    13 |        - |",
        ]
    )
    assert format_table(["a"], []) == "| a |\n|---|"
    with pytest.raises(ValueError, match="a row of 1 cells under 2 headers"):
        format_table(["a", "b"], [[1]])
