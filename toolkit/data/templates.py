"""How a row of text becomes a prompt for a model: an exact-name table.

A template ends its prompts in a fixed marker after which the response begins. The paper's protocol uses "alpaca".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from toolkit.data.sources import Row, Turn
from toolkit.settings import TEMPLATE_NAMES, DataConfig
from toolkit.settings.overrides import unknown

#: for chat templates that print the date: with today's, tokens would change from day to day. Llama 3.2's own default
TODAY = datetime(2024, 7, 26)
ALPACA_MARKER = "### Response:\n"
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n" + ALPACA_MARKER
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n" + ALPACA_MARKER
)


class Refused(ValueError):
    """A chat template does not take a row's turns."""


@dataclass(frozen=True)
class Template:
    """prompt(tokenizer, row, config) is the prompt's text, or raises Refused; marker(tokenizer, config) is the tail
    that all its prompts share, or raises ValueError where the tokenizer's template does not go with the settings.
    has_specials: the prompt's text holds BOS and the like already, so the tokenizer must add none."""

    prompt: Callable[[PreTrainedTokenizerBase, Row, DataConfig], str]
    marker: Callable[[PreTrainedTokenizerBase, DataConfig], str]
    has_specials: bool


def get_template(name: str) -> Template:
    """Raises ValueError for a name not in the table."""
    if name not in TEMPLATES:
        raise unknown("data.template", name, TEMPLATES)
    return TEMPLATES[name]


def _plain(tokenizer: PreTrainedTokenizerBase, row: Row, config: DataConfig) -> str:
    return f"{row['prompt']}\n\n{row['input']}" if row.get("input") else row["prompt"]


def _alpaca(tokenizer: PreTrainedTokenizerBase, row: Row, config: DataConfig) -> str:
    return ALPACA_INPUT.format(**row) if row.get("input") else ALPACA.format(prompt=row["prompt"])


def _chat(tokenizer: PreTrainedTokenizerBase, row: Row, config: DataConfig) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f'data.template = "chat", but the tokenizer {tokenizer.name_or_path!r} has no chat template; '
            'use "alpaca" or "plain", or set tokenizer.chat_template'
        )
    # The row's turns, behind the system turn of the settings where there is none.
    messages = row.get("messages") or [{"role": "user", "content": _plain(tokenizer, row, config)}]
    if config.system and all(turn["role"] != "system" for turn in messages):
        messages = [{"role": "system", "content": config.system}, *messages]
    # Today's date stands still. transformers lets no function through as an argument, but keeps what it compiled.
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        chat_template_utils._compile_jinja_template(template).globals["strftime_now"] = TODAY.strftime
    args = {"date_string": TODAY.strftime("%d %b %Y")} | config.template_args
    try:
        return _text(tokenizer, messages, add_generation_prompt=True, **args)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise Refused(f"the tokenizer's chat template refuses the turns {roles}: {error}") from error


def _text(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], **args: Any) -> str:
    """What the chat template makes of the turns."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, **args)
    assert isinstance(text, str)
    return text


def end_with_turns(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Make the token that ends a turn in the chat template the tokenizer's EOS, where it is another one, as Gemma's
    <end_of_turn> is: a model that was tuned on turns ends its answers with it, so learned answers have to as well."""
    if template != "chat" or tokenizer.chat_template is None:
        return
    # What the template writes behind an answer begins with that token.
    answer = "An answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        _, found, after = _text(tokenizer, turns).rpartition(answer)
    except Exception:  # a template that takes no such conversation says nothing of its turns
        return
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    added = tokenizer.added_tokens_decoder
    if ids and ids[0] in added and added[ids[0]].special and ids[0] != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])


def _chat_marker(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """What the chat template writes after the user's text, up to where the assistant begins."""
    probe = "the user's text"
    try:
        text = _chat(tokenizer, Row(prompt=probe, input="", response=""), config)
    except Refused as error:
        advice = f'change data.system ({config.system!r}), or set data.template to "alpaca" or "plain"'
        raise ValueError(f"{error}; {advice}") from error
    # A setting that the template passes over would be lost without a word.
    theirs = f"the chat template of {tokenizer.name_or_path!r}"
    for name in config.template_args:
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            told = f"data.template_args = {config.template_args!r}, but {theirs} does not read {name!r}"
            raise ValueError(f"{told}; mend the name, or take it out")
    if config.system.strip() not in text:
        raise ValueError(
            f"data.system = {config.system!r}, but {theirs} leaves out a system turn; set data.system to "
            '"", or write it into the prompts (data.prefix)'
        )
    return text.rpartition(probe)[2]


TEMPLATES = {
    "chat": Template(_chat, _chat_marker, has_specials=True),
    "alpaca": Template(_alpaca, lambda tokenizer, config: ALPACA_MARKER, has_specials=False),
    "plain": Template(_plain, lambda tokenizer, config: "", has_specials=False),
}
assert tuple(TEMPLATES) == TEMPLATE_NAMES
