"""The files of an evaluation: a line for each answer, and a summary that says by which settings they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolkit.storage.appear import new_file
from toolkit.storage.differences import differences, refuse
from toolkit.storage.manifest import read_json


class Records:
    """`out` is the jsonl file of answers, with `NAME.summary.json` beside it; without that ending it is a folder for
    `rows.jsonl` and `summary.json`. `lock` is the file for `sole_use`. For rank 0 alone."""

    def __init__(self, out: Path):
        is_file = out.suffix == ".jsonl"
        self.rows = out if is_file else out / "rows.jsonl"
        self.summary = out.with_suffix(".summary.json") if is_file else out / "summary.json"
        self.lock = out.with_name(out.name + ".lock") if is_file else out / "lock"

    def open(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The summary to go on with; a new one where nothing came of the last. A line that a kill cut off is taken out.
        Raises ValueError, with both values, where the answers that are there were made with other settings."""
        self.rows.parent.mkdir(parents=True, exist_ok=True)
        text = self.rows.read_bytes() if self.rows.is_file() else b""
        summary = read_json(self.summary) if self.summary.is_file() else {}
        # Answers are of use with their summary, and a summary with answers or a score.
        whole = text.rfind(b"\n") + 1
        if whole and not summary:
            raise ValueError(f"{self.rows} has answers, but {self.summary} is missing, which says how they were made")
        if not whole and not any("metrics" in entry for entry in summary.get("models", {}).values()):
            summary = {"settings": dict(settings), "models": {}}
            self.write_summary(summary)
        refuse_changes(str(self.rows), summary["settings"], settings)
        if whole < len(text):  # what a kill cut off
            os.truncate(self.rows, whole)
        return summary

    def of_model(self, model: str) -> dict[tuple[int, int], dict[str, Any]]:
        """(seed, row) -> line of this model."""
        found = (record for record in self._lines() if record["model"] == model)
        return {(record["seed"], record["row"]): record for record in found}

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds these lines; they are on disk when this returns."""
        with self.rows.open("a") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, model: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Replaces this model's lines, as many as there are, in their places: a metric was added."""
        # Lines of other models stay in between.
        new = iter(records)
        lines = [next(new) if record["model"] == model else record for record in self._lines()]
        _write(self.rows, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in lines))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces the summary; it is on disk when this returns."""
        _write(self.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def _lines(self) -> Iterable[dict[str, Any]]:
        if not self.rows.is_file():
            return
        with self.rows.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{self.rows}:{number}: not valid JSON ({error}); delete the line") from error


def refuse_changes(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError that names each setting with both values."""
    remedy = "set these back, or give --out another name"
    refuse(f"{what} holds answers that were made with other settings", differences(old, new).values(), remedy)


def _write(path: Path, text: str) -> None:
    # Hours may have gone into the answers, and without their summary nothing can be added to them.
    with new_file(path, durable=True) as unfinished:
        unfinished.write_text(text)
