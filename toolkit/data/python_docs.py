"""A data set that is always there: questions and answers from the docstrings of Python's standard library.

A child interpreter without site-packages imports the modules, so that what they do on import (start-up hooks,
signal and readline settings, output) stays out of the training process. This file therefore imports the
standard library only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "validation")
# Side effects on import, tests, demos, tables, other platforms' modules; tkinter is missing from many
# installations, and the rows should be the same everywhere.
SKIPPED = {
    "this", "antigravity", "idlelib", "test", "tests", "lib2to3", "turtledemo", "distutils", "ensurepip",
    "encodings", "pydoc_data", "tkinter", "turtle", "rlcompleter", "readline", "msilib", "site",
    "sitecustomize", "usercustomize", "nt", "posix",
}  # fmt: skip
MIN_WORDS, MAX_WORDS = 4, 90
TIME_LIMIT_S = 120

QUESTIONS = {
    "module": (
        "What is the Python module `{}` for?",
        "Describe the `{}` module of the Python standard library.",
        "Explain what Python's `{}` module provides.",
    ),
    "class": (
        "What is the class `{}` in the Python standard library?",
        "Describe the Python class `{}`.",
        "Explain what `{}` is in Python.",
        "What is `{}` used for in the Python standard library?",
    ),
    "function": (
        "What does `{}` in the Python standard library do?",
        "Explain what the Python function `{}` does.",
        "Describe the function `{}` from the Python standard library.",
        "What is `{}` used for in Python?",
    ),
    "method": (
        "What does the method `{}` in the Python standard library do?",
        "Explain what the Python method `{}` does.",
        "Describe the method `{}` from the Python standard library.",
        "In Python, what does calling `{}` do?",
    ),
    "property": (
        "What does the attribute `{}` in the Python standard library hold?",
        "Describe the Python attribute `{}`.",
        "Explain what `{}` tells in Python.",
    ),
}


def python_docs_rows(split: str, cache_dir: str | None = None) -> list[dict[str, str]]:
    """Rows {"prompt", "response", "module"} of one split; "validation" is about 8 % of them.

    The split goes by top-level module, so nothing in validation was seen in training. Rows, order and split depend on
    Python version and platform only. With `cache_dir` the rows are kept there as jsonl; many processes may do so at
    once. Raises ValueError for an unknown split, RuntimeError if the child interpreter fails.
    """
    if split not in SPLITS:
        raise ValueError(f"python_docs has no split {split!r}; it has {', '.join(SPLITS)}")
    # A draw for each top-level module decides where its rows are.
    draws = ((row, _draw(row["module"].split(".")[0], "split") % 100) for row in _all_rows(cache_dir))
    return [dict(row) for row, draw in draws if (split == "validation") == (draw < 5)]


def _draw(name: str, purpose: str) -> int:
    """A fixed number for a name; Python's own hash changes from run to run."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "big")


@functools.lru_cache(maxsize=4)
def _all_rows(cache_dir: str | None) -> tuple[dict[str, str], ...]:
    # The name of the kept file changes with all that decides the rows: this file is one part of it.
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    version = ".".join(map(str, sys.version_info[:3]))
    name = f"python_docs-{version}-{sys.platform}-{recipe}.jsonl"
    cached = Path(cache_dir).expanduser() / name if cache_dir else None
    if cached and cached.exists():
        return tuple(map(json.loads, cached.read_text(encoding="utf-8").splitlines()))
    # -I -S: no site-packages, so no installed package can stand in for, or add to, the standard library.
    command = [sys.executable, "-I", "-S", "-B", "-W", "ignore", __file__]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIME_LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"reading the standard library's docstrings failed: {done.stderr.decode()[-2000:]}")
    text = done.stdout.decode("utf-8")
    if cached:
        from toolkit.storage.appear import new_file  # here: the child runs this file and has no toolkit

        with new_file(cached, durable=False, is_shared=True) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return tuple(map(json.loads, text.splitlines()))


# ---- what the child does


def collect_rows() -> list[dict[str, str]]:
    """Every row of both splits. Imports most of the standard library: call it in a process of its own."""
    rows, seen = [], set()
    # Things nearer to the top of a package come first: of several with one docstring the first is kept.
    for kind, name, module, doc in sorted(_documented(), key=lambda item: (item[1].count("."), item[1])):
        response = clean_docstring(doc, name)
        if response is None or response.lower() in seen:
            continue
        seen.add(response.lower())
        phrasings = QUESTIONS[kind]
        prompt = phrasings[_draw(name, "question") % len(phrasings)].format(name)
        rows.append({"prompt": prompt, "response": response, "module": module, "name": name})
    rows.sort(key=lambda row: _draw(row.pop("name"), "order"))  # the first rows are of many modules, for max_rows
    return rows


