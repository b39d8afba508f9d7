"""Settings for readers: the page of `--help`, and docs/configuration.md, which `python -m toolkit settings` prints."""

import inspect
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from toolkit.settings.run import RunConfig
from toolkit.settings.section import Entry, Section
from toolkit.settings.setting import Setting, written
from toolkit.settings.validation import EvaluationConfig

INDENT = 42  # columns before the meanings in --help
MOST_COLUMNS = 120
RUN = """\
# Settings

Made by `python -m toolkit settings > docs/configuration.md` from the sentences beside the settings in
`toolkit/settings/`: change them there.

`section.key=value` on a recipe's command line changes a setting, as in `train.steps=20`. Values are YAML: `null`,
`true`, `[1, 2]`, `{a: 1}`. A recipe has values of its own in place of these defaults: `./run.sh RECIPE --help` shows
them, and `config.yaml` in a run's folder keeps them. `method=NAME` stands for the settings of a published method
([methods.md](methods.md)).

A run goes on from its checkpoint only with the settings that it began with. Those marked *may change* are free."""
EVALUATION = """\
# Settings of an evaluation

`python -m toolkit evaluate` takes these as `key=value` after its options ([evaluation.md](evaluation.md)). `data.*` is
as in a run. `--protocol plain` begins with these defaults, the default protocol `paper` with others: `python -m toolkit
evaluate --help` shows both."""
FORMER = """\
# Former names

A former name is refused, and the message says the present one. Runs that were begun under former names go on.

| former name | name | of |
| --- | --- | --- |"""


def help_page(config: Section, beside: Mapping[str, Section] | None = None, prefix: str = "") -> str:
    """`name = value` and the meaning of every setting of `config`, wrapped to the width of the terminal.

    In brackets after the meaning: unit, bounds, choices, what some values stand for, and the setting's value in each of
    the configs `beside` (label -> config) where it is another one. prefix: of all names, as in "init.".
    """
    # The values of the other configs stand in brackets where they differ.
    width = min(MOST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 24)).columns)
    others = {label: _values(other, prefix) for label, other in (beside or {}).items()}
    lines: list[str] = []
    for name, section in config.parts(prefix):
        title = f"{name.rstrip('.')}: " if name else ""
        lines += ["", *textwrap.wrap(title + _heading(section), width)]
        for entry in section.own_entries(name):
            notes = _notes(entry.setting)
            notes += [
                f"{label}: {written(values[entry.key])}"
                for label, values in others.items()
                if values[entry.key] != entry.value
            ]
            lines += _in_columns(entry, notes, width)
    return "\n".join(lines[1:])


def markdown_page() -> str:
    """docs/configuration.md: a table for each section, with the defaults, and the former names of settings."""
    run, evaluation = RunConfig(), EvaluationConfig()

    # Each section of the run has a table; a teacher's is that of a student.
    student = _values(run.student)
    blocks = [RUN]
    for name, section in run.parts():
        if name == "teacher.":
            own = [entry for entry in section.entries() if entry.value != student[entry.key]]
            defaults = ", ".join(f"`teacher.{entry.key}` is `{written(entry.value)}`" for entry in own)
            blocks.append(f"## teacher\n\nIts settings are those of [student](#student). By default {defaults}.")
        elif not name.startswith("teacher."):
            blocks.append(_table(name, section, "The run"))

    # The settings of an evaluation follow, and the names that settings had before.
    blocks.append(EVALUATION)
    blocks += [_table(name, section, "The evaluation") for name, section in evaluation.parts() if name != "data."]
    renamed = [
        f"| `{name}{former}` | `{name}{present}` | {whole} |"
        for whole, config in (("run", run), ("evaluation", evaluation))
        for name, section in config.parts()
        for former, present in section.former_names().items()
    ]
    blocks.append("\n".join([FORMER, *renamed]))
    return "\n\n".join(blocks) + "\n"


def _values(config: Section, prefix: str = "") -> dict[str, Any]:
    return {entry.key: entry.value for entry in config.entries(prefix)}


def _heading(section: Section) -> str:
    """The first paragraph of the section's docstring."""
    return " ".join((inspect.getdoc(section) or "").partition("\n\n")[0].split())


def _notes(setting: Setting) -> list[str]:
    """What is said in brackets: unit, bounds, choices, what some values stand for."""
    choices = f"one of {', '.join(setting.known)}" if setting.known else ""
    return [note for note in (setting.unit, setting.bounds, choices, setting.special) if note]


def _in_columns(entry: Entry, notes: list[str], width: int) -> list[str]:
    """Name and value to the left, the meaning to the right; below them where these are long or columns few."""
    indent = INDENT if width >= 2 * INDENT else 6
    text = entry.setting.meaning + (f" ({'; '.join(notes)})" if notes else "")
    right = textwrap.wrap(text, width - indent, break_long_words=False, break_on_hyphens=False)
    left = f"  {entry.key} = {written(entry.value)}"
    if len(left) < indent - 1:
        left, right = left.ljust(indent) + right[0], right[1:]
    return [left, *(" " * indent + line for line in right)]


def _table(name: str, section: Section, whole: str) -> str:
    """Heading and table of one section in Markdown; `whole` is the heading of what the sections are part of."""
    lines = [f"## {name.rstrip('.') or whole}", "", _heading(section), ""]
    lines += ["| setting | default | meaning | unit, bounds, values |", "| --- | --- | --- | --- |"]
    for entry in section.own_entries(name):
        notes = _notes(entry.setting) + (["*may change*"] if entry.setting.may_change else [])
        cells = f"`{entry.key}`", f"`{written(entry.value)}`", entry.setting.meaning, "; ".join(notes)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
