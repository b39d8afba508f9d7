"""What is made of a model once, in a cache that several runs share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_tokenizer, save_llama
from toolkit.pruning.made import materialize
from toolkit.settings import ModelConfig


def test_a_model_written_anew_is_made_anew(tmp_path):
    model, cache = ModelConfig(path=f"{tmp_path}/model", drop_layers=(0,)), tmp_path / "cache"
    save_llama(tmp_path / "model", make_tokenizer(), seed=5)
    first = materialize(model, cache)
    save_llama(tmp_path / "model", make_tokenizer(), seed=6)
    second = materialize(model, cache)
    heads = [load_file(f"{path}/model.safetensors")["lm_head.weight"] for path in (first, second)]
    assert not torch.equal(*heads)


def test_a_relative_path_is_not_another_folder_of_that_name(tmp_path, monkeypatch):
    made = []
    for number in (5, 6):
        save_llama(tmp_path / str(number) / "model", make_tokenizer(), seed=number)
        monkeypatch.chdir(tmp_path / str(number))
        made.append(materialize(ModelConfig(path="./model", drop_layers=(0,)), tmp_path / "cache"))
    assert made[0] != made[1]


@pytest.mark.multiprocess
def test_two_processes_make_it_at_once(tmp_path):
    save_llama(tmp_path / "model", make_tokenizer(), seed=5, layers=4)
    code = (
        "import sys; from pathlib import Path; from toolkit.settings import ModelConfig;"
        "from toolkit.pruning.made import materialize; print('ready', flush=True); sys.stdin.readline();"
        f"print(materialize(ModelConfig(path='{tmp_path}/model', drop_layers=(1,)), Path('{tmp_path}/cache')))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], text=True, stdin=-1, stdout=-1) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    made = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(made) == 1
    assert [str(folder) for folder in (tmp_path / "cache").iterdir()] == list(made)


def test_what_a_killed_run_left_is_not_used(tmp_path):
    save_llama(tmp_path / "model", make_tokenizer(), seed=5)
    model = ModelConfig(path=f"{tmp_path}/model", drop_layers=(1,))
    made = Path(materialize(model, tmp_path / "cache"))
    shutil.rmtree(made)
    left = made.with_name(f"{made.name}.{os.getpid()}.unfinished")
    left.mkdir()
    assert Path(materialize(model, tmp_path / "cache")) == made and (made / "model.safetensors").is_file()
