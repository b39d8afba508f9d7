"""`python -m toolkit plan`: memory, traffic and time of a recipe's run on a machine, before it is started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from toolkit.plan import Machine, Plan, plan_of
from toolkit.plan.machine import device_named
from toolkit.plan.report import plot
from toolkit.ranks.output import say
from toolkit.run.recipe import Recipe, chosen, read_recipe
from toolkit.run.stages import INIT, Stages
from toolkit.settings import InitConfig, RunConfig
from toolkit.settings.methods import expanded
from toolkit.settings.overrides import unknown


class Planned(NamedTuple):
    """A run, and what a stage before it cuts out of its teacher, where that makes the student."""

    config: RunConfig
    init: InitConfig | None


def plan(
    recipe: str, settings: Sequence[str], machine: Machine, *, plot_to: Path | None = None, json_to: Path | None = None
) -> list[Plan]:
    """Prints the plan of `recipe` with `settings`, the name of a run or stage first; of all stages where none is named.
    Writes a picture and JSON, of several stages one for each. Raises ValueError for wrong input."""
    plans: list[Plan] = []
    for name, (config, init) in runs_of(read_recipe(recipe), list(settings)).items():
        config.validate()
        found = plan_of(config, machine, init)
        say(("" if not plans else "\n\n") + found.table())
        for file, write in ((json_to, _write_json), (plot_to, plot)):
            if file is not None:
                write(found, file.with_stem(f"{file.stem}-{name}") if name else file)
        plans.append(found)
    return plans


def machine_of(
    device: str, nodes: int, ranks_per_node: int, memory_gib: float | None, host_gib: float, rates: Mapping[str, float]
) -> Machine:
    """The machine that a command line describes. rates: fields of a Device in place of its own. Raises ValueError for
    an unknown device, and for what is not above 0."""
    kind = dataclasses.replace(device_named(device), **rates)  # type: ignore[arg-type]  # its name is no rate
    numbers = {"--gpu-memory-gib": memory_gib, "--host-memory-gib": host_gib, **rates}
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value:g}; it has to be above 0")
    memory = kind.memory_gib if memory_gib is None else memory_gib
    return Machine.of_gpus(nodes, ranks_per_node, memory, host_gib, kind)


def runs_of(recipe: Recipe, arguments: list[str]) -> dict[str, Planned]:
    """What is to be planned, by the name of the stage where there are several. Raises ValueError as `chosen` does."""
    if not isinstance(recipe, Stages):
        return {"": Planned(chosen(recipe, arguments), None)}
    arguments = expanded(arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments and "=" not in arguments[0] else ("", arguments)
    stages = recipe.with_overrides(rest)
    names = [stage for stage in stages.names if stage != INIT]
    if name and name not in names:
        raise unknown("stage", name, names)
    # Every stage trains the student that the first one is cut to, or that the first run names.
    init, first = (stages.init if stages.is_cut else None), stages.first.student
    of_first = {name: getattr(first, name) for name in ("random_weights", "shape", "num_layers", "drop_layers", "init")}
    found = {}
    for stage in [name] if name else names:
        config = stages.runs[stage]
        path = first.path or config.teacher.path or stage  # of a cut student the teacher's configuration is read
        student = dataclasses.replace(config.student, path=path, **of_first)
        found[stage] = Planned(dataclasses.replace(config, student=student), init)
    return {"": found[name]} if name else found


def _write_json(found: Plan, file: Path) -> None:
    file.write_text(json.dumps(found.to_json(), indent=1))
