"""What a run needs of a teacher for whom a cache answers: nothing that is not here, but a tokenizer."""

import shutil
from fnmatch import fnmatch
from unittest import mock

import huggingface_hub
import pytest

from tests.tiny import make_tokenizer, save_llama, tiny_overrides
from toolkit.run import inputs
from toolkit.settings import RunConfig

SHAPE = {"model_type": "llama", "vocab_size": 400, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 256}  # fmt: skip
WITHOUT_TOKENIZER = {"student.path": "", "student.random_weights": True, "student.shape": SHAPE}


@pytest.fixture(scope="module")
def weightless(tiny):
    """The teacher's folder without its weights."""
    return shutil.copytree(tiny / "teacher", tiny / "weightless", ignore=lambda *_: ["model.safetensors"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def loaded(tiny, **changes):
    given = {"teacher.cache": "unread", "loss.divergence": "fkl", **changes}
    return inputs.load_inputs(RunConfig().with_overrides(tiny_overrides(tiny, **given)))


@pytest.mark.parametrize("student", [{}, WITHOUT_TOKENIZER], ids=["with its tokenizer", "without"])
def test_a_folder_is_taken_without_weights(tiny, weightless, student):
    found = loaded(tiny, **{"teacher.path": str(weightless)}, **student)
    assert found.teacher_path == str(weightless)
    assert found.tokenizer.get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("student", [{}, WITHOUT_TOKENIZER], ids=["with its tokenizer", "without"])
def test_of_a_hub_name_what_is_cached(tiny, hub, student):
    cached, revision = hub / "models--someone--teacher", "0" * 40
    save_llama(cached / "snapshots" / revision, make_tokenizer(), seed=5)
    (cached / "snapshots" / revision / "model.safetensors").unlink()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    with mock.patch.object(huggingface_hub, "snapshot_download", wraps=huggingface_hub.snapshot_download) as fetch:
        found = loaded(tiny, **{"teacher.path": "someone/teacher"}, **student)
    assert found.teacher_path == str(cached / "snapshots" / revision)
    (wanted,) = fetch.call_args_list
    assert wanted.kwargs["local_files_only"] == (not student)  # else the tokenizer's files, and no weights
    assert not any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in wanted.kwargs["allow_patterns"])


@pytest.mark.parametrize("path", ["someone/teacher", "/models/gone", "package:not_installed", "gone.gguf"])
def test_of_a_teacher_that_is_not_here_nothing(tiny, hub, path):
    assert loaded(tiny, **{"teacher.path": path}).teacher_path == ""
    with pytest.raises(ValueError, match=f"no tokenizer of its own, and that of the teacher {path} could not be had"):
        loaded(tiny, **{"teacher.path": path}, **WITHOUT_TOKENIZER)


def test_layers_are_left_out_of_a_teacher_that_is_here(tiny, weightless):
    dropped = {"teacher.drop_layers": [0]}
    made = loaded(tiny, **{"teacher.path": f"{tiny}/teacher"}, **dropped).teacher_path
    assert "teacher-without-0" in made
    assert loaded(tiny, **{"teacher.path": str(weightless)}, **dropped).teacher_path == ""
