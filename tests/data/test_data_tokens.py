from unittest import mock

import numpy as np
import pytest

from toolkit.batch import EncoderDecoder, TokenBatch
from toolkit.data import DataConfig, end_with_turns, get_template, load_data, split_rows, tokenize_rows
from toolkit.data.templates import ALPACA_MARKER
from toolkit.ranks import heartbeat

MARKERS = {"chat": "<|end|>\n<|assistant|>\n", "alpaca": ALPACA_MARKER}


def row(prompt="What does it return?", response="Return the number.", input=""):
    return {"prompt": prompt, "input": input, "response": response}


def one(tokenizer, the_row, **settings):
    (example,) = tokenize_rows([the_row], tokenizer, DataConfig(**settings)).examples
    return example


def test_chat_prompt_response_and_eos(tokenizer):
    example = one(tokenizer, row(), template="chat")
    assert tokenizer.decode(example.prompt) == "<|user|>\nWhat does it return?<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(example.response) == "Return the number.<|end|>"


def test_alpaca_is_the_standard_text(tokenizer):
    head = "Below is an instruction that describes a task"
    tail = "Write a response that appropriately completes the request.\n\n### Instruction:\nDo {it}\n\n"
    prompt = get_template("alpaca").prompt
    assert prompt(tokenizer, row("Do {it}"), DataConfig()) == f"{head}. {tail}### Response:\n"
    assert prompt(tokenizer, row("Do {it}", input="{x}"), DataConfig()) == (
        f"{head}, paired with an input that provides further context. {tail}### Input:\n{{x}}\n\n### Response:\n"
    )


def test_plain_is_the_prompt_itself(tokenizer):
    assert tokenizer.decode(one(tokenizer, row(), template="plain").prompt) == "What does it return?"
    assert tokenizer.decode(one(tokenizer, row(input="x"), template="plain").prompt) == "What does it return?\n\nx"


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_the_response_and_its_eos_are_predicted_and_the_prompt_is_not(tokenizer, template):
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos  # the case in which others lose the EOS
    rows = [row(), row("Copy?", "Copy a file to a folder, or return None.")]
    examples = tokenize_rows(rows, tokenizer, DataConfig(template=template)).examples
    batch = TokenBatch.from_examples(examples, tokenizer.pad_token_id)
    want = [t for r in rows for t in tokenizer(r["response"])["input_ids"] + [eos]]
    assert batch.targets_N.tolist() == want


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_an_overlong_prompt_keeps_its_end_and_the_marker(tokenizer, template):
    text = " ".join(f"word{n}" for n in range(200)) + " LAST"
    config = DataConfig(template=template, max_prompt_length=40, max_length=60)
    full = one(tokenizer, row(text), template=template, max_prompt_length=9999, max_length=10000).prompt.tolist()
    part = tokenize_rows([row(text)], tokenizer, config)
    prompt = part.examples[0].prompt
    assert prompt.tolist() == full[-40:] and len(full) > 40
    assert "LAST" in tokenizer.decode(prompt) and tokenizer.decode(prompt).endswith(MARKERS[template])
    assert part.counts["truncated_prompts"] == 1


def test_bos_is_put_once_and_kept_and_an_eos_after_the_prompt_is_not(bos_tokenizer):
    bos, eos = bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id
    for text in ("Copy?", "word " * 100):
        example = one(bos_tokenizer, row(text), template="alpaca", max_prompt_length=40, max_length=60)
        assert example.prompt[0] == bos and (example.tokens == bos).sum() == 1
        assert len(example.prompt) <= 40 and bos_tokenizer.decode(example.prompt).endswith(ALPACA_MARKER)
        assert np.flatnonzero(example.tokens == eos).tolist() == [len(example.tokens) - 1]
    assert one(bos_tokenizer, row(), template="chat").prompt[0] != bos  # the template decides, and has none


