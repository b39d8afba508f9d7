import dataclasses
import datetime
import json
import os
import re
from unittest import mock

import datasets
import pytest

from toolkit.data import DataConfig, load_data, load_rows, references
from toolkit.data.minillm import SETS
from toolkit.data.sources import as_it_reads
from toolkit.ranks import heartbeat
from toolkit.settings.overrides import unknown

ROWS = [{"prompt": "What is two?", "response": "A number."}, {"prompt": "And NA?", "response": "None"}]


def texts(rows):
    return [{"prompt": r["prompt"], "response": r["response"]} for r in rows]


def stopped(source, **settings):
    """The message that load_rows stops with."""
    with pytest.raises(ValueError) as caught:
        load_rows(DataConfig(source=source, **settings), source)
    return str(caught.value)


def test_jsonl_fields_are_renamed_and_blank_lines_passed_over(write_jsonl):
    source = write_jsonl(["", {"ask": "Q", "say": "A", "more": "I"}, "  ", {"ask": "Q2", "say": "A2", "more": None}])
    config = DataConfig(source=source, prompt_field="ask", response_field="say", input_field="more")
    want = [{"prompt": "Q", "input": "I", "response": "A"}, {"prompt": "Q2", "input": "", "response": "A2"}]
    assert load_rows(config, source) == (want, 0)


def test_a_field_within_a_field(write_jsonl):
    source = write_jsonl([{"translation": {"en": "two", "de": "zwei"}, "a.b": "plain"}])
    names = {"prompt_field": "translation.en", "response_field": "translation.de", "input_field": "a.b"}
    assert load_rows(DataConfig(source=source, **names), source)[0] == [
        {"prompt": "two", "input": "plain", "response": "zwei"}
    ]
    message = stopped(source, **names | {"response_field": "translation.fr"})
    assert f"{source}:1, 'translation': no field 'fr', the row has 'en', 'de'; set data.response_field" in message
    assert "no field 'nowhere.en', the row has 'translation', 'a.b'" in stopped(source, prompt_field="nowhere.en")


