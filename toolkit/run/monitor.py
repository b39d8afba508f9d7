"""What a run tells: metrics.jsonl, a progress bar or plain lines, deepspeed's monitor, seconds, peaks.

Numbers arrive here already summed over ranks; only rank 0 writes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from toolkit.models.ds_config import MONITOR_SECTIONS
from toolkit.ranks.output import say

METRICS_FILE = "metrics.jsonl"


class Monitor:
    """Writes one record per optimizer step on rank 0; on other ranks every method does nothing.

    run_dir: gets `metrics.jsonl`; made if missing. A resumed run appends lines too: see `read_metrics`.
    start_step: optimizer steps done before this process, after a resume.
    deepspeed_monitor: from `monitor_master`, or None.
    progress: True for a bar on stderr, False for a plain line on stdout every `line_every_steps`;
        None picks the bar if stderr is a terminal, so that log files stay short.
    keep_bytes: of an older metrics file, after a resume: its `position` at the checkpoint. None keeps all.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        rank: int,
        deepspeed_monitor: Any = None,
        progress: bool | None = None,
        start_step: int = 0,
        line_every_steps: int = 10,
        keep_bytes: int | None = None,
    ) -> None:
        self.is_writer = rank == 0
        if not self.is_writer:
            return
        self.total_steps, self.start_step, self.line_every_steps = total_steps, start_step, line_every_steps
        self.deepspeed_monitor = deepspeed_monitor
        self.started_s = time.monotonic()

        # What this start will repeat is cut off the file, and a line that a kill has torn is ended.
        path = Path(run_dir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a+b", buffering=0)
        self._unwritten = b""  # lines that found no room yet
        self._misses = False  # whether deepspeed's monitors could not be reached last time
        end = self.file.seek(0, 2)
        if keep_bytes is not None and keep_bytes < end:
            end = self.file.truncate(keep_bytes)
        if end and os.pread(self.file.fileno(), 1, end - 1) != b"\n":
            self.file.write(b"\n")
        self.bar = None
        if sys.stderr.isatty() if progress is None else progress:
            self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def start(self) -> None:
        """The first step begins now: time left is counted from here, without what came before."""
        if self.is_writer:
            self.started_s = time.monotonic()
            if self.bar is not None:
                self.bar.unpause()

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Writes `record`; its "step" counts finished optimizer steps from 1.

        The display shows loss, phi and tokens_per_s where the record has them. Values are numbers, strings,
        booleans, None, and mappings or sequences of them. JSON has no NaN or infinity: they are written as
        the strings "NaN", "Infinity", "-Infinity", which `read_metrics` turns back. Numbers also go to
        deepspeed's monitor, those of an inner mapping as "outer/inner".

        Raises ValueError for a record without an integer step, and for a value that JSON cannot hold.
        """
        if not self.is_writer:
            return
        step = record.get("step")
        if type(step) is not int:
            raise ValueError(f"a record needs an integer 'step', this one has {step!r}; its keys: {list(record)}")

        # A line that finds no room on the disk is written with a later one.
        self._unwritten += json.dumps(_to_json(record, "record"), allow_nan=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            self.note(f"warning: {self.file.name} could not be written: {error}")

        # DeepSpeed's monitors may fail, on a full disk or without a network: only the first miss is told.
        if self.deepspeed_monitor is not None:
            events = [(name, value, step) for name, value in _scalars(record) if name != "step"]
            try:
                self.deepspeed_monitor.write_events(events)
                self._misses = False
            except Exception as error:
                if not self._misses:
                    self.note(f"warning: deepspeed's monitors miss step {step}: {type(error).__name__}: {error}")
                self._misses = True
        self._show(step, record)

    def _write(self) -> None:
        """All lines that wait, or none of them."""
        end = self.file.seek(0, 2)
        try:
            written = self.file.write(self._unwritten)
            if written < len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.file.truncate(end)
            raise
        self._unwritten = b""

    def position(self) -> int:
        """Bytes of metrics that are safely on disk now; 0 on other ranks."""
        if not self.is_writer:
            return 0
        os.fsync(self.file.fileno())
        return self.file.seek(0, 2)

    def note(self, text: str) -> None:
        """Prints one line to stdout on rank 0, above the bar where there is one."""
        if self.is_writer:
            say(text, write=print if self.bar is None else tqdm.write)

    def close(self) -> None:
        """Closes the file and the bar; more than once is harmless."""
        if self.is_writer:
            with suppress(OSError, ValueError):  # told when it was written; closed before
                self._write()
            self.file.close()
            if self.bar is not None:
                self.bar.close()
            if self.deepspeed_monitor is not None:
                _finish(self.deepspeed_monitor)
                self.deepspeed_monitor = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _show(self, step: int, record: Mapping[str, Any]) -> None:
        formats = {"loss": "{:.4f}", "phi": "{:.3f}", "tokens_per_s": "{:,.0f}"}
        shown = {name: form.format(record[name]) for name, form in formats.items() if record.get(name) is not None}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.line_every_steps == 0 or step in (self.start_step + 1, self.total_steps):
            elapsed_s = time.monotonic() - self.started_s
            left_s = (self.total_steps - step) * elapsed_s / max(1, step - self.start_step)
            fields = [f"{name} {value}" for name, value in shown.items()]
            say("  ".join([f"step {step}/{self.total_steps}", *fields, f"left {tqdm.format_interval(left_s)}"]))


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `run_dir`, steps rising; each is the run's last word on its step.

    A run that resumes from a checkpoint repeats steps. A record of an earlier step than the one before it
    therefore drops what was read from that step on; records of the same step are merged. Lines cut off by a
    kill are skipped.
    """
    records: list[dict[str, Any]] = []
    for line in (Path(run_dir) / METRICS_FILE).read_bytes().splitlines():
        try:
            record = _from_json(json.loads(line))
        except ValueError:
            continue
        if records and record["step"] < records[-1]["step"]:
            records = [before for before in records if before["step"] < record["step"]]
        if records and record["step"] == records[-1]["step"]:
            records[-1].update(record)
        else:
            records.append(record)
    return records


def monitor_master(ds_config: Mapping[str, Any], run_dir: str | Path, rank: int) -> Any:
    """deepspeed's MonitorMaster from the config's own sections (MONITOR_SECTIONS), or None.

    None on ranks other than 0 and where no section is enabled. Files go to run_dir/tensorboard and
    run_dir/csv_monitor unless the section says otherwise. deepspeed's process group must exist.

    Raises ValueError for an unknown key in a section (pydantic's), and for a service that cannot be started.
    """
    sections = {name: dict(ds_config[name]) for name in MONITOR_SECTIONS if ds_config.get(name, {}).get("enabled")}
    if rank != 0 or not sections:
        return None
    # Here, because this import takes seconds that the other users of this file are spared.
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    for name in {"tensorboard", "csv_monitor"} & sections.keys():
        sections[name] = {"output_path": str(run_dir), "job_name": name} | sections[name]
    config = get_monitor_config(sections)
    try:
        return MonitorMaster(config)
    except Exception as error:  # each service has errors of its own
        raise ValueError(
            f"the monitors that the student's ds_config enables ({', '.join(sections)}) could not be started: "
            f"{type(error).__name__}: {error}; install what is missing, or take the section out"
        ) from error


def _finish(master: Any) -> None:
    """End what `master` opened: the next stage of this process would log on into its W&B run, which takes no step that
    it has seen."""
    with suppress(Exception):
        if master.wandb_monitor is not None and master.wandb_monitor.enabled:
            import wandb

            wandb.finish()
    with suppress(Exception):
        if master.tb_monitor is not None and master.tb_monitor.enabled:
            master.tb_monitor.summary_writer.close()


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, value


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _to_json(inner, f"{where}.{name}") for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"{where} is of type {type(value).__name__}, which JSON cannot hold; pass a number")


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _from_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_from_json(inner) for inner in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