def test_long_responses_are_cut_without_eos_or_skipped_or_stop(tokenizer):
    rows = [row(), row(response="number " * 50)]
    settings = {"template": "plain", "max_prompt_length": 10, "max_length": 30}
    part = tokenize_rows(rows, tokenizer, DataConfig(**settings))
    assert len(part.examples[1].tokens) == 30 and tokenizer.eos_token_id not in part.examples[1].tokens
    assert part.examples[0].tokens[-1] == tokenizer.eos_token_id and part.counts["truncated_responses"] == 1
    part = tokenize_rows(rows, tokenizer, DataConfig(**settings, on_long_response="skip"))
    assert len(part.examples) == 1 and part.rows == rows[:1] and part.counts["skipped_long"] == 1
    with pytest.raises(
        ValueError, match=r"usable row 2 \('What.* prompt and \d+ response.*data.max_length = 30; raise"
    ):
        tokenize_rows(rows, tokenizer, DataConfig(**settings, on_long_response="stop"))


def test_long_prompts_are_skipped_or_stop(tokenizer):
    rows, settings = [row(), row("number " * 50)], {"template": "plain", "max_prompt_length": 10, "max_length": 30}
    part = tokenize_rows(rows, tokenizer, DataConfig(**settings, on_long_prompt="skip"))
    assert part.rows == rows[:1] and part.counts == {"skipped_long_prompts": 1}
    with pytest.raises(
        ValueError, match=r"usable row 2 \('number .* \d+ prompt tokens with data.max_prompt_length = 10; raise it"
    ):
        tokenize_rows(rows, tokenizer, DataConfig(**settings, on_long_prompt="stop"))
    whole = len(one(tokenizer, row(), template="plain").prompt)  # one that just fits is none of them
    assert (
        one(tokenizer, row(), template="plain", max_prompt_length=whole, on_long_prompt="stop").prompt_length == whole
    )


def test_a_response_that_just_fits_is_whole(tokenizer):
    length = len(one(tokenizer, row()).tokens)
    for max_length, is_whole in ((length, True), (length - 1, False)):
        example = one(tokenizer, row(), max_length=max_length, max_prompt_length=max_length - 1)
        assert (example.tokens[-1] == tokenizer.eos_token_id) == is_whole and len(example.tokens) == max_length


def test_a_response_that_brings_its_eos_gets_no_second(tokenizer):
    assert tokenizer.decode(one(tokenizer, row(response="Copy<|end|>")).response) == "Copy<|end|>"
    with pytest.raises(ValueError, match=r"usable row 1 .* 0 response tokens"):
        one(tokenizer, row(response="<|end|>"))
    part = tokenize_rows([row(response="<|end|>"), row()], tokenizer, DataConfig(on_bad_row="skip"))
    assert part.counts["skipped_bad"] == 1 and part.rows == [row()]


def test_tokenizers_that_cannot_serve_are_refused(new_tokenizer, tokenizer):
    with pytest.raises(ValueError, match='no chat template; use "alpaca" or "plain"'):
        one(new_tokenizer(chat=False), row(), template="chat")
    with pytest.raises(ValueError, match="no EOS token"):
        one(new_tokenizer(eos=False), row(), template="plain")
    with pytest.raises(ValueError, match=r'max_prompt_length = 3, but the end of a "alpaca" prompt .* needs \d+'):
        one(tokenizer, row(), template="alpaca", max_prompt_length=3)
    with pytest.raises(ValueError, match=r"max_prompt_length = 1, .* needs 2"):  # an encoder's EOS is no prompt
        tokenize_rows([row()], tokenizer, DataConfig(template="plain", max_prompt_length=1), EncoderDecoder(0))
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        get_template("plan")


def test_load_data_splits_a_file(write_jsonl, tokenizer):
    rows = [row(f"Question {n}?", f"Answer {n}.") for n in range(100)]
    config = DataConfig(source=write_jsonl(["broken", *rows]), on_bad_row="skip", validation_fraction=0.1)
    data = load_data(config, tokenizer, seed=3)
    assert (len(data.train), len(data.validation)) == (90, 10)
    assert data.counts["train_rows"] == 90 and data.counts["train_skipped_bad"] == 1
    for example, the_row in zip(data.validation, data.validation_rows, strict=True):
        assert the_row["prompt"] in tokenizer.decode(example.prompt)
    prompts = {tokenizer.decode(e.prompt) for e in data.train + data.validation}
    assert len(prompts) == 100
    again, other = load_data(config, tokenizer, seed=3), load_data(config, tokenizer, seed=4)
    assert again.validation_rows == data.validation_rows != other.validation_rows