def test_jsonl_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8-sig")
    assert texts(load_rows(DataConfig(), str(path))[0]) == ROWS[:1]


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet", "arrow"])
def test_round_trip_through_datasets(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    table = datasets.Dataset.from_list([*ROWS, {"prompt": "007", "response": "42"}])
    if suffix == "arrow":
        table.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    else:
        getattr(table, f"to_{suffix}")(str(path))
    rows, skipped = load_rows(DataConfig(cache_dir=str(tmp_path / "cache")), str(path))
    assert (texts(rows), skipped) == ([*ROWS, {"prompt": "007", "response": "42"}], 0)


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_a_file_that_was_written_again_is_read_again(tmp_path, tokenizer, suffix):
    path = tmp_path / f"rows.{suffix}"
    config = DataConfig(source=str(path), cache_dir=str(tmp_path / "cache"), validation_fraction=0.5)
    for answer in ("old", "new"):
        table = datasets.Dataset.from_list([{"prompt": f"Q{n}?", "response": answer} for n in range(4)])
        getattr(table, f"to_{suffix}")(str(path))
        os.utime(path, (1e9, 1e9))
        data = load_data(config, tokenizer, token_cache=tmp_path / "tokens")
        assert {row["response"] for row in data.validation_rows} == {answer}
        assert tokenizer.decode(data.train[0].response) == f"{answer}<|end|>"


def test_each_row_is_a_heartbeat(write_jsonl):
    source = write_jsonl(ROWS * 5)
    with mock.patch.object(heartbeat, "beat") as beat:
        load_rows(DataConfig(), source)
    assert beat.call_count >= 10


def test_max_rows_counts_usable_rows(write_jsonl):
    source = write_jsonl(["broken", *ROWS, ROWS[0]])
    rows, skipped = load_rows(DataConfig(max_rows=2, on_bad_row="skip"), source)
    assert (texts(rows), skipped) == (ROWS, 1)


BAD_LINES = {
    '{"prompt": "a", "resp': r":2: not valid JSON \(.*mend the line",
    '["a", "b"]': ":2: a list, not an object",
    '{"prompt": "a"}': ":2: no field 'response', the row has 'prompt'; set data.response_field",
    '{"question": "a", "answer": "b"}': ":2: no field 'prompt', the row has 'question', 'answer'; set data",
    '{"prompt": "a", "response": ""}': ":2: 'response' is empty.*give the row a response",
    '{"prompt": "a", "response": " \\n"}': ":2: 'response' is empty",
    '{"prompt": "a", "response": null}': r":2: 'response' is empty \(None\)",
    '{"prompt": "", "response": "b"}': ":2: 'prompt' is empty",
    '{"prompt": "a", "response": 42}': r":2: 'response' is 42 \(int\), not text",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_stops_by_file_and_line_or_is_skipped_and_counted(write_jsonl, line):
    source = write_jsonl([ROWS[0], line, ROWS[1]])
    message = stopped(source)
    assert re.search(re.escape(source) + BAD_LINES[line], message) and 'data.on_bad_row to "skip"' in message
    rows, skipped = load_rows(DataConfig(on_bad_row="skip"), source)
    assert (texts(rows), skipped) == (ROWS, 1)


def test_bytes_that_are_not_utf8_are_a_broken_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"prompt": "\xe9", "response": "b"}\n')
    assert f"{path}:2: not valid JSON" in stopped(str(path))


def test_bad_rows_of_a_table_are_named_too(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\na,b\nc,\n")
    assert f"{path} row 2: 'response' is empty" in stopped(str(path), cache_dir=str(tmp_path / "cache"))
    assert load_rows(DataConfig(on_bad_row="skip", cache_dir=str(tmp_path / "cache")), str(path))[1] == 1


def test_missing_field_of_a_table_names_its_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,output\na,b\n")
    assert "no field 'response', the row has 'prompt', 'output'" in stopped(
        str(path), cache_dir=str(tmp_path / "cache")
    )


def test_unreadable_table_is_a_clear_error(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet at all")
    assert f"{path}: could not be read as parquet" in stopped(str(path), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "./no/such/file", "a/b/c", "~/none/x.csv"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    message = stopped(name)
    assert message.startswith(f"{name}: the file is missing (looked at /")


def test_folder_unknown_ending_and_empty_files(tmp_path, write_jsonl):
    assert "the file is a folder" in stopped(str(tmp_path))
    (tmp_path / "rows.txt").write_text("a")
    assert "unknown ending '.txt'; use one of .jsonl, .json, .csv" in stopped(str(tmp_path / "rows.txt"))
    for suffix in ("jsonl", "csv", "parquet"):
        (tmp_path / f"empty.{suffix}").touch()
        assert "the file is empty (0 bytes)" in stopped(str(tmp_path / f"empty.{suffix}"))
    assert "no usable row; it holds none" in stopped(write_jsonl(["", ""]))
    message = stopped(write_jsonl(["x", "y"]), on_bad_row="skip")
    assert "no usable row; all 2 were skipped" in message and ":1: not valid JSON" in message


def test_hub_names_are_passed_on_and_their_failure_explained(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        if args[0] == "no/such":
            raise FileNotFoundError("not on the hub")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(source="some/set", subset="main", split="train[:5]", validation_split="test")
    assert texts(load_rows(config, "some/set")[0]) == ROWS
    load_rows(config, "some/set", is_validation=True)
    assert [a for a, _ in asked] == [("some/set", "main")] * 2
    assert [o["split"] for _, o in asked] == ["train[:5]", "test"]
    assert not any("trust_remote_code" in options for _, options in asked)
    message = stopped("no/such")
    assert "no/such: no such file here" in message and "not on the hub" in message and "'python_docs'" in message


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"template": "alpacca"},
            "data.template = 'alpacca' is not one of chat, alpaca, plain; did you mean 'alpaca'",
        ),
        ({"on_bad_row": "ignore"}, "data.on_bad_row = 'ignore' is not one of stop, skip"),
        ({"on_long_response": "cut"}, "data.on_long_response = 'cut' is not one of truncate, skip, stop"),
        ({"on_long_prompt": "cut"}, "data.on_long_prompt = 'cut' is not one of truncate, skip, stop"),
        ({"system": "x", "template": "alpaca"}, "data.system = 'x' is for a chat template, but data.template = 'alp"),
        ({"template_args": {"a": 1}, "template": "plain"}, r"data.template_args = {'a': 1} is for a chat template"),
        ({"template_args": {"messages": []}}, "every template is given 'messages'"),
        ({"template_args": {"today": datetime.date(2024, 7, 26)}}, "what JSON cannot keep"),
        ({"template_args": {"a": {1: 2}}}, "what JSON cannot keep"),
        ({"source": ""}, "data.source = ''"),
        ({"input_field": "prompt"}, r"\['prompt', 'response', 'prompt'\]; give each its own name"),
        ({"validation_fraction": 1.0}, "data.validation_fraction = 1.0"),
        ({"max_prompt_length": 512}, "data.max_prompt_length = 512 with data.max_length = 512"),
        ({"max_prompt_length": 0}, "data.max_prompt_length = 0"),
        ({"max_rows": 0}, "data.max_rows = 0"),
    ],
)
def test_config_errors(settings, message):
    DataConfig().validate()
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings).validate()


