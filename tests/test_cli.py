"""`python -m toolkit` as a user types it."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cli import app, main

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["init-student", "cache-teacher", "plan", "evaluate"]
PYTHON = [sys.executable, "-m", "toolkit"]


def typed(command, **environment):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )


@pytest.mark.multiprocess
def test_help_is_there_for_every_command_with_an_example_and_imports_no_torch():
    probe = f"""
import sys
from toolkit.cli import main
for name in [None, {", ".join(map(repr, COMMANDS))}]:
    main([name, "-h"] if name else ["--help"])
    assert name == "evaluate" or "torch" not in sys.modules, name  # its settings are read by what uses them
"""
    done = typed([sys.executable, "-c", probe])
    assert done.returncode == 0, done.stderr
    overview, *pages = done.stdout.split("Usage: ")[1:]
    for name, page in zip(COMMANDS, pages, strict=True):
        assert f"\n  {name} " in overview
        assert f"Example:\n    python -m toolkit {name} " in page
    assert "sampling.no_repeat_ngram_size" in pages[-1]


@pytest.mark.multiprocess
def test_a_launcher_s_other_ranks_print_no_help():
    done = typed([*PYTHON, "evaluate", "--help", "--local_rank=1"], RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["evalute"], "No such command 'evalute'. Did you mean 'evaluate'?\nsee `python -m toolkit --help`"),
        (
            ["evaluate", "--data", "x", "--out", "y"],
            "Missing option '--model'.\nsee `python -m toolkit evaluate --help`",
        ),
        (["cache-teacher", "quickstart", "--out", "x", "--top-k", "ten"], "Invalid value for '--top-k'"),
    ],
)
def test_wrong_arguments_are_told_once_and_end_with_exit_code_2(arguments, told, monkeypatch, capsys):
    """By the first of two ranks: the second one, which has not joined it yet, leaves the message to it."""
    for rank, said in (("0", f"error: {told}"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match=r"^2$"):
            main(arguments)
        found = capsys.readouterr()
        assert found.out == "" and found.err.startswith(said) and bool(found.err) == bool(said)


@pytest.mark.multiprocess
def test_wrong_arguments_end_a_process_with_exit_code_2():
    done = typed([*PYTHON, "evalute"])
    assert (done.returncode, done.stdout) == (2, "") and "did you mean 'evaluate'" in done.stderr.lower()


def test_settings_come_before_and_after_options_in_any_order(monkeypatch):
    given = {}
    command = importlib.import_module("toolkit.run.cache_command")
    monkeypatch.setattr(command, "cache_teacher", lambda *args, **named: given.update(args=args, **named))
    app(
        ["cache-teacher", "gpt2", "0.1b/kd", "--top-k", "8", "seed=3", "--out", "folder", "data.max_length=9"],
        standalone_mode=False,
    )()
    assert given["args"] == ("gpt2", ["0.1b/kd", "seed=3", "data.max_length=9"], Path("folder"))
    assert (given["top_k"], given["draws"], given["shard_tokens"]) == (8, 0, 65536)


def test_an_interrupt_ends_a_command_as_it_ends_python(monkeypatch):
    def interrupted(*args, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("toolkit.run.cache_command.cache_teacher", interrupted)
    monkeypatch.setattr("toolkit.ranks.launch.start", lambda hang_s: None)
    with pytest.raises(KeyboardInterrupt):
        main(["cache-teacher", "quickstart", "--out", "folder"])


@pytest.mark.multiprocess
def test_a_shell_completes_commands_and_values():
    script = [sys.executable, "-c", "import sys; sys.argv[0] = 'distil-toolkit'; from toolkit.cli import main; main()"]

    def completed(words):
        environment = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        return typed(script, _DISTIL_TOOLKIT_COMPLETE="complete_bash", **environment).stdout.split()

    assert completed("distil-toolkit ev") == ["evaluate"]
    assert completed("distil-toolkit init-student --width ev") == ["even"]


@pytest.mark.multiprocess
def test_evaluate_by_plain_python_and_by_the_launcher_on_two_ranks(tiny, tmp_path):
    rows = [{"instruction": f"What is {i}?", "input": "", "output": "a number"} for i in range(5)]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "evaluate", "--model", f"{tiny}/student", "--data", f"{tmp_path}/valid.jsonl", "--seeds", "10,20",
        "data.max_length=190", "data.max_prompt_length=170", "precision=fp32", "--out",
    ]  # fmt: skip
    one = typed([*PYTHON, *arguments, f"{tmp_path}/one.jsonl"])
    assert one.returncode == 0, one.stderr
    assert "| ROUGE-L" in one.stdout and " ± " in one.stdout
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["deepspeed", "--log_level", "error", "--num_accelerators", "2", "--master_port", str(port)]
    two = typed([*launcher, "--module", "toolkit", *arguments, f"{tmp_path}/two.jsonl"], DS_ACCELERATOR="cpu")
    assert two.returncode == 0, two.stdout + two.stderr
    assert two.stdout.count("| ROUGE-L") == 1
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    found = json.loads((tmp_path / "one.summary.json").read_text())
    assert found["settings"]["rows"] == 5 and set(found["models"]) == {f"{tiny}/student"}