def test_load_data_takes_a_validation_file(write_jsonl, tokenizer):
    train = write_jsonl([row(f"T{n}?") for n in range(4)])
    validation = write_jsonl([row(f"V{n}?") for n in range(3)], "validation.jsonl")
    data = load_data(DataConfig(source=train, validation_source=validation), tokenizer, 0)
    assert len(data.train) == 4 and [r["prompt"] for r in data.validation_rows] == ["V0?", "V1?", "V2?"]


def test_load_data_of_python_docs(tokenizer):
    data = load_data(DataConfig(max_rows=50), tokenizer, 0)
    assert (len(data.train), len(data.validation)) == (50, 50)
    assert not {e.tokens.tobytes() for e in data.train} & {e.tokens.tobytes() for e in data.validation}


def test_load_data_with_nothing_left(write_jsonl, tokenizer):
    source = write_jsonl([row(f"Q{n}?", "number " * 90) for n in range(4)])
    config = DataConfig(source=source, on_long_response="skip", max_prompt_length=30, max_length=40)
    with pytest.raises(ValueError, match=r"none of 3 train rows is left.*'skipped_long': 3.*data.max_length \(40\)"):
        load_data(config, tokenizer, 0)


def test_equal_prompts_stay_on_one_side():
    rows = [row(f"Q{n % 20}?", f"A{n}") for n in range(200)]
    train, validation = split_rows(rows, 0.1)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in validation}
    assert len(train) + len(validation) == 200 and 10 <= len(validation) <= 40
    assert {r["response"] for r in split_rows(rows[::-1], 0.1)[1]} == {r["response"] for r in validation}


def test_a_split_without_training_rows_is_refused():
    with pytest.raises(ValueError, match=r"1 rows with 1 different prompts and data.validation_fraction = 0.05"):
        split_rows([row()], 0.05)


def test_a_conversation_goes_through_the_chat_template(tokenizer):
    turns = (("user", "Two?"), ("assistant", "2"), ("user", "3?"))
    before = [{"role": role, "content": content} for role, content in turns]
    example = one(tokenizer, {**row("x", "3"), "messages": before}, template="chat")
    assert tokenizer.decode(example.prompt) == (
        "<|user|>\nTwo?<|end|>\n<|assistant|>\n2<|end|>\n<|user|>\n3?<|end|>\n<|assistant|>\n"
    )
    assert tokenizer.decode(example.response) == "3<|end|>"


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day(new_tokenizer):
    tokenizer = new_tokenizer()
    tokenizer.chat_template = (
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{{ date_string }}, {{ strftime_now('%A, %Y-%m-%d') }}: {{ messages[0]['content'] }}"
    )
    date = "26 Jul 2024, Friday, 2024-07-26: "
    turns = {"messages": [{"role": "user", "content": "Two?"}]}
    for the_row, text in ((row(), "What does it return?"), (row() | turns, "Two?")):
        assert tokenizer.decode(one(tokenizer, the_row).prompt) == f"{date}{text}"
    asked = one(tokenizer, row(), template_args={"date_string": "1 Jan 2030"}).prompt
    assert tokenizer.decode(asked).startswith("1 Jan 2030, Friday")


SYSTEM = "<|system|>\nBe brief.<|end|>\n"


