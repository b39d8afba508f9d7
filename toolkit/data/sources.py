"""Rows from the built-in data set, from files, or from the hub, and what they were made of as one hash.

A row of instructions leaves here as a `Row`, whatever the source calls its fields.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from toolkit.data.minillm import LAYOUT, SETS, has_test
from toolkit.data.python_docs import python_docs_rows
from toolkit.ranks import heartbeat
from toolkit.settings import PYTHON_DOCS, DataConfig
from toolkit.storage.manifest import sha256

#: ending -> builder of the `datasets` library
BUILDERS = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = (".jsonl", *BUILDERS)
HUB_FILES = "hf://datasets/"
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
#: roles as ShareGPT and others write them
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

Turn = dict[str, str]  # of a conversation: role and content


class Row(TypedDict):
    """An instruction. messages: where it was a conversation, the turns before the response. references: of a row with
    several responses, all of them."""

    prompt: str
    input: str
    response: str
    messages: NotRequired[list[Turn]]
    references: NotRequired[list[str]]


@dataclass(frozen=True)
class Source:
    """A data set's name (a file, a hub name, "python_docs") and which part of it is meant. MiniLLM's sets are files."""

    name: str
    subset: str | None = None
    split: str = "train"
    cache_dir: str | None = None

    @classmethod
    def of(cls, config: DataConfig, name: str, is_validation: bool) -> Source:
        """The part of `name` that the settings train on, or validate on."""
        split = config.validation_split if is_validation else config.split
        if name == PYTHON_DOCS:
            split = "validation" if is_validation else "train"
        if name in SETS:
            name = SETS[name].validation if is_validation else SETS[name].train
        return cls(name, config.subset, split, config.cache_dir)


def as_it_reads(config: DataConfig, source: str, is_validation: bool = False) -> DataConfig:
    """`config` for this source: a set of MiniLLM has its own fields, and a limit to its validation rows."""
    if source not in SETS:
        return config
    most = SETS[source].max_rows if is_validation else None
    return dataclasses.replace(config, max_rows=config.max_rows or most, **LAYOUT)


def load_rows(config: DataConfig, source: str, is_validation: bool = False) -> tuple[list[Row], int]:
    """The usable rows of `source`, at most `config.max_rows`, and how many rows were skipped on the way.

    `is_validation` picks the validation split where a source has splits ("python_docs", the hub). Without it, rows
    whose prompts are in the papers' test of a set known by name are skipped: its file for training may hold them too.
    Raises ValueError, naming the source and the line or row, for a missing or empty file, a broken line, a row without
    a field, prompt or response (unless config.on_bad_row is "skip"), and where no usable row is left.
    """
    config = as_it_reads(config, source, is_validation)
    # Prompts that may not be trained on.
    tested = set()
    if has_test(source) and not is_validation:
        whole = dataclasses.replace(config, max_rows=None, on_bad_row="skip")
        tested = {_words(row) for row in load_rows(whole, source, is_validation=True)[0]}
    # Each row is used, skipped for a reason, or ends the run.
    rows: list[Row] = []
    skipped, first_reason = 0, ""
    for where, record in records(Source.of(config, source, is_validation)):
        if len(rows) == config.max_rows:
            break
        reason = ""
        try:
            row = _checked(record, where, config)
            if _words(row) in tested:
                reason = f"{where}: its prompt is in the test of {source}"
        except ValueError as error:
            if config.on_bad_row == "stop":
                raise ValueError(f'{error}, or set data.on_bad_row to "skip"') from None
            reason = str(error)
        if reason:
            skipped, first_reason = skipped + 1, first_reason or reason
        else:
            rows.append(row)
    if not rows:
        why = f"all {skipped} were skipped, the first because: {first_reason}" if skipped else "it holds none"
        raise ValueError(f"{source}: no usable row; {why}")
    return rows, skipped


def _words(row: Row) -> tuple[str, ...]:
    """By which prompts are compared: white space does not count."""
    return (*row["prompt"].split(), "", *row["input"].split())


def references(row: Row) -> list[str]:
    """The texts that an answer to this row is held against, one at least."""
    return row.get("references") or [row["response"]]


def _checked(record: object, where: str, config: DataConfig) -> Row:
    """A record under the names used from here on. Raises ValueError if it is of no use."""
    found = _flattened(as_object(record, where), where)
    if config.messages_field is not None:
        return _conversation(field_of(found, config.messages_field, "data.messages_field", where, True), where)
    row: Any = {}  # a Row, field by field
    fields = {"prompt": config.prompt_field, "input": config.input_field, "response": config.response_field}
    for name, field in fields.items():
        if field is None:
            row[name] = ""
            continue
        value = field_of(found, field, f"data.{name}_field", where, True)
        # Of several responses the first is learned, and all are references.
        if name == "response" and isinstance(value, list) and all(isinstance(text, str) for text in value):
            row["references"] = [text for text in value if text.strip()]
            value = next(iter(row["references"]), "")
        row[name] = _text(value, name, field, where)
    return row


def _flattened(row: dict, where: str) -> dict:
    """Self-Instruct keeps input and outputs of a row in a list, "instances"."""
    instances = row.get("instances")
    if not isinstance(instances, list) or not all(isinstance(one, dict) and "output" in one for one in instances):
        return row
    inputs = {one.get("input") or "" for one in instances}
    if len(inputs) > 1:
        raise ValueError(f"{where}: 'instances' with {len(inputs)} different inputs; make a row of each")
    return row | {"input": "".join(inputs), "output": [one["output"] for one in instances]}


def as_object(row: object, where: str) -> dict:
    """Raises ValueError for a record that could not be read, or has no fields."""
    if isinstance(row, Exception):
        raise ValueError(f"{where}: not valid JSON ({row}); mend the line")
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object with fields; mend the line")
    return row


def field_of(row: dict, field: str, setting: str, where: str, or_turns: bool = False) -> object:
    """`a.b` is the field b of the object in a. Raises ValueError, with the fields there are, where there is none;
    or_turns: a field that holds a conversation is pointed at."""
    # A name with a dot is taken as it stands first.
    if field not in row:
        outer, _, inner = field.partition(".")
        if inner and isinstance(row.get(outer), dict):
            return field_of(row[outer], inner, setting, f"{where}, {outer!r}")
        turns = next((name for name, value in row.items() if or_turns and _is_turns(value)), None)
        raise ValueError(
            f"{where}: no field {field!r}, the row has {', '.join(map(repr, row)) or 'none'}; "
            + (f"set {setting} to one of these" if turns is None else _read_turns(turns))
        )
    return row[field]


def _is_turns(value: object) -> bool:
    """Whether `_conversation` may read it."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return False
    named = ({"role", "content"}, {"from", "value"})
    return bool(value) and all(any(turn.keys() >= names for names in named) for turn in value)


