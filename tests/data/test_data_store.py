import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
from transformers import PreTrainedTokenizer

import toolkit.data.store as store_module
from toolkit.batch import Example
from toolkit.data import DataConfig, PromptDataset, TextConfig, load, load_data, load_text
from toolkit.data.store import Part, StoredExamples, cached, store, tokenizer_sha256

EXAMPLES = [Example(np.array([5, 6, 7]), 2), Example(np.arange(9), 1, (3, 4)), Example(np.array([1, 2]), 1)]


def plain(examples):
    return [(e.tokens.tolist(), e.prompt_length, e.text_starts) for e in examples]


def test_examples_come_back_as_they_were(tmp_path):
    store(tmp_path / "a", iter(EXAMPLES))
    found = StoredExamples(tmp_path / "a")
    assert plain(found) == plain(EXAMPLES) == plain(found[:]) and plain([found[-1]]) == plain(EXAMPLES[-1:])
    assert plain(found[1:]) == plain(EXAMPLES[1:]) and len(found) == 3
    assert isinstance(found[0].tokens.base, np.memmap)  # not copied
    with pytest.raises(IndexError):
        found[3]
    ids = [e.tokens.tolist() for step in range(4) for e in PromptDataset(found, 0).window_examples(step, 0, 1, 3)]
    assert ids == [e.tokens.tolist() for s in range(4) for e in PromptDataset(EXAMPLES, 0).window_examples(s, 0, 1, 3)]


def test_a_part_is_built_once_and_damage_is_mended(tmp_path):
    built = []

    def build():
        built.append(1)
        return {"train": Part(iter(EXAMPLES), [{"prompt": "\u2028 x"}], {"skipped": 2})}

    for key, times in (({"a": 1}, 1), ({"a": 1}, 1), ({"a": 2}, 2)):
        part = cached(tmp_path, key, build)["train"]
        assert len(built) == times and plain(part.examples) == plain(EXAMPLES)
        assert part.rows == [{"prompt": "\u2028 x"}] and part.counts == {"skipped": 2}
        assert part.sha256 == cached(None, {}, lambda: {"x": Part(EXAMPLES)})["x"].sha256
    (key,) = [key for key in tmp_path.glob("*/key.json") if json.loads(key.read_text()) == {"a": 2}]
    tokens = key.parent / "train" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    assert plain(cached(tmp_path, {"a": 2}, build)["train"].examples) == plain(EXAMPLES) and len(built) == 3
    assert not list(tmp_path.glob("*unfinished*"))


def test_what_another_process_made_meanwhile_stays(tmp_path, monkeypatch):
    """It appears between the look that finds nothing and what follows from that."""

    def build():
        return {"train": Part(iter(EXAMPLES))}

    load_it, looks = store_module._load, []

    def load_late(entry):
        looks.append(entry)
        if len(looks) == 1:
            cached(tmp_path, {"a": 1}, build)
            (entry / "made by another").write_text("")
            raise FileNotFoundError(entry)
        return load_it(entry)

    monkeypatch.setattr(store_module, "_load", load_late)
    assert plain(cached(tmp_path, {"a": 1}, build)["train"].examples) == plain(EXAMPLES)
    (entry,) = tmp_path.iterdir()
    assert (entry / "made by another").exists()


def test_where_nothing_can_be_written_the_tokens_are_still_there(tmp_path):
    (tmp_path / "blocked").write_text("")
    with pytest.warns(UserWarning, match="could not be kept"):
        found = cached(tmp_path / "blocked" / "x", {}, lambda: {"train": Part(iter(EXAMPLES))})
    assert plain(found["train"].examples) == plain(EXAMPLES)


def test_the_same_data_is_tokenised_once_wherever_it_lies(tmp_path, write_jsonl, tokenizer, bos_tokenizer, monkeypatch):
    calls = []
    original = load.tokenize_rows
    monkeypatch.setattr(load, "tokenize_rows", lambda *a: calls.append(1) or original(*a))
    rows = [{"prompt": f"Q{n}?", "response": f"A{n}"} for n in range(20)]
    first, second = write_jsonl(rows, "first.jsonl"), write_jsonl(rows, "second.jsonl")
    config = DataConfig(source=first)

    def load_it(config, tokenizer=tokenizer, seed=0):
        calls.clear()
        data = load_data(config, tokenizer, seed, tmp_path / "cache")
        return data, len(calls) > 0

    data, built = load_it(config)
    fresh = load_data(config, tokenizer, 0)
    assert built
    for again in (config, dataclasses.replace(config, source=second), dataclasses.replace(config, packing=True)):
        found, built = load_it(again)
        assert not built
        for one in (found, fresh):
            assert plain(one.train) == plain(data.train) and plain(one.validation) == plain(data.validation)
            assert (one.validation_rows, one.counts, one.sha256) == (data.validation_rows, data.counts, data.sha256)
    with open(second, "a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    for change in ({"source": second}, {"template": "plain"}, {"max_length": 300}, {"validation_fraction": 0.2},
                   {"system": "Be brief."}, {"template_args": {"role": "x"}}):  # fmt: skip
        assert load_it(dataclasses.replace(config, **change))[1], change
    assert load_it(config, bos_tokenizer)[1] and load_it(config, seed=1)[1]
    assert tokenizer_sha256(tokenizer) != tokenizer_sha256(bos_tokenizer)


def test_plain_text_is_kept_too(tmp_path, write_jsonl, tokenizer, monkeypatch):
    source = write_jsonl([{"text": "some words of text"}] * 9)
    config = TextConfig(source=source, max_length=16)
    first, sha256 = load_text(config, tokenizer, None, tmp_path / "cache")
    monkeypatch.setattr(load, "blocks", lambda *a: pytest.fail("tokenised again"))
    again, same = load_text(config, tokenizer, None, tmp_path / "cache")
    assert plain(again) == plain(first) and sha256 == same and isinstance(again, StoredExamples)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_text(config, tokenizer)[1] == sha256 and load_text(TextConfig(), tokenizer) == (None, "")


def test_tokenizers_that_are_code_are_told_apart_by_what_they_do():
    """Two of one vocabulary, as before and after a change of the code that came with a model."""

    class Words(PreTrainedTokenizer):
        split = str.split

        def get_vocab(self):
            return {"a": 0, "b": 1, "<unk>": 2}

        @property
        def vocab_size(self):
            return 3

        def _tokenize(self, text):
            return type(self).split(text)

        def _convert_token_to_id(self, token):
            return self.get_vocab().get(token, 2)

        def _convert_id_to_token(self, index):
            return ("a", "b", "<unk>")[index]

    class Letters(Words):
        split = list

    assert tokenizer_sha256(Words(unk_token="<unk>")) == tokenizer_sha256(Words(unk_token="<unk>"))
    letters = Letters(unk_token="<unk>")
    Letters.__name__ = "Words"
    assert tokenizer_sha256(letters) != tokenizer_sha256(Words(unk_token="<unk>"))