def test_a_system_turn_goes_before_rows_without_one(tokenizer):
    own = {"messages": [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Two?"}]}
    none = {"messages": own["messages"][1:]}
    for the_row, wanted in (
        (row("Two?"), SYSTEM + "<|user|>\nTwo?<|end|>\n<|assistant|>\n"),
        (row("Two?", input="x"), SYSTEM + "<|user|>\nTwo?\n\nx<|end|>\n<|assistant|>\n"),
        (row() | none, SYSTEM + "<|user|>\nTwo?<|end|>\n<|assistant|>\n"),
        (row() | own, SYSTEM.replace("brief", "long") + "<|user|>\nTwo?<|end|>\n<|assistant|>\n"),
    ):
        assert tokenizer.decode(one(tokenizer, the_row, system="Be brief.").prompt) == wanted
    assert len(none["messages"]) == 1  # the rows are kept as they were


def test_arguments_of_a_chat_template(new_tokenizer):
    tokenizer = new_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is false %}<think></think>{% endif %}"
    ends = [
        tokenizer.decode(one(tokenizer, row(), template_args=args).prompt).endswith("<|assistant|>\n<think></think>")
        for args in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert ends == [False, False, True]
    with pytest.raises(ValueError, match="does not read 'thinking'; mend the name"):
        one(tokenizer, row(), template_args={"thinking": False})


ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def test_turns_that_the_template_refuses_are_a_bad_row(new_tokenizer):
    tokenizer = new_tokenizer()
    tokenizer.chat_template = ALTERNATE
    twice = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    rows = [row("One?"), row("user: a\nuser: b") | twice, row("Three?")]
    with pytest.raises(ValueError, match=(
        r"usable row 2 \('user: a.*\): the tokenizer's chat template refuses the turns user, user: Roles must "
        'alternate; mend the row, or set data.on_bad_row to "skip"'
    )):  # fmt: skip
        tokenize_rows(rows, tokenizer, DataConfig())
    part = tokenize_rows(rows, tokenizer, DataConfig(on_bad_row="skip"))
    assert part.rows == [rows[0], rows[2]] and part.counts == {"skipped_bad": 1}
    assert [tokenizer.decode(example.prompt) for example in part.examples] == ["One?", "Three?"]


def test_a_template_that_takes_no_system_turn_is_told_once(new_tokenizer):
    tokenizer = new_tokenizer()
    tokenizer.chat_template = ALTERNATE
    with pytest.raises(ValueError, match=r"refuses the turns system, user: .*change data.system \('Be brief.'\)"):
        tokenize_rows([row()], tokenizer, DataConfig(system="Be brief.", on_bad_row="skip"))
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"data.system = 'Be brief.', but the chat template .* leaves out a system"):
        tokenize_rows([row()], tokenizer, DataConfig(system="Be brief."))


@pytest.mark.parametrize(("eos", "after", "wanted"), [
    ("<s>", "<|end|>\n", "<|end|>"), ("<s>", " <|end|>", "<|end|>"), ("<s>", "\n\n", "<s>"),
    ("<|end|>", "<|end|>", "<|end|>"),
])  # fmt: skip
def test_an_answer_ends_as_a_turn_does(new_tokenizer, eos, after, wanted):
    tokenizer = new_tokenizer()
    tokenizer.eos_token = eos
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>{{ m['content'] }}" + after + "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    end_with_turns(tokenizer, "plain")
    assert tokenizer.eos_token == eos
    end_with_turns(tokenizer, "chat")
    assert tokenizer.eos_token == wanted
    (example,) = tokenize_rows([row()], tokenizer, DataConfig()).examples
    assert example.response[-1] == tokenizer.convert_tokens_to_ids(wanted)


def test_tokenizing_tells_that_it_goes_on(tokenizer, monkeypatch):
    monkeypatch.setattr("toolkit.data.tokens.CHUNK_ROWS", 2)
    with mock.patch.object(heartbeat, "beat") as beat:
        tokenize_rows([row()] * 10, tokenizer, DataConfig())
    assert beat.call_count >= 5


def test_references_stay_beside_the_validation_examples(write_jsonl, tokenizer):
    source = write_jsonl([{"prompt": f"Q{n}?", "response": [f"A{n}", f"B{n}"]} for n in range(20)])
    data = load_data(DataConfig(source=source), tokenizer, 0)
    for example, the_row in zip(data.validation, data.validation_rows, strict=True):
        assert tokenizer.decode(example.response) == the_row["references"][0] + "<|end|>"