def _documented() -> Iterator[tuple[str, str, str, str | None]]:
    """(kind, dotted name, module, docstring) of public things, where defined or listed in `__all__`."""
    seen: set[int] = set()
    for module in _modules():
        home = module.__name__
        yield "module", home, home, module.__doc__
        listed = set(getattr(module, "__all__", ()))
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or id(value) in seen or not _belongs(value, home, name in listed):
                continue
            shown = name if home == "builtins" else f"{home}.{name}"
            # A class with its methods and properties, or a function; constants have no docstring of their own.
            if inspect.isclass(value):
                yield "class", shown, home, value.__doc__
                for attribute, member in sorted(vars(value).items()):
                    if isinstance(member, (classmethod, staticmethod)):
                        member = member.__func__
                    is_property = isinstance(member, (property, types.GetSetDescriptorType, functools.cached_property))
                    if not attribute.startswith("_") and (is_property or inspect.isroutine(member)):
                        kind = "property" if is_property else "method"
                        yield kind, f"{shown}.{attribute}", home, member.__doc__
            elif inspect.isroutine(value):
                yield "function", shown, home, value.__doc__
            else:
                continue
            seen.add(id(value))


def _belongs(value: object, home: str, is_listed: bool) -> bool:
    defined_in = getattr(value, "__module__", None)
    if not isinstance(defined_in, str):
        return False
    return defined_in == home or (is_listed and (defined_in.startswith(("_", home + ".")) or defined_in == "posix"))


def _modules() -> Iterator[types.ModuleType]:
    """Importable public modules, packages before their submodules, so that a thing gets its shortest name."""
    level = sorted(sys.stdlib_module_names)
    while level:
        below = []
        for name in level:
            last = name.rpartition(".")[2]
            if last.startswith("_") or last in SKIPPED:
                continue
            try:
                module = importlib.import_module(name)
            except (Exception, SystemExit):  # not built, another platform's, or asks for a missing library
                continue
            yield module
            below += [f"{name}.{found.name}" for found in pkgutil.iter_modules(getattr(module, "__path__", ()))]
        level = sorted(below)


SIGNATURE = re.compile(r"^[\w.]+ ?\((?:[^()]|\([^()]*\))*\)(?: *(?:->|=>) *[^.:]*?)?(?: *(?:--|:) *(?P<rest>\S.*))?$")
NOT_PROSE = re.compile(  # code, markup, addresses, tables
    r">>>|\.\. \w|@\w+|:param|:return|Args:|Copyright|\b0x[0-9a-f]{6}|https?://|[{}|<>]|\s{3}|={3}|-{3}|\$"
)


def clean_docstring(doc: object, name: str) -> str | None:
    """A docstring's first paragraph as one line of prose, or None: not prose, too short or too long."""
    if not isinstance(doc, str):
        return None
    lines = inspect.cleandoc(doc).splitlines()
    # C docstrings, and some Python ones, begin with signatures, which are taken away.
    while lines:
        match = SIGNATURE.match(lines[0].strip())
        if match and match["rest"]:
            lines[0] = match["rest"]
            break
        if lines[0].strip() and not match:
            break
        lines.pop(0)
    # The first paragraph, unless it is a list, a table, or indented code.
    paragraph = list(itertools.takewhile(str.strip, lines))
    for number, line in enumerate(paragraph):
        is_indented = number > 0 and line.startswith("  ")
        if is_indented or SIGNATURE.match(line.strip()) or re.match(r"\s*([-*+o]|\d+[.)])\s", line):
            return None
    text = " ".join(map(str.strip, paragraph))
    # Markup for cross references becomes plain text, and the thing's own name in front goes.
    text = re.sub(r":[\w:]+:`~?([^`]+)`", r"`\1`", text)  # :class:`Foo`
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r" -- ", ", ", text) if text.count(" -- ") > 1 else text
    last = re.escape(name.rpartition(".")[2])
    text = re.sub(rf"^{re.escape(name)} ?(--?|:|,) |^{last} ?(--?|:) ", "", text)
    # What is no English sentence, or too short or long a one, is left out.
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or NOT_PROSE.search(text) or not text.isascii():
        return None
    if re.match(r"[\w.]+\(", text) or sum(len(re.findall(r"[A-Za-z]", word)) > 1 for word in words) < len(words) / 2:
        return None
    text = " ".join(words)
    if text[-1] in ":,;(-" or (text[0] == "`" and text.count("`") == 1):
        return None
    # The rest gets the capital and the full stop that a sentence has.
    if re.match(r"[a-z]+ ", text):
        text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" or text[-2:] in (".)", '."', ".'") else text + "."


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    out, nowhere = os.fdopen(os.dup(1), "w", encoding="utf-8"), io.StringIO()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # C code prints too
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        found = collect_rows()
    out.writelines(json.dumps(row) + "\n" for row in found)
    out.flush()
    os._exit(0)  # what the modules registered with atexit is not wanted
