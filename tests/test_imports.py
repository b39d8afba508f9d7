"""Imports point one way: each part may import the parts named for it and itself, wherever in a file it does so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA, OVERRIDES, HEARTBEAT = "toolkit.data", "toolkit.overrides", "toolkit.heartbeat"
WATCHDOG, RECIPE = "toolkit.watchdog", "toolkit.recipe"
BASICS = {"toolkit.batch", "toolkit.config", OVERRIDES, HEARTBEAT}
PURE = BASICS | {DATA, "toolkit.divergences", "toolkit.rollout.schedule", "toolkit.rollout.replay"}
DECODING = {"toolkit.rollout.decode", "toolkit.rollout.packed", "toolkit.rollout.sampling", "toolkit.rollout.seq2seq"}
ENGINES = (
    PURE
    | DECODING
    | {
        "toolkit.models",
        "toolkit.rollout.engine",
        "toolkit.rollout.check",
        "toolkit.distributed",
        "toolkit.monitor",
        "toolkit.faults",
    }
)
#: part -> parts it may import; the longest name that fits a module is its part
ALLOWED = {
    "toolkit.batch": set(),
    OVERRIDES: set(),
    HEARTBEAT: set(),
    "toolkit.config": {OVERRIDES, "toolkit.data.config", "toolkit.rollout.schedule", "toolkit.divergences"},
    "toolkit.data.config": {OVERRIDES},
    "toolkit.data": {"toolkit.batch", OVERRIDES, HEARTBEAT},
    "toolkit.divergences": set(),
    "toolkit.rollout.schedule": set(),
    "toolkit.rollout.replay": {"toolkit.batch", "toolkit.rollout.schedule"},
    "toolkit.slurm": set(),
    "toolkit.operators": set(),
    "toolkit.distributed": {"toolkit.slurm", "toolkit.operators"},
    "toolkit.monitor": {"toolkit.distributed"},
    "toolkit.faults": {"toolkit.distributed", "toolkit.config"},
    WATCHDOG: {"toolkit.distributed", HEARTBEAT},
    "toolkit.models": PURE | {"toolkit.distributed", "toolkit.monitor", "toolkit.faults"},
    "toolkit.rollout.sampling": {"toolkit.rollout.schedule", "toolkit.config"},
    "toolkit.rollout.decode": {"toolkit.models", "toolkit.rollout.sampling"},
    "toolkit.rollout.packed": {"toolkit.divergences"},
    "toolkit.rollout.seq2seq": {"toolkit.models", "toolkit.rollout.sampling", "toolkit.rollout.decode"},
    "toolkit.rollout.engine": ENGINES,
    "toolkit.rollout.check": ENGINES,
    "toolkit.rollout.arrival": set(),
    "toolkit.rollout.vllm": {
        "toolkit.batch",
        "toolkit.config",
        "toolkit.models",
        "toolkit.distributed",
        "toolkit.rollout.engine",
        "toolkit.rollout.arrival",
    },
    "toolkit.evaluation": ENGINES | {WATCHDOG, "toolkit.checkpoint", "toolkit.teacher_cache"},
    "toolkit.checkpoint": ENGINES,
    "toolkit.teacher_text": ENGINES,
    "toolkit.teacher_cache": PURE | {"toolkit.models", "toolkit.distributed", "toolkit.faults", "toolkit.checkpoint"},
    "toolkit.teacher_cache.command": PURE
    | {"toolkit.models", "toolkit.distributed", "toolkit.faults", "toolkit.checkpoint", "toolkit.teacher_cache"}
    | {RECIPE, WATCHDOG, "toolkit.inputs"},
    "toolkit.inputs": PURE | {"toolkit.models", "toolkit.distributed", "toolkit.checkpoint", "toolkit.teacher_cache"},
    "toolkit.stages": {"toolkit.config", DATA, OVERRIDES, "toolkit.models", "toolkit.monitor"},
    "toolkit.methods": {"toolkit.config", OVERRIDES},
    "toolkit.loop": ENGINES | {"toolkit.evaluation", "toolkit.checkpoint", "toolkit.teacher_cache"},
}


def imported(path):
    """Full names of the modules of this repository that a file imports, functions' own imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from toolkit import distributed` names a module, `from toolkit.config import RunConfig` does not
            names |= {f"{node.module}.{alias.name}" if is_package(node, alias) else node.module for alias in node.names}
    return {name for name in names if name.partition(".")[0] in ("toolkit", "tests", "recipes", "benchmarks")}


def is_package(node, alias):
    base = ROOT.joinpath(*node.module.split("."), alias.name)
    return base.is_dir() or base.with_suffix(".py").is_file()


def part_of(module, parts):
    fitting = [part for part in parts if module == part or module.startswith(part + ".")]
    return max(fitting, key=len, default=module)


def modules():
    for path in sorted((ROOT / "toolkit").rglob("*.py")):
        names = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(names[:-1] if names[-1] == "__init__" else names), imported(path)


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_lies_below_it(part):
    found = {module: names for module, names in modules() if part_of(module, ALLOWED) == part}
    assert found, f"no module belongs to {part}"
    for module, names in found.items():
        wrong = {name for name in names if part_of(name, ALLOWED[part] | {part}) not in ALLOWED[part] | {part}}
        assert not wrong, f"{module} imports {sorted(wrong)}"


def test_only_run_imports_the_loop():
    importers = {
        module for module, names in modules() if any(part_of(n, {"toolkit.loop"}) == "toolkit.loop" for n in names)
    }
    assert importers - {"toolkit.loop"} == {"toolkit.run"}


def test_only_entry_points_import_a_run():
    importers = {name: {module for module, names in modules() if name in names} for name in ("toolkit.run", RECIPE)}
    assert importers == {"toolkit.run": {RECIPE}, RECIPE: {"toolkit.cli", "toolkit.teacher_cache.command"}}


def test_the_package_imports_no_tests_and_no_recipes():
    for module, names in modules():
        assert all(name.startswith("toolkit") for name in names), f"{module} imports {sorted(names)}"


def test_imports_inside_functions_are_seen(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import os\nfrom toolkit import loop\ndef f():\n    from toolkit.run import main\n    import tests.tiny\n"
    )
    assert imported(file) == {"toolkit.loop", "toolkit.run", "tests.tiny"}
