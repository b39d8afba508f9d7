"""`python -m toolkit COMMAND ...`: an exact-name table; only the command that is asked for is imported."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

PROG = "python -m toolkit"
#: command -> (module with `add_arguments(parser)` and `run(options)`, what it does)
COMMANDS = {
    "init-student": (
        "toolkit.pruning.command",
        "cut a student out of its teacher: layers, hidden units, heads, MLP",
    ),
    "cache-teacher": ("toolkit.run.cache_command", "store a teacher's answers to a recipe's data"),
    "evaluate": ("toolkit.evaluation.evaluate", "score models: ROUGE-L, BLEU, chrF, exact match, KL to a teacher"),
}


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a ValueError, as all wrong input is: one message, on one rank."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}\n{self.format_usage().rstrip()}")


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run the command that `arguments` (the command line's by default) name, on every rank; its result.

    Wrong input ends every rank with exit code 2 and one message.
    """
    given = sys.argv[1:] if arguments is None else arguments
    given = [text for text in given if not text.startswith("--local_rank")]  # the deepspeed launcher's own
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
        return None
    if given == ["settings"]:
        from toolkit.settings.page import markdown_page

        print(markdown_page(), end="")
        return None
    from toolkit.ranks import launch
    from toolkit.settings.overrides import unknown

    with launch.one_message():
        name, *rest = given
        if name not in COMMANDS:
            raise unknown("the command", name, COMMANDS)
        module = importlib.import_module(COMMANDS[name][0])
        parser = Parser(prog=f"{PROG} {name}", formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(parser)
        options = parser.parse_intermixed_args(rest)
        _quiet()
        launch.start(_hang_s(rest))
        return module.run(options)


def _hang_s(arguments: list[str]) -> float:
    """The watchdog's limit among the settings; one that is no number is told by who reads it."""
    from toolkit.settings import FaultsConfig

    given = [text.partition("=")[2] for text in arguments if text.startswith(("hang_s=", "faults.hang_s="))]
    try:
        return float(given[-1])
    except (IndexError, ValueError):
        return FaultsConfig.hang_s


def _quiet() -> None:
    from toolkit.run.recipe import quiet_libraries

    quiet_libraries()


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    lines.append(f"  {'settings':<{width}}  print docs/configuration.md: every setting with its default and meaning")
    return "\n".join([
        f"{PROG} COMMAND ...", "", *lines, "",
        f"`{PROG} COMMAND --help` has a command's own arguments. `deepspeed --module toolkit COMMAND ...` and",
        f"`srun ... {PROG} COMMAND ...` run it on several ranks.",
    ])  # fmt: skip
