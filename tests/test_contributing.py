"""The worked examples of CONTRIBUTING.md, on a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SECTIONS = (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")
EXAMPLES = {section.splitlines()[0]: section for section in SECTIONS if "```diff" in section}


def block(section, kind):
    (found,) = re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)
    assert found.count("\n") <= 40, "an example is too long to be read"
    return found


@pytest.mark.multiprocess
@pytest.mark.parametrize("title", EXAMPLES)
def test_a_worked_example_applies_and_its_code_runs(title, tmp_path):
    for folder in ("toolkit", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    section, where = EXAMPLES[title], {"cwd": tmp_path, "capture_output": True, "text": True}
    # git looks for a repository above the folder, and would leave out files that are not of it
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PYTHONPATH": str(tmp_path)}
    patch = subprocess.run(["git", "apply", "-p1", "-"], input=block(section, "diff"), env=alone, **where)
    assert patch.returncode == 0, patch.stderr
    ran = subprocess.run([sys.executable, "-c", block(section, "python")], env=alone, timeout=300, **where)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_there_is_an_example_of_each_kind():
    assert list(EXAMPLES) == ["A divergence", "A schedule", "A model family"]
