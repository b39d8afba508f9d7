"""The files of an evaluation: a line for each answer, and a summary that says by which settings they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Records:
    """`out` is the jsonl file of answers, with `NAME.summary.json` beside it; without that ending it is a folder for
    `rows.jsonl` and `summary.json`. For one rank; raises ValueError where what is there does not fit."""

    def __init__(self, out: Path):
        is_file = out.suffix == ".jsonl"
        self.rows = out if is_file else out / "rows.jsonl"
        self.summary = out.with_suffix(".summary.json") if is_file else out / "summary.json"
        self.lock = out.with_name(out.name + ".lock") if is_file else out / "lock"

    def open(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The summary to go on with; a new one where nothing came of the last. A line that a kill cut off is taken out.

        Raises ValueError, with both values, where the answers that are there were made with other settings.
        """
        self.rows.parent.mkdir(parents=True, exist_ok=True)
        text = self.rows.read_bytes() if self.rows.is_file() else b""
        summary = json.loads(self.summary.read_text()) if self.summary.is_file() else None
        whole = text.rfind(b"\n") + 1
        if whole and summary is None:
            raise ValueError(f"{self.rows} has answers, but {self.summary} is missing, which says how they were made")
        if not whole and not (summary and any("metrics" in entry for entry in summary["models"].values())):
            summary = {"settings": dict(settings), "models": {}}
            self.write_summary(summary)
        refuse_changes(str(self.rows), summary["settings"], settings)
        if whole < len(text):
            os.truncate(self.rows, whole)
        return summary

    def of_model(self, model: str) -> dict[tuple[int, int], dict[str, Any]]:
        """(seed, row) -> line of this model."""
        found = (record for record in self._lines() if record["model"] == model)
        return {(record["seed"], record["row"]): record for record in found}

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        with self.rows.open("a") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, model: str, records: Iterable[Mapping[str, Any]]) -> None:
        """This model's lines anew, in their places: a metric was added."""
        new = iter(records)
        lines = [next(new) if record["model"] == model else record for record in self._lines()]
        _write(self.rows, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in lines))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
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
    changes = [f"{n} was {old.get(n)!r}, is {new.get(n)!r}" for n in sorted({*old, *new}) if old.get(n) != new.get(n)]
    if changes:
        raise ValueError(
            f"{what} holds answers that were made with other settings:\n  "
            + "\n  ".join(changes)
            + "\nset these back, or give --out another name"
        )


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)
