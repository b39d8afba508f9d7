"""Tokenizers and files for the data tests."""

import json

import pytest

from tests.tiny import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def new_tokenizer():
    return make_tokenizer


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows (or raw strings, as they are) as jsonl and returns the path as text."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return str(path)

    return write
