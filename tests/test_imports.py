"""Imports point one way: each room, a folder of toolkit/ or a file beside them, imports what is named for it alone."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: room -> rooms that it may import, from the lowest up
ALLOWED = {
    "aliases": "",
    "batch": "",
    "divergences": "",
    "ranks": "",
    "seeds": "",
    "tables": "",
    "settings": "divergences",
    "plan": "divergences settings tables",
    "storage": "ranks",
    "data": "batch ranks settings storage",
    "models": "batch data divergences ranks seeds settings storage",
    "pruning": "data divergences models ranks settings storage",
    "rollout": "batch divergences models ranks seeds settings",
    "teachers": "batch divergences models ranks rollout seeds settings storage",
    "evaluation": "batch data divergences models pruning ranks rollout settings storage tables teachers",
    "run": "batch data divergences evaluation models plan pruning ranks rollout seeds settings storage tables teachers",
    "cli": "evaluation plan pruning ranks run settings",
}


def imported(path):
    """Full names of the modules of this repository that a file imports, functions' own imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from toolkit import batch` names a module, `from toolkit.batch import Example` does not
            names |= {f"{node.module}.{a.name}" if is_package(node, a) else node.module for a in node.names}
    return {name for name in names if name.partition(".")[0] in ("toolkit", "tests", "recipes", "benchmarks")}


def is_package(node, alias):
    base = ROOT.joinpath(*node.module.split("."), alias.name)
    return base.is_dir() or base.with_suffix(".py").is_file()


@functools.cache
def modules():
    """(module, what it imports) of every file of the package."""
    found = []
    for path in sorted((ROOT / "toolkit").rglob("*.py")):
        names = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(names[:-1] if names[-1] == "__init__" else names), imported(path)))
    return found


def room(module):
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("name", ALLOWED)
def test_a_room_imports_only_the_rooms_below_it(name):
    found = {module: names for module, names in modules() if room(module) == name}
    assert found, f"there is no room {name}"
    for module, names in found.items():
        wrong = {other for other in names if room(other) not in {name, *ALLOWED[name].split()}}
        assert not wrong, f"{module} imports {sorted(wrong)}"


def test_the_table_has_every_room_and_no_arrow_runs_back_up():
    assert {room(module) for module, _ in modules()} == {*ALLOWED, "", "__main__"}
    places = list(ALLOWED)
    for name, others in ALLOWED.items():
        assert all(places.index(other) < places.index(name) for other in others.split()), name


def test_only_a_recipe_and_a_run_know_the_loop():
    importers = {module for module, names in modules() if "toolkit.run.loop" in names}
    assert importers == {"toolkit.run.run"}


def test_the_package_imports_no_tests_and_no_recipes():
    for module, names in modules():
        assert all(name.startswith("toolkit") for name in names), f"{module} imports {sorted(names)}"


def test_imports_inside_functions_are_seen(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import os\nfrom toolkit import batch\n"
        "def f():\n    from toolkit.run.recipe import main\n    import tests.tiny\n"
    )
    assert imported(file) == {"toolkit.batch", "toolkit.run.recipe", "tests.tiny"}


@pytest.mark.multiprocess
def test_former_names_import_what_took_their_place():
    """In a process of its own: other tests may have imported them before."""
    script = (
        "import toolkit.config, toolkit.data.config, toolkit.recipe, toolkit.settings, toolkit.run.recipe\n"
        "from toolkit.stages import Stages\nfrom toolkit.run import stages\n"
        "assert toolkit.config.RunConfig is toolkit.settings.RunConfig and Stages is stages.Stages\n"
        "assert toolkit.data.config.DataConfig is toolkit.settings.DataConfig\n"
        "assert toolkit.recipe.main is toolkit.run.recipe.main\n"
        "from toolkit.divergences import Divergence, TopKTeacher, fused_linear_cross_entropy, fused_linear_divergence\n"
        "from toolkit.divergences import token_divergence\n"
        "from toolkit.data import load_data, load_rows, tokenize_rows\n"
        "from toolkit.evaluation.metrics import metric\nfrom toolkit.models import load_tokenizer\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
