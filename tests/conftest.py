"""Settings for every test and for the ranks that tests start; they come before the first import of torch."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test reads or fills the user's caches, of converted models for instance. What is compiled stays where it was.
_cache = tempfile.TemporaryDirectory(prefix="distil-tests-")
_cache_of_user, os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", "~/.cache"), _cache.name
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(_cache_of_user, "torch_extensions").expanduser()))
# Ranks are processes of their own: they need the package, and for deepspeed's build the ninja of this venv.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run without a GPU, one program after another

import pytest  # noqa: E402

from tests.rank_pool import RankPool  # noqa: E402


def pytest_collection_modifyitems(items):
    """Whoever runs `-m "not multiprocess"` wants no ranks to be started."""
    for item in items:
        if {"ranks1", "ranks2"} & set(item.fixturenames) and not item.get_closest_marker("multiprocess"):
            raise pytest.UsageError(f"{item.nodeid} runs on ranks: mark it multiprocess")


@pytest.fixture(scope="session")
def ranks1():
    """One rank of its own, with deepspeed."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks2():
    """Two real ranks."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a teacher, students (untied, tied, a copy of the teacher) and rows.jsonl."""
    from tests.tiny import make_tokenizer, save_llama, save_rows

    folder, tokenizer = tmp_path_factory.mktemp("tiny"), make_tokenizer()
    save_llama(folder / "teacher", tokenizer, seed=1, hidden=48, extra_rows=5)
    save_llama(folder / "student", tokenizer, seed=2)
    save_llama(folder / "tied", tokenizer, seed=3, tied=True, extra_rows=8)
    save_rows(folder / "rows.jsonl")
    return folder