def test_unknown_names_without_a_near_one_guess_nothing():
    assert "did you mean" not in str(unknown("x", "zzz", ["chat"]))


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "3"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]), "value": t["content"]} for t in TURNS
]


@pytest.mark.parametrize("turns", [TURNS, SHAREGPT, [*TURNS, {"role": "user", "content": "Thanks"}]])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_end_with_the_assistants_last_turn(tmp_path, write_jsonl, turns, suffix):
    source = write_jsonl([{"talk": turns}])
    if suffix == "parquet":
        source = str(tmp_path / "rows.parquet")
        datasets.Dataset.from_list([{"talk": turns}]).to_parquet(source)
    config = DataConfig(source=source, messages_field="talk", cache_dir=str(tmp_path / "cache"))
    ((row,), skipped) = load_rows(config, source)
    assert row["messages"] == TURNS[:-1] and row["response"] == "3" and skipped == 0
    assert row["prompt"] == "system: Be brief.\nuser: Two?\nassistant: 2\nuser: Three?"


@pytest.mark.parametrize("turns, message", [
    ("text", "not a list of turns"), ([{"role": "user"}], "it needs role and content"),
    ([{"role": "user", "content": "a"}], "no answer of the assistant"),
    ([{"role": "assistant", "content": "a"}], "no answer of the assistant"),
])  # fmt: skip
def test_conversations_without_an_answer_are_bad_rows(write_jsonl, turns, message):
    source = write_jsonl([{"talk": TURNS}, {"talk": turns}])
    assert f"{source}:2: " in stopped(source, messages_field="talk")
    assert message in stopped(source, messages_field="talk")
    assert load_rows(DataConfig(messages_field="talk", on_bad_row="skip"), source)[1] == 1


@pytest.mark.parametrize("turns", [TURNS, SHAREGPT])
@pytest.mark.parametrize("row, settings", [
    ({}, {}), ({"prompt": "Two?"}, {}), ({}, {"prompt_field": "talk"}), ({}, {"messages_field": "messages"}),
    ({"prompt": "Two?"}, {"response_field": "talk"}),
])  # fmt: skip
def test_a_field_of_turns_is_pointed_at(write_jsonl, turns, row, settings):
    source = write_jsonl([row | {"talk": turns}])
    assert "; 'talk' is a conversation, set data.messages_field=talk, or set" in stopped(source, **settings)
    assert load_rows(DataConfig(messages_field="talk"), source)[1] == 0
    no_turns = write_jsonl([row | {"talk": [{"title": "x"}], "n": []}])
    assert "is a conversation" not in stopped(no_turns, **settings)


MINILLM = dict(prompt_field="instruction", input_field="input", response_field="output")


def test_a_list_of_responses_is_several_references(write_jsonl):
    source = write_jsonl([
        {"instruction": "Q", "input": "", "output": ["A", " ", "B"]}, {"instruction": "Q2", "input": "", "output": "C"},
    ])  # fmt: skip
    rows, _ = load_rows(DataConfig(source=source, **MINILLM), source)
    assert [row["response"] for row in rows] == ["A", "C"]
    assert [references(row) for row in rows] == [["A", "B"], ["C"]]
    for broken in ([], [" "], ["A", 3]):
        bad = write_jsonl([{"instruction": "Q", "input": "", "output": broken}], name="bad.jsonl")
        assert "bad.jsonl:1: 'output' is" in stopped(bad, **MINILLM)


def test_self_instructs_own_instances(write_jsonl):
    row = {"instruction": "Q", "instances": [{"input": "I", "output": "A"}, {"input": "I", "output": "B"}]}
    source = write_jsonl([row])
    rows, _ = load_rows(DataConfig(source=source, **MINILLM), source)
    assert rows == [{"prompt": "Q", "input": "I", "response": "A", "references": ["A", "B"]}]
    row["instances"][1]["input"] = "other"
    assert "2 different inputs" in stopped(write_jsonl([row]), **MINILLM)


def hub_copy(cache, repository, file, rows):
    """The layout of the hub's own cache, with this file in it."""
    folder = cache / f"datasets--{repository.replace('/', '--')}"
    path = folder / "snapshots" / ("0" * 40) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)


