import itertools
import json
import warnings
from unittest import mock

import datasets
import huggingface_hub
import numpy as np
import pytest

from toolkit.batch import TokenBatch
from toolkit.data import DataConfig, TextConfig, TextStream, load_data, load_text
from toolkit.data.python_docs import python_docs_rows
from toolkit.data.sources import Source, content_sha256
from toolkit.data.text import CHUNK_CHARACTERS, blocks, first_documents, is_held_out, read_documents
from toolkit.models import Vocabulary
from toolkit.ranks import heartbeat
from toolkit.run.inputs import _load_data, load_plain_text
from toolkit.settings import RunConfig

DOCUMENTS = [f"Document {n}: " + "the number of a file. " * (n * 7 % 11) for n in range(60)]


def texts_of(block):
    bounds = [0, *block.text_starts, len(block.tokens)]
    return [block.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("which", ["tokenizer", "bos_tokenizer"])
def test_blocks_are_full_and_hold_all_documents_with_eos_between(which, request):
    tokenizer = request.getfixturevalue(which)
    found = list(blocks(DOCUMENTS, tokenizer, 32))
    assert all(len(block.tokens) == 32 for block in found[:-1]) and len(found[-1].tokens) <= 32
    head = [tokenizer.bos_token_id] * (which == "bos_tokenizer")
    documents = [
        [*head, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in DOCUMENTS
    ]
    assert np.concatenate([block.tokens for block in found]).tolist() == [*itertools.chain.from_iterable(documents)]
    # a text begins where a document does, and where a block does
    begins = np.cumsum([0, *map(len, documents)]).tolist()
    wanted = sorted({*begins[:-1], *range(0, begins[-1], 32)})
    assert [n * 32 + start for n, block in enumerate(found) for start in (0, *block.text_starts)] == wanted


def test_every_token_of_a_block_is_predicted_but_the_first_of_each_text(tokenizer):
    block = next(iter(blocks(DOCUMENTS[3:], tokenizer, 40)))
    batch = TokenBatch.from_examples([block], tokenizer.pad_token_id)
    assert batch.targets_N.tolist() == [token for text in texts_of(block) for token in text[1:]]


def write(tmp_path, suffix):
    if suffix == "folder":  # the first file ends within a turn of 2 ranks
        path = tmp_path / "texts"
        path.mkdir()
        for name, part in (("a", DOCUMENTS[:23]), ("b", DOCUMENTS[23:])):
            (path / f"{name}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in part))
        return path
    rows = datasets.Dataset.from_list([{"body": text, "n": n} for n, text in enumerate(DOCUMENTS)])
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "arrow":
        rows.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    else:
        getattr(rows, f"to_{suffix}")(str(path))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_a_text_field_of_any_table(tmp_path, suffix):
    source = Source(str(write(tmp_path, suffix)), cache_dir=str(tmp_path / "cache"))
    assert list(read_documents(source, "body")) == DOCUMENTS


def test_text_files_and_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("second\n\ntext")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8-sig")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n{"text": ""}\n{"text": null}\n')
    (tmp_path / "picture.png").write_bytes(b"\xff\x00")
    (tmp_path / "blank.txt").write_text(" \n")
    assert list(read_documents(Source(str(tmp_path)), "text")) == ["first", "third", "second\n\ntext"]
    line = "a line of text\n"
    (tmp_path / "a.txt").write_text(line * (2 * CHUNK_CHARACTERS // len(line)))
    pieces = list(read_documents(Source(str(tmp_path / "a.txt")), "text"))
    assert len(pieces) > 1 and set("".join(pieces).splitlines(True)) == {line} and all(p[-1] == "\n" for p in pieces)


def test_wrong_text_sources_are_named(tmp_path, tokenizer):
    def stopped(name, field="text"):
        with pytest.raises(ValueError) as caught:
            list(read_documents(Source(str(name)), field))
        return str(caught.value)

    (tmp_path / "x.txt").write_bytes(b"\xff\xfe bad")
    assert "x.txt: not UTF-8 text" in stopped(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    assert "holds no file with the endings .txt" in stopped(tmp_path / "empty")
    for name in ("no.txt", "no.jsonl", "no/such/place"):
        assert f"{name}: the file is missing (looked at {tmp_path / name}); give the path" in stopped(tmp_path / name)
    (tmp_path / "y.jsonl").write_text('{"text": "a"}\nbroken\n')
    assert "y.jsonl:2: not valid JSON" in stopped(tmp_path / "y.jsonl")
    (tmp_path / "z.jsonl").write_text('{"body": "a"}\n')
    assert "z.jsonl:1: no field 'text', the row has 'body'; set the text field" in stopped(tmp_path / "z.jsonl")
    (tmp_path / "n.jsonl").write_text('{"text": 3}\n')
    assert "'text' is 3 (int), not text" in stopped(tmp_path / "n.jsonl")
    with pytest.raises(ValueError, match="no text in it"):
        (tmp_path / "z.jsonl").write_text('{"text": ""}\n')
        load_text(TextConfig(source=str(tmp_path / "z.jsonl")), tokenizer)


def decoded(tokenizer, found):
    return "".join(tokenizer.decode(example.tokens) for example in found)


def test_documents_are_held_out_by_their_text(tmp_path, tokenizer):
    source = str(write(tmp_path, "jsonl"))
    config = DataConfig(kind="text", source=source, text_field="body", max_length=32, validation_fraction=0.3)
    data = load_data(config, tokenizer, seed=1)
    train, validation = (decoded(tokenizer, part) for part in (data.train, data.validation))
    for n, text in enumerate(DOCUMENTS):
        inside, outside = (validation, train) if is_held_out(text, 0.3, 1) else (train, validation)
        assert f"Document {n}:" in inside and f"Document {n}:" not in outside
    assert 8 <= sum(is_held_out(text, 0.3, 1) for text in DOCUMENTS) <= 28 and data.validation_rows == []
    assert data.counts == {"train_rows": len(data.train), "validation_rows": len(data.validation)}
    streamed = load_data(DataConfig(**{**vars(config), "streaming": True}), tokenizer, seed=1)
    assert decoded(tokenizer, streamed.validation) == validation
    count = len(data.train) - 1  # the last may be short, and a stream goes on with the first document
    found = streamed.train.window_examples(0, 0, 1, count)
    assert [e.tokens.tolist() for e in found] == [e.tokens.tolist() for e in data.train[:count]]


def test_python_docs_as_text_have_a_validation_of_their_own(tmp_path, tokenizer):
    config = DataConfig(kind="text", max_length=64, max_rows=30)
    first, again = (load_data(config, tokenizer, 0, tmp_path) for _ in range(2))
    train, validation = (decoded(tokenizer, part) for part in (first.train, first.validation))
    rows = python_docs_rows("train")[:30], python_docs_rows("validation")[:30]
    for text, mine in ((train, rows[0]), (validation, rows[1])):
        assert text == "".join(f"{row['prompt']}\n{row['response']}<|end|>" for row in mine)
    assert first.sha256 == again.sha256 and decoded(tokenizer, again.train) == train


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_stream_goes_on_exactly_where_its_state_says(tmp_path, tokenizer, world, suffix, monkeypatch):
    monkeypatch.setattr("toolkit.data.text.CHUNK_DOCUMENTS", 7)
    source = Source(str(write(tmp_path, suffix)), cache_dir=str(tmp_path / "cache"))

    def new():
        return [TextStream(source, "body", tokenizer, 32) for _ in range(world)]

    def window(streams, step):
        return [[e.tokens.tolist() for e in s.window_examples(step, rank, world, 3)] for rank, s in enumerate(streams)]

    streams, checked = new(), new()
    wanted, states = [], []
    for rank, stream in enumerate(checked):
        stream.check(rank, world)
    for step in range(45):
        wanted.append(window(streams, step))
        states.append(json.loads(json.dumps([s.state_dict() for s in streams])))
    assert [window(checked, step) for step in range(45)] == wanted and [s.state_dict() for s in checked] == states[-1]
    for stop in (0, 3, 10, 24, 39):
        resumed = new()
        for rank, stream in enumerate(resumed):
            stream.check(rank, world)
            stream.load_state_dict(states[stop], rank)
        assert [window(resumed, step) for step in range(stop + 1, 45)] == wanted[stop + 1 :]
    # in one pass each document is read by one rank only, and the stream starts over
    texts = [tokenizer.decode([t for w in wanted for block in w[rank] for t in block]) for rank in range(world)]
    seen = [[text.count(f"Document {n}:") for n in range(60)] for text in texts]
    assert all(min(counts) == 0 and max(counts) >= 2 for counts in seen) or world == 1
    assert all((a == 0) != (b == 0) for a, b in zip(*seen, strict=True)) if world == 2 else min(seen[0]) >= 1


def test_a_short_file_is_read_as_often_as_a_long_one(tmp_path, tokenizer):
    for name, count in (("a", 100), ("b", 3)):
        rows = [{"text": f"Document {name}{n:02}: some words"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # passes end together
        for rank in range(2):
            stream = TextStream(Source(str(tmp_path)), "text", tokenizer, 16)
            read += decoded(tokenizer, [e for step in range(300) for e in stream.window_examples(step, rank, 2, 1)])
    counts = [read.count(f"Document {name}:") for name in (*(f"a{n:02}" for n in range(100)), "b00", "b01", "b02")]
    assert max(counts) - min(counts) <= 1 < min(counts)


def test_one_file_of_a_hub_set_as_text(tmp_path, tokenizer):
    name = "hf://datasets/some/corpus/part/rows.jsonl"
    config = TextConfig(source=name, field="body", max_length=32)
    with mock.patch.object(huggingface_hub, "hf_hub_download", return_value=str(write(tmp_path, "jsonl"))) as download:
        found, sha256 = load_text(config, tokenizer, str(tmp_path), tmp_path / "tokens")
        stream, _ = load_text(TextConfig(**{**vars(config), "streaming": True}), tokenizer, str(tmp_path))
        streamed = stream.window_examples(0, 0, 1, len(found) - 1)
    download.assert_called_once_with("some/corpus", "part/rows.jsonl", repo_type="dataset", cache_dir=str(tmp_path))
    assert sha256 == load_text(TextConfig(**{**vars(config), "source": f"{tmp_path}/rows.jsonl"}), tokenizer)[1]
    assert [e.tokens.tolist() for e in streamed] == [e.tokens.tolist() for e in found[:-1]]
    with (
        mock.patch.object(huggingface_hub, "hf_hub_download", side_effect=OSError("no network")),
        pytest.raises(ValueError, match=r"such/rows\.jsonl is not in the cache, and the hub did not give it: OSError"),
    ):
        load_text(TextConfig(source="hf://datasets/no/such/rows.jsonl"), tokenizer)


def test_a_hub_set_is_streamed_and_goes_on_exactly(tokenizer, bos_tokenizer, monkeypatch):
    rows = [{"body": text} for text in DOCUMENTS]

    def load_dataset(name, subset, *, split, streaming, cache_dir):
        assert (name, subset, split, streaming) == ("some/corpus", "en", "train", True)
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("toolkit.data.text.CHUNK_DOCUMENTS", 7)
    config = TextConfig(source="some/corpus", subset="en", field="body", max_length=32, streaming=True)
    (first, identity), (resumed, same) = load_text(config, tokenizer), load_text(config, tokenizer)
    other = load_text(TextConfig(**{**vars(config), "source": "other/corpus"}), tokenizer)[1]
    # Its documents are not read for it, so the tokenizer stands for their tokens.
    assert identity == same and len({identity, other, load_text(config, bos_tokenizer)[1]}) == 3
    for step in range(6):
        first.window_examples(step, 1, 2, 2)
    state = json.loads(json.dumps(first.state_dict()))
    resumed.load_state_dict([{}, state], 1)
    with pytest.warns(UserWarning) as told:
        for step in range(6, 60):
            ours, theirs = (s.window_examples(step, 1, 2, 2) for s in (resumed, first))
            assert [e.tokens.tolist() for e in ours] == [e.tokens.tolist() for e in theirs]
    passes = [f"some/corpus: rank 1 of 2 begins pass {n} over its documents" for n in (2, 3)]
    assert [str(w.message).split(".")[0] for w in told] == [text for text in passes for _ in (resumed, first)]
    again, _ = load_text(config, tokenizer)
    again.load_state_dict([{}, json.loads(json.dumps(first.state_dict()))], 1)
    assert first.state_dict()["passes"] == again.state_dict()["passes"] == 2


def test_reading_tells_that_it_goes_on(tmp_path, tokenizer, monkeypatch):
    def beats(work):
        with mock.patch.object(heartbeat, "beat") as beat:
            work()
        return beat.call_count

    for suffix in ("jsonl", "parquet"):
        source = Source(str(write(tmp_path, suffix)))
        assert beats(lambda source=source: list(read_documents(source, "body"))) >= len(DOCUMENTS)
    (tmp_path / "a.txt").write_text("a line of text\n" * (3 * CHUNK_CHARACTERS // 15))
    assert beats(lambda: list(read_documents(Source(f"{tmp_path}/a.txt"), "text"))) >= 3
    assert beats(lambda: content_sha256(Source(str(tmp_path)))) >= 3
    monkeypatch.setattr("toolkit.data.text.CHUNK_DOCUMENTS", 1)
    assert beats(lambda: list(blocks(DOCUMENTS, tokenizer, 32))) >= len(DOCUMENTS)
    rows = datasets.Dataset.from_list([{"body": text} for text in DOCUMENTS])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows.to_iterable_dataset())
    assert beats(lambda: list(first_documents(Source("some/corpus"), "body", 60))) >= len(DOCUMENTS)


def test_a_stream_with_nothing_for_a_rank_stops(tmp_path, tokenizer):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "a document " * 30}) + "\n")
    assert TextStream(Source(str(path)), "text", tokenizer, 16).window_examples(0, 0, 2, 2)
    with pytest.raises(ValueError, match="no usable text for rank 1 of 2"):
        TextStream(Source(str(path)), "text", tokenizer, 16).window_examples(0, 1, 2, 2)
    TextStream(Source(str(path)), "text", tokenizer, 16).check(0, 2)
    with pytest.raises(ValueError, match="no usable text for rank 1 of 2"):
        TextStream(Source(str(path)), "text", tokenizer, 16).check(1, 2)
    with pytest.raises(ValueError, match="no usable text for rank 0 of 1"):
        TextStream(Source(str(path)), "text", tokenizer, 16, lambda text: False).check(0, 1)
    with pytest.raises(ValueError, match="python_docs' is not streamed"):
        TextStream(Source("python_docs"), "text", tokenizer, 16).window_examples(0, 0, 1, 1)


@pytest.mark.parametrize("section", ["data", "text"])
def test_a_stream_that_cannot_be_read_is_refused_before_a_model_loads(tmp_path, tokenizer, section):
    good = write(tmp_path, "jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"other": "words"}\n')
    field = {"data": "text_field", "text": "field"}[section]
    config = RunConfig().with_settings({
        "data.kind": "text", "data.validation_source": str(good), "data.text_field": "body", "data.max_length": 16,
        f"{section}.streaming": True, f"{section}.{field}": "body", "train.rows_per_step": 1,
    })  # fmt: skip

    def load(source):
        asked = config.with_settings({f"{section}.source": source})
        if section == "text":
            return load_plain_text(asked, tokenizer, tmp_path)[0]
        return _load_data(asked, tokenizer, Vocabulary(400, (1,), 1), tmp_path).train

    for source, message in ((bad, "no field 'body'"), ("no/such-set", "no/such-set: no such file here, and the hub's")):
        with pytest.raises(ValueError, match=message):
            load(str(source))
    assert "Document 0:" in decoded(
        tokenizer, load(str(good)).window_examples(0, 0, 1, 1)
    )  # it begins at its beginning


@pytest.mark.parametrize("config, message", [
    (DataConfig(kind="texts"), "did you mean 'text'"), (DataConfig(streaming=True), "data.streaming is for plain text"),
    (DataConfig(kind="text", max_length=4), "data.max_length = 4 for blocks of text"),
    (TextConfig(weight=0), "text.weight = 0"), (TextConfig(max_length=2), "text.max_length = 2"),
    (TextConfig(rows_per_step=0), "text.rows_per_step = 0"),
    (TextConfig(streaming=True, max_rows=9), "text.max_rows = 9 with text.streaming = true; .* set max_rows to null"),
    (DataConfig(kind="text", streaming=True, max_rows=9), "data.max_rows = 9 with data.streaming = true"),
    (DataConfig(messages_field="m", template="alpaca"), "'m' is for a chat template, but data.template = 'alpaca'"),
    (DataConfig(messages_field="m", prefix="summarize: "), "data.prefix = 'summarize: ' goes before a prompt"),
])  # fmt: skip
def test_settings_that_cannot_work(config, message):
    with pytest.raises(ValueError, match=message):
        config.validate()
