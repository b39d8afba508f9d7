"""Rows of text to token ids. The only place that truncates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from toolkit.batch import DECODER_ONLY, Example, RowLayout
from toolkit.data.sources import Row
from toolkit.data.templates import Refused, Template, get_template
from toolkit.ranks import heartbeat
from toolkit.settings import DataConfig

CHUNK_ROWS = 1024


class Tokenized(NamedTuple):
    """examples[i] is rows[i] in tokens. counts: truncated_prompts, truncated_responses, skipped_long (responses),
    skipped_long_prompts, skipped_bad."""

    examples: list[Example]
    rows: list[Row]
    counts: Counter[str]


def tokenize_rows(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, layout: RowLayout = DECODER_ONLY
) -> Tokenized:
    """Prompt ids, response ids, EOS for every row, order kept.

    A prompt longer than max_prompt_length goes by config.on_long_prompt; what is left of one that is cut is up to the
    layout of the model's rows, as is what ends a prompt. A response and its EOS that do not fit into max_length go by
    config.on_long_response. Prompt and response are tokenized apart: a generated response continues just the prompt ids
    that training has seen. Raises ValueError if the tokenizer has no EOS, if the marker does not fit into
    max_prompt_length, for a row without tokens or with turns that the chat template refuses (on_bad_row "stop"), and
    for a long prompt or response (on_long_prompt, on_long_response "stop").
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token; no student could learn to stop")
    # What cannot be for any row is told before the first one.
    template = get_template(config.template)
    _check_marker(template, tokenizer, config, layout)
    found = Tokenized([], [], Counter())
    # The tokenizer gets many texts at a time, which it works on in parallel.
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        texts = [_prompt_text(template, tokenizer, row, config) for row in chunk]
        prompts = _prompt_ids(texts, template, tokenizer, layout)
        responses = _ids([row["response"] for row in chunk], tokenizer)
        for number, (row, text, prompt, response) in enumerate(zip(chunk, texts, prompts, responses, strict=True), 1):
            response = response if response[-1:] == [tokenizer.eos_token_id] else [*response, tokenizer.eos_token_id]
            name = partial("usable row {} ({!r:.60})".format, start + number, row["prompt"])
            # The ending alone is no prompt, and EOS alone no response.
            if isinstance(text, Refused) or len(prompt) <= layout.prompt_ending or len(response) < 2:
                if config.on_bad_row == "stop":
                    sizes = f"{len(prompt)} prompt and {len(response) - 1} response tokens"
                    what = text if isinstance(text, Refused) else sizes
                    raise ValueError(f'{name()}: {what}; mend the row, or set data.on_bad_row to "skip"')
                found.counts["skipped_bad"] += 1
                continue
            example = _fitted(prompt, response, name, config, found.counts, tokenizer, layout)
            if example is not None:
                found.examples.append(example)
                found.rows.append(row)
    return found


def _fitted(prompt: list[int], response: list[int], name: Callable[[], str], config: DataConfig, counts: Counter[str],
            tokenizer: PreTrainedTokenizerBase, layout: RowLayout) -> Example | None:  # fmt: skip
    """Prompt and response, cut where they are too long; None where the settings skip such a row."""
    # The prompt has its own limit.
    if len(prompt) > config.max_prompt_length:
        if config.on_long_prompt == "stop":
            raise ValueError(
                f"{name()}: {len(prompt)} prompt tokens with data.max_prompt_length = {config.max_prompt_length}; "
                'raise it, or set data.on_long_prompt to "truncate" or "skip"'
            )
        if config.on_long_prompt == "skip":
            counts["skipped_long_prompts"] += 1
            return None
        counts["truncated_prompts"] += 1
        prompt = layout.cut_prompt(prompt, config.max_prompt_length, tokenizer)
    # The response gets the room that is left.
    room = config.max_length - len(prompt)
    if len(response) > room:
        if config.on_long_response == "stop":
            raise ValueError(
                f"{name()}: {len(prompt)} prompt and {len(response)} response tokens (EOS included) with "
                f'data.max_length = {config.max_length}; raise it, or set data.on_long_response to "truncate" or "skip"'
            )
        if config.on_long_response == "skip":
            counts["skipped_long"] += 1
            return None
        counts["truncated_responses"] += 1
    return Example(np.array(prompt + response[:room], dtype=np.int32), len(prompt))


def _prompt_text(template: Template, tokenizer: PreTrainedTokenizerBase, row: Row, config: DataConfig) -> str | Refused:
    """A row that its template refuses is the exception that said so."""
    try:
        return template.prompt(tokenizer, {**row, "prompt": config.prefix + row["prompt"]}, config)
    except Refused as error:
        return error


def _prompt_ids(
    texts: list[str | Refused], template: Template, tokenizer: PreTrainedTokenizerBase, layout: RowLayout
) -> list[list[int]]:
    """Whole, with BOS where the tokenizer begins a text with it and the template does not, ended as the layout has it.
    An EOS that the tokenizer adds is unwanted."""
    begins = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = [tokenizer.bos_token_id] if begins and not template.has_specials else []
    found = _ids(["" if isinstance(text, Refused) else text for text in texts], tokenizer)
    return [layout.end_prompt(ids if ids[:1] == bos else bos + ids, tokenizer) for ids in found]


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    heartbeat.beat()
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _check_marker(
    template: Template, tokenizer: PreTrainedTokenizerBase, config: DataConfig, layout: RowLayout
) -> None:
    marker = template.marker(tokenizer, config)
    # The marker stands beside a BOS or an ending, and every prompt keeps one token of its own.
    needed = len(_ids([marker], tokenizer)[0]) + 2 if marker else 1 + layout.prompt_ending
    if needed > config.max_prompt_length:
        raise ValueError(
            f'data.max_prompt_length = {config.max_prompt_length}, but the end of a "{config.template}" prompt '
            f"({marker!r}) needs {needed}; raise it, or no prompt would be left"
        )