def minillm_copy(cache, name):
    """A set of MiniLLM as the hub's cache has it: some rows have one output as text, others a list; "prompt" is the
    templated text."""
    for part, count in (("train", 30), ("validation", 5)):
        file = getattr(SETS[name], part)
        owner, repository, file = file.removeprefix("hf://datasets/").split("/", 2)
        rows = [
            {"instruction": f"{part} {i}", "input": "I" * (i % 2), "prompt": "-", "topic": "-",
             "output": ["A", "B"] if i % 2 else "A"}
            for i in range(count)
        ]  # fmt: skip
        hub_copy(cache, f"{owner}/{repository}", file, rows)


@pytest.mark.parametrize("name", SETS)
def test_the_sets_of_minillm_by_name(tmp_path, name):
    minillm_copy(tmp_path, name)
    config = DataConfig(source=name, cache_dir=str(tmp_path))  # its fields are its own, not the config's
    found, skipped = load_rows(config, name, is_validation=True)
    assert [references(row) for row in found] == [["A"], ["A", "B"], ["A"], ["A", "B"], ["A"]] and skipped == 0
    assert found[1] == {"prompt": "validation 1", "input": "I", "response": "A", "references": ["A", "B"]}
    train, _ = load_rows(config, name)
    is_apart = name == "dolly"  # the others have one file, and are split or evaluated on
    assert len(train) == (30 if is_apart else 5) and train[0]["prompt"] == f"{'train' if is_apart else 'validation'} 0"
    assert as_it_reads(config, name, is_validation=True).max_rows == (10_000 if name == "unni" else None)
    assert as_it_reads(config, name).max_rows is None
    few = dataclasses.replace(config, max_rows=2)
    assert len(load_rows(few, name, is_validation=True)[0]) == 2


def test_a_run_trains_on_one_set_of_minillm_and_validates_on_another(tmp_path, tokenizer, write_jsonl):
    for name in ("dolly", "vicuna"):
        minillm_copy(tmp_path, name)
    config = DataConfig(source="dolly", validation_source="vicuna", template="alpaca", cache_dir=str(tmp_path))
    data = load_data(config, tokenizer, token_cache=tmp_path / "tokens")
    assert (len(data.train), len(data.validation)) == (30, 5)
    assert tokenizer.decode(data.train[3].prompt).endswith(
        "### Instruction:\ntrain 3\n\n### Input:\nI\n\n### Response:\n"
    )
    assert references(data.validation_rows[1]) == ["A", "B"]
    split = load_data(dataclasses.replace(config, validation_source=None, validation_fraction=0.2), tokenizer)
    assert (len(split.train), len(split.validation)) == (24, 6)
    # of the papers' test nothing is trained on or held out, though the file for training has it, spaced otherwise
    raw = tmp_path / "datasets--MiniLLM--dolly" / "snapshots" / ("0" * 40) / "raw.jsonl"
    assert raw.is_file()
    with raw.open("a") as file:
        for row in ({"instruction": "validation  1 ", "input": "I"}, {"instruction": "validation 1", "input": ""}):
            file.write(json.dumps(row | {"output": "leaked", "prompt": "-", "topic": "-"}) + "\n")
    for source in ("vicuna", "dolly"):
        leaky = dataclasses.replace(config, validation_source=source)
        data = load_data(leaky, tokenizer, token_cache=tmp_path / "tokens")
        assert (len(data.train), data.counts["train_skipped_bad"], len(data.validation)) == (31, 1, 5)
    with raw.open() as file:  # a few rows of a file that begins with the test's
        lines = file.readlines()
    raw.write_text("".join(lines[-2:] + lines[:-2]))
    few = dataclasses.replace(config, max_rows=3)
    assert [row["prompt"] for row in load_rows(few, "dolly")[0]] == ["validation 1", "train 0", "train 1"]
    # the same file by its own name has the config's fields, and no other's tokens from the cache
    file = SETS["dolly"].train
    own = dataclasses.replace(config, source=file, prompt_field="prompt", response_field="topic")
    assert "-" in tokenizer.decode(load_data(own, tokenizer, token_cache=tmp_path / "tokens").train[0].prompt)
    rows = write_jsonl([{"prompt": f"own {i}", "response": "x"} for i in range(4)])
    mixed = load_data(dataclasses.replace(config, source=rows), tokenizer)
    assert "own 0" in tokenizer.decode(mixed.train[0].prompt) and len(mixed.validation) == 5


def test_a_hub_file_that_is_not_to_be_had(tmp_path):
    missing = stopped("hf://datasets/nobody/nothing/rows.jsonl", cache_dir=str(tmp_path))
    assert "is not in the cache, and the hub did not give it" in missing
    assert "OWNER/NAME/FILE.jsonl" in stopped("hf://datasets/nobody/nothing")
