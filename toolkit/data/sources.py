"""Rows of text from the built-in data set, from files, or from the hub.

Every row leaves here as {"prompt": str, "input": str, "response": str}, whatever the source calls its fields. Where
the response is a list of texts, "response" is the first, and "references" holds all of them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from toolkit.data.config import PYTHON_DOCS, DataConfig
from toolkit.data.python_docs import python_docs_rows

BUILDERS = {
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}  # of the `datasets` library
SUFFIXES = (".jsonl", *BUILDERS)
HUB_FILES = "hf://datasets/"
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def load_rows(config: DataConfig, source: str, is_validation: bool = False) -> tuple[list[dict], int]:
    """The usable rows of `source`, at most `config.max_rows`, and how many rows were skipped on the way.

    `is_validation` picks the validation split where a source has splits ("python_docs", the hub).

    Raises ValueError, naming the source and the line or row, for a missing or empty file, a broken line, a
    row without a field, prompt or response (unless config.on_bad_row is "skip"), and where no usable row is
    left.
    """
    rows, skipped, first_reason = [], 0, ""
    for where, row in _records(config, source, is_validation):
        if len(rows) == config.max_rows:
            break
        try:
            rows.append(_checked(row, where, config))
        except ValueError as error:
            if config.on_bad_row == "stop":
                raise ValueError(f'{error}, or set data.on_bad_row to "skip"') from None
            skipped, first_reason = skipped + 1, first_reason or str(error)
    if not rows:
        why = f"all {skipped} were skipped, the first because: {first_reason}" if skipped else "it holds none"
        raise ValueError(f"{source}: no usable row; {why}")
    return rows, skipped


def references(row: dict) -> list[str]:
    """The texts that an answer to this row is held against, one at least."""
    return row.get("references") or [row["response"]]


def _checked(row: object, where: str, config: DataConfig) -> dict:
    """One row under the names used from here on; ValueError if it is of no use."""
    if isinstance(row, Exception):
        raise ValueError(f"{where}: not valid JSON ({row}); mend the line")
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object with fields; mend the line")
    row = _flattened(row, where)
    out = {}
    for name, field in (
        ("prompt", config.prompt_field),
        ("input", config.input_field),
        ("response", config.response_field),
    ):
        if field is None:
            out[name] = ""
            continue
        if field not in row:
            raise ValueError(
                f"{where}: no field {field!r}, the row has {', '.join(map(repr, row)) or 'none'}; "
                f"set data.{name}_field to one of these"
            )
        value = row[field]
        if name == "input" and value is None:
            value = ""
        if name == "response" and isinstance(value, list) and all(isinstance(text, str) for text in value):
            out["references"] = [text for text in value if text.strip()]
            value = next(iter(out["references"]), "")
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{where}: {field!r} is {value!r:.60} ({type(value).__name__}), not text; make it a string"
            )
        if name != "input" and not (value or "").strip():
            raise ValueError(f"{where}: {field!r} is empty ({value!r:.60}); give the row a {name}")
        out[name] = value
    return out


def _flattened(row: dict, where: str) -> dict:
    """Self-Instruct keeps input and outputs of a row in a list, "instances"."""
    instances = row.get("instances")
    if not isinstance(instances, list) or not all(isinstance(one, dict) and "output" in one for one in instances):
        return row
    inputs = {one.get("input") or "" for one in instances}
    if len(inputs) > 1:
        raise ValueError(f"{where}: 'instances' with {len(inputs)} different inputs; make a row of each")
    return row | {"input": "".join(inputs), "output": [one["output"] for one in instances]}


def _records(config: DataConfig, source: str, is_validation: bool) -> Iterator[tuple[str, object]]:
    """(where, row) in the source's order; a row that could not be read is the exception that said so."""
    if source == PYTHON_DOCS:
        rows = python_docs_rows("validation" if is_validation else "train", config.cache_dir)
        yield from ((f"{source} row {number}", row) for number, row in enumerate(rows, 1))
        return
    if source.startswith(HUB_FILES):
        yield from _lines(source, _hub_file(source, config))
        return
    path = Path(source).expanduser()
    if not _looks_like_path(source, path):
        yield from _table(config, source, is_validation)
        return
    if not path.is_file():
        what = "a folder" if path.is_dir() else "missing"
        raise ValueError(f"{source}: the file is {what} (looked at {path.absolute()}); give the path of a data file")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{source}: unknown ending {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{source}: the file is empty (0 bytes)")
    yield from (
        _lines(source, path) if path.suffix.lower() == ".jsonl" else _table(config, source, is_validation, path)
    )


def _hub_file(source: str, config: DataConfig) -> Path:
    """The local copy of hf://datasets/OWNER/NAME/FILE.jsonl."""
    from huggingface_hub import hf_hub_download

    owner, name, file = [*source.removeprefix(HUB_FILES).split("/", 2), "", ""][:3]
    if not file.endswith(".jsonl"):
        raise ValueError(f"{source}: write {HUB_FILES}OWNER/NAME/FILE.jsonl")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", cache_dir=config.cache_dir))
    except Exception as error:  # of the network, the hub or the cache: a dozen kinds
        raise ValueError(
            f"{source} is not in the cache, and the hub did not give it: {type(error).__name__}: {error}. Check the "
            "network, or download the file and give its path"
        ) from error


def _looks_like_path(source: str, path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or path.exists() or not HUB_NAME.fullmatch(source)


def _lines(source: str, path: Path) -> Iterator[tuple[str, object]]:
    """jsonl, read here and not by `datasets`, so that a broken line can be named. Blank lines pass."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                row = error
            yield f"{source}:{number}", row


def _table(
    config: DataConfig, source: str, is_validation: bool, path: Path | None = None
) -> Iterator[tuple[str, object]]:
    """Rows of a file (`path`) or of the hub (no `path`) through the `datasets` library."""
    import datasets  # takes a second, and python_docs and jsonl do without

    try:
        if path is None:
            split = config.validation_split if is_validation else config.split
            table = datasets.load_dataset(source, config.subset, split=split, cache_dir=config.cache_dir)
        else:
            options = _csv_options(path) if path.suffix.lower() == ".csv" else {}
            builder, cache_dir = BUILDERS[path.suffix.lower()], config.cache_dir
            table = datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=cache_dir, **options)
    except Exception as error:  # the library raises a dozen kinds, and the cause is often the more telling one
        reason = f"{type(error).__name__}: {error}" + (f" ({error.__cause__})" if error.__cause__ else "")
        if path is not None:
            raise ValueError(f"{source}: could not be read as {path.suffix[1:]}: {reason}") from error
        raise ValueError(
            f"{source}: no such file here, and the hub's data set of that name (subset "
            f"{config.subset}, split {split}) "
            f"could not be loaded: {reason}. Check the name and the network; {PYTHON_DOCS!r} needs neither"
        ) from error
    for number, row in enumerate(table, 1):
        yield f"{source} row {number}", row


def _csv_options(path: Path) -> dict:
    """Every column as text: pandas would take "None" and "NA" for missing, "007" for a number."""
    import datasets

    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "na_filter": False}