def _read_turns(field: str) -> str:
    """What to do about a field with a conversation."""
    return f"{field!r} is a conversation, set data.messages_field={field}"


def _text(value: object, name: str, field: str, where: str) -> str:
    """A field's value, checked; only an input may be empty."""
    text = "" if value is None else value
    if not isinstance(text, str):
        advice = _read_turns(field) if _is_turns(value) else "make it a string"
        raise ValueError(f"{where}: {field!r} is {value!r:.60} ({type(value).__name__}), not text; {advice}")
    if name != "input" and not text.strip():
        raise ValueError(f"{where}: {field!r} is empty ({value!r:.60}); give the row a {name}")
    return text


def _conversation(turns: object, where: str) -> Row:
    """[{"role", "content"}, ...] or ShareGPT's [{"from", "value"}, ...]: the assistant's last turn is the response, all
    before it the prompt."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: the conversation is {turns!r:.60}, not a list of turns")
    messages: list[Turn] = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{where}: a turn has {turn!r:.60}; it needs role and content (or from and value) as text")
        messages.append({"role": ROLES.get(role, role), "content": content})
    # Turns after the last answer are left out: there is nothing to learn from them.
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if len(messages) < 2 or not messages[-1]["content"].strip():
        raise ValueError(f"{where}: no answer of the assistant after another turn; {len(turns)} turns")
    *before, last = messages
    prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in before)
    if len(before) == 1:
        prompt = before[0]["content"]
    return {"prompt": prompt, "input": "", "response": last["content"], "messages": before}


def records(source: Source) -> Iterator[tuple[str, object]]:
    """(where, row) in the source's order; a row that could not be read is the exception that said so."""
    name, path = source.name, Path(source.name).expanduser()
    if name == PYTHON_DOCS:
        yield from _numbered(name, python_docs_rows(source.split, source.cache_dir))
    elif name.startswith(HUB_FILES):
        yield from _lines(name, hub_file(source))
    elif not looks_like_path(name, path):
        yield from _numbered(name, load_table(source))
    elif not path.is_file():
        what = "a folder" if path.is_dir() else "missing"
        raise ValueError(f"{name}: the file is {what} (looked at {path.absolute()}); give the path of a data file")
    elif path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name}: unknown ending {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    elif path.stat().st_size == 0:
        raise ValueError(f"{name}: the file is empty (0 bytes)")
    else:
        yield from file_rows(name, path)


def _numbered(name: str, table: Iterable[object]) -> Iterator[tuple[str, object]]:
    """(where, row) of a table."""
    for number, row in enumerate(table, 1):
        heartbeat.beat()
        yield f"{name} row {number}", row


def content_sha256(source: Source) -> str:
    """Of all that `records` reads: files by their bytes, the hub's tables by the library's fingerprint."""
    if source.name == PYTHON_DOCS:
        rows = python_docs_rows(source.split, source.cache_dir)
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    is_hub_file = source.name.startswith(HUB_FILES)
    path = hub_file(source) if is_hub_file else Path(source.name).expanduser()
    if not is_hub_file and not looks_like_path(source.name, path):
        return hashlib.sha256(load_table(source)._fingerprint.encode()).hexdigest()
    listed = "".join(f"{file.suffix} {sha256(file)}\n" for file in files_below(path))
    return hashlib.sha256(listed.encode()).hexdigest()


def files_below(path: Path) -> list[Path]:
    """The file itself, or every file in a folder, by name."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []


@functools.cache  # so that the version which is hashed is the one that is read
def hub_file(source: Source) -> Path:
    """The local copy of hf://datasets/OWNER/NAME/FILE.jsonl."""
    from huggingface_hub import hf_hub_download

    owner, name, file = [*source.name.removeprefix(HUB_FILES).split("/", 2), "", ""][:3]
    if not file.endswith(".jsonl"):
        raise ValueError(f"{source.name}: write {HUB_FILES}OWNER/NAME/FILE.jsonl")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", cache_dir=source.cache_dir))
    except Exception as error:  # of the network, the hub or the cache: a dozen kinds
        raise ValueError(
            f"{source.name} is not in the cache, and the hub did not give it: {type(error).__name__}: {error}. "
            "Check the network, or download the file and give its path"
        ) from error


def looks_like_path(source: str, path: Path) -> bool:
    """Whether a source is a file or folder, and no name of the hub."""
    return path.suffix.lower() in SUFFIXES or path.exists() or not HUB_NAME.fullmatch(source)


def _lines(source: str, path: Path) -> Iterator[tuple[str, object]]:
    """jsonl, read here and not by `datasets`, so that a broken line can be named. Blank lines pass."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            heartbeat.beat()
            if not line.strip():
                continue
            row: object
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                row = error
            yield f"{source}:{number}", row


def file_rows(name: str, path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of a data file. Tables are streamed: the library's copies of them go by path and time, and would be
    the old rows where a file was written again and kept its time."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _lines(name, path)
        return
    import datasets  # takes a second, and python_docs and jsonl do without

    try:
        options = _csv_options(path) if suffix == ".csv" else {}
        table = datasets.load_dataset(BUILDERS[suffix], data_files=str(path), split="train", streaming=True, **options)
        yield from _numbered(name, table)
    except Exception as error:  # the library raises a dozen kinds
        raise ValueError(f"{name}: could not be read as {suffix[1:]}: {_reason(error)}") from error


def load_table(source: Source, streaming: bool = False) -> Any:
    """A hub name as a table, or a stream, of the `datasets` library. Raises ValueError where it cannot be loaded."""
    import datasets

    name, split = source.name, source.split
    try:
        return datasets.load_dataset(name, source.subset, split=split, streaming=streaming, cache_dir=source.cache_dir)
    except Exception as error:  # the library raises a dozen kinds
        raise ValueError(
            f"{name}: no such file here, and the hub's data set of that name (subset {source.subset}, split {split}) "
            f"could not be loaded: {_reason(error)}. Check the name and the network; {PYTHON_DOCS!r} needs neither"
        ) from error


def _reason(error: Exception) -> str:
    """The cause is often the more telling one."""
    return f"{type(error).__name__}: {error}" + (f" ({error.__cause__})" if error.__cause__ else "")


def _csv_options(path: Path) -> dict:
    """Every column as text: pandas would take "None" and "NA" for missing, "007" for a number."""
    import datasets

    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "na_filter": False}
