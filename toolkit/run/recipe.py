"""What a recipe calls: its command line, the choice among its runs, its stages one after another.

What a run needs is imported where it begins: a recipe is also read by commands that only want its settings.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.ranks import collectives
from toolkit.ranks.output import say
from toolkit.run.stages import INIT, Stages, stages_table
from toolkit.settings import RunConfig
from toolkit.settings.methods import METHODS, expanded
from toolkit.settings.overrides import unknown
from toolkit.settings.page import help_page

if TYPE_CHECKING:
    from toolkit.ranks.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
Recipe = RunConfig | Mapping[str, RunConfig] | Stages


def main(recipe: Recipe, arguments: list[str] | None = None) -> Mapping[str, Any]:
    """Run `recipe` with `section.key=value` arguments (the command line's by default), on every rank. Of a recipe with
    several runs the first argument names one; of one with stages it may, and all are run where it does not.

    Returns the summary (of stages, one for each). Wrong input ends every rank with exit code 2 and one message; a run
    that a signal stopped ends with EXIT_LATER, and the same command goes on with it.
    """
    from toolkit.ranks import launch
    from toolkit.run.distill import distill_as, ready

    given = sys.argv[1:] if arguments is None else arguments
    overrides = [text for text in given if not text.startswith("--local_rank")]  # the deepspeed launcher's own
    with launch.one_message():
        if {"-h", "--help"} & set(overrides):
            return _help(recipe, overrides)
        names_one = overrides and "=" not in overrides[0] and overrides[0] != INIT
        if isinstance(recipe, Stages) and not names_one:
            with ready(lambda: _longest_hang_s(recipe, overrides)) as watchdog:
                return run_stages(recipe, overrides, watchdog)
        return distill_as(lambda: chosen(recipe, overrides), is_stage=isinstance(recipe, Stages)).summary


def run_stages(recipe: Stages, arguments: list[str], watchdog: Watchdog) -> dict[str, Mapping[str, Any]]:
    """Cut the student, then each run from the student of the one before it; `init` as the first argument only cuts.

    A stage whose result is there is skipped, one that was stopped goes on. Each frees its engines before the next one
    begins. Raises as `run` does.
    """
    from toolkit.ranks.signals import StopSignals
    from toolkit.run.build import checked
    from toolkit.run.run import run
    from toolkit.storage.lock import sole_use

    only_cut = arguments[:1] == [INIT]

    def read() -> tuple[Stages, dict[str, RunConfig]]:
        stages = recipe.with_overrides(expanded(arguments[only_cut:]))
        runs = stages.chained()
        for config in runs.values():
            checked(config)
        return stages, runs

    def tell(text: str) -> None:
        if collectives.rank() == 0:
            say(text)

    stages, runs = collectives.together(read)
    summaries: dict[str, Mapping[str, Any]] = {}
    names = stages.names
    with sole_use(stages.folder):
        collectives.check_shared(stages.folder)
        # The first stage cuts the student out of its teacher.
        if stages.is_cut:
            watchdog.progress(INIT)
            if all(config.resume == "never" for config in runs.values()):
                collectives.together(lambda: stages.clear() if collectives.rank() == 0 else None)
            with StopSignals(stages.first.faults.grace_s).watched() as signals:
                found = summaries[INIT] = _cut(stages, any(config.has_teacher for config in runs.values()))
                signals.stop_if_asked("after the student was cut")
            tell(f"stage 1 of {len(names)}: {INIT}, layers {found['kept_layers']} kept, in {found['student']}")

        # Each of the others is a run of its own.
        for name, config in ({} if only_cut else runs).items():
            tell(f"stage {names.index(name) + 1} of {len(names)}: {name}")
            summaries[name] = run(config, watchdog, is_last=name == names[-1])
    tell("\n" + stages_table(summaries))
    return summaries


def _cut(stages: Stages, has_teacher: bool) -> dict[str, Any]:
    """The summary of the first student, made where it is not there. Runs from stored answers alone (not `has_teacher`)
    need no teacher once it is. Collective."""
    from toolkit.models import default_cache_dir
    from toolkit.models.identity import file_hashes
    from toolkit.pruning.made import materialize

    teacher, cache_dir, path = stages.first.teacher, default_cache_dir(stages.first.cache_dir), ""
    if not has_teacher and collectives.everywhere(stages.is_made):
        return collectives.main_rank_first(lambda: stages.cut(path, None))
    if not teacher.random_weights:
        path = collectives.main_rank_first(lambda: materialize(teacher, cache_dir))
    hashes = file_hashes(path)
    return collectives.main_rank_first(lambda: stages.cut(path, hashes))


def chosen(recipe: Recipe, arguments: list[str]) -> RunConfig:
    """The recipe, or the one of its runs or stages that the first argument names, with the other arguments applied.

    Raises ValueError where it names none.
    """
    arguments = expanded(arguments)
    if isinstance(recipe, RunConfig):
        return recipe.with_overrides(arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments and "=" not in arguments[0] else ("", arguments)
    kind, known = ("stage", recipe.runs) if isinstance(recipe, Stages) else ("run", recipe)
    if not name:
        raise ValueError(f"this recipe has several {kind}s; name one first: {', '.join(known)}")
    if name not in known:
        raise unknown(kind, name, known)
    if isinstance(recipe, Stages):
        return recipe.with_overrides(rest).alone(name)
    return recipe[name].with_overrides(rest)


def read_recipe(name: str) -> Recipe:
    """RECIPE or RECIPES of a file, or of the file of that name in recipes/. It is code of the user's, and is run.
    Raises ValueError where there is none."""
    given = Path(name).expanduser()
    places = (given, ROOT / given, ROOT / "recipes" / given.with_suffix(".py").name)
    path = next((place for place in places if place.suffix == ".py" and place.is_file()), None)
    if path is None:
        known = sorted(file.stem for file in (ROOT / "recipes").glob("[!_]*.py"))
        raise ValueError(f"no recipe {name!r}; give its file, or one of {', '.join(known)}")
    found = runpy.run_path(str(path), run_name=f"recipe_{path.stem}")
    for constant in ("RECIPE", "RECIPES"):
        if constant in found:
            return found[constant]
    raise ValueError(f"{path} has neither RECIPE nor RECIPES; a recipe names its RunConfig so")


def _help(recipe: Recipe, arguments: list[str]) -> dict[str, Any]:
    """Prints what the recipe says of itself, its runs, and its settings with their meanings: of several runs, those of
    the one that is named, else of the first; of stages, those of the first and what is different in the others. Raises
    ValueError where a run is named that is not there."""
    # The page begins with what the recipe's file says of itself.
    parts = [(getattr(sys.modules["__main__"], "__doc__", None) or "").strip()]
    parts.append(f"method=NAME stands for the settings of a method: {', '.join(METHODS)}.")
    how = "to be changed with section.key=value"
    if isinstance(recipe, RunConfig):
        parts += [f"Settings, {how}:", help_page(recipe)]
    elif isinstance(recipe, Stages):
        first, *others = recipe.runs
        beside = f"; in brackets those of {', '.join(others)} where they differ" if others else ""
        parts += [
            f"Stages, one after another: {', '.join(recipe.names)}. The name of one before the settings runs it alone. "
            "\nsection.key=value is for all of them, STAGE.section.key=value for one.",
            "Settings of init, to be changed with init.key=value:",
            help_page(recipe.init, prefix="init."),
            f"Settings of {first}, {how}{beside}:",
            help_page(recipe.runs[first], {name: recipe.runs[name] for name in others}),
        ]
    else:
        name = next((text for text in arguments if "=" not in text and not text.startswith("-")), next(iter(recipe)))
        if name not in recipe:
            raise unknown("run", name, recipe)
        parts += [
            f"Runs, one of which is named before the settings (before --help, to see its own): {', '.join(recipe)}",
            f"Settings of {name}, {how}:",
            help_page(recipe[name]),
        ]
    if os.environ.get("RANK", "0") == "0":
        say("\n\n".join(parts))
    return {}


def _longest_hang_s(recipe: Stages, arguments: list[str]) -> float:
    """The watchdog's limit: one watches over all stages. Raises ValueError for settings that are wrong."""
    overrides = expanded([text for text in arguments if "=" in text])
    return max(config.faults.hang_s for config in recipe.with_overrides(overrides).runs.values())
