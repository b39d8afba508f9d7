"""`python -m toolkit plan` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_recipe_is_planned_with_settings_of_the_command_line(capsys, tmp_path):
    file = tmp_path / "plan.json"
    main(["plan", "quickstart", "train.rows_per_step=32", "--device", "cpu", "--gpus-per-node", "2",
          "--gpu-memory-gib", "8", "--json", str(file)])  # fmt: skip
    said = capsys.readouterr().out
    assert "teacher 0.135 B parameters (llama), student 0.0991 B parameters (llama)" in said
    assert "1 node of 2 x cpu, 8.0 GiB for the tensors of a rank" in said
    assert "It fits: student resident, teacher resident" in said
    assert json.loads(file.read_text())["fits"] is True


def test_stages_are_planned_one_after_another_from_the_student_that_is_cut(capsys):
    main(["plan", "llama_7b_to_1b", "teacher.random_weights=true", "--gpus-per-node", "8"])
    said = capsys.readouterr().out
    assert said.count("teacher 6.74 B parameters (llama), student 1.35 B parameters (llama)") == 2
    main(["plan", "llama_7b_to_1b", "distil", "teacher.random_weights=true", "--nodes", "8"])
    assert capsys.readouterr().out.count("8 nodes of 8 x h100") == 1


def test_what_cannot_be_planned_ends_with_one_message(capsys):
    for arguments, told in (
        (["plan", "no_such_recipe"], "no recipe 'no_such_recipe'"),
        (["plan", "quickstart", "--device", "abacus"], "device = 'abacus' is not one of"),
        (["plan", "quickstart", "train.rows_per_step=9"], "train.rows_per_step = 9 is not a multiple of the 8 ranks"),
        (["plan", "llama_7b_to_1b", "no_stage"], "stage = 'no_stage' is not one of recovery, distil"),
        (["plan", "quickstart", "--gpu-memory-gib", "-1"], "--gpu-memory-gib = -1; it has to be above 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err


@pytest.mark.multiprocess
def test_a_plan_needs_neither_deepspeed_nor_transformers_of_a_known_family():
    probe = (
        "import sys; from toolkit.cli import main; main(['plan', 'quickstart', '--device', 'cpu', '--gpus-per-node', "
        "'2']); print([name for name in ('deepspeed', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_picture_shows_memory_by_phase(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    main(["plan", "quickstart", "--device", "cpu", "--gpus-per-node", "2", "--plot", str(file)])
    assert file.read_bytes()[:4] == b"\x89PNG"
