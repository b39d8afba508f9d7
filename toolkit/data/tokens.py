"""Rows of text to token ids. The only place that truncates."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from toolkit import heartbeat
from toolkit.batch import Example
from toolkit.data.config import DataConfig
from toolkit.data.templates import Template, get_template

CHUNK_ROWS = 1024


class Tokenized(NamedTuple):
    """examples[i] is rows[i] in tokens.

    counts: truncated_prompts, truncated_responses, skipped_long, skipped_bad.
    """

    examples: list[Example]
    rows: list[dict]
    counts: Counter


def tokenize_rows(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, config: DataConfig, for_encoder: bool = False
) -> Tokenized:
    """Prompt ids, response ids, EOS for every row ({"prompt", "input", "response"}), order kept.

    A prompt longer than max_prompt_length keeps its last tokens, so the template's marker stays, and its BOS
    if it begins with one. A response and its EOS that do not fit into max_length go by
    config.on_long_response. Prompt and response are tokenized apart: a generated response continues just the
    prompt ids that training has seen. `for_encoder`: as in `encode_prompts`.

    Raises ValueError if the tokenizer has no EOS, if the marker does not fit into max_prompt_length, for a
    row without tokens (on_bad_row "stop") and for a long response (on_long_response "stop").
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token; a student could not learn to stop"
        )
    template = get_template(config.template)
    _check_marker(template, tokenizer, config)
    examples, kept, counts = [], [], Counter()
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        prompts = encode_prompts(chunk, tokenizer, config, counts, for_encoder)
        responses = _ids([row["response"] for row in chunk], tokenizer)
        for number, (row, prompt, response) in enumerate(zip(chunk, prompts, responses, strict=True), start + 1):
            response = response if response[-1:] == [tokenizer.eos_token_id] else [*response, tokenizer.eos_token_id]
            room = config.max_length - len(prompt)
            if len(prompt) <= for_encoder or len(response) < 2:  # an encoder's EOS alone is no prompt
                if config.on_bad_row == "stop":
                    raise ValueError(
                        f"usable row {number} ({row['prompt']!r:.60}) has {len(prompt)} prompt and "
                        f"{len(response) - 1} "
                        'response tokens; mend the row, or set data.on_bad_row to "skip"'
                    )
                counts["skipped_bad"] += 1
                continue
            if len(response) > room:
                if config.on_long_response == "stop":
                    raise ValueError(
                        f"usable row {number} ({row['prompt']!r:.60}): {len(prompt)} prompt and "
                        f"{len(response)} response "
                        f"tokens (EOS included) with data.max_length = {config.max_length}; raise it, or set "
                        'data.on_long_response to "truncate" or "skip"'
                    )
                if config.on_long_response == "skip":
                    counts["skipped_long"] += 1
                    continue
                counts["truncated_responses"] += 1
            examples.append(Example(np.array(prompt + response[:room], dtype=np.int32), len(prompt)))
            kept.append(row)
    return Tokenized(examples, kept, counts)


def encode_prompts(
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    counts: Counter | None = None,
    for_encoder: bool = False,
) -> list[list[int]]:
    """Templated, truncated prompt ids of rows {"prompt", "input"}: what training sees and what generation
    starts from. `for_encoder`: they end in EOS, as T5's encoder was trained, and a long one loses what stands before
    that; without it they are cut at their beginning.

    Adds the number of prompts that were cut to counts["truncated_prompts"].
    """
    template = get_template(config.template)
    bos = _bos(template, tokenizer)
    longest, prompts = config.max_prompt_length, []
    rows = [row | {"prompt": config.prefix + row["prompt"]} for row in rows]
    for ids in _ids([template.prompt(tokenizer, row) for row in rows], tokenizer):
        if ids[:1] != bos:
            ids = bos + ids
        if for_encoder and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        if len(ids) > longest:
            if for_encoder:
                ids = [*ids[: longest - 1], tokenizer.eos_token_id]
            else:
                head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
                ids = head + ids[len(ids) - (longest - len(head)) :]
            if counts is not None:
                counts["truncated_prompts"] += 1
        prompts.append(ids)
    return prompts


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    heartbeat.beat()
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _bos(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer begins a text with it and the template does not. An EOS it adds is unwanted."""
    begins = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins and not template.has_specials else []


def _check_marker(template: Template, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
    marker = template.marker(tokenizer)
    needed = len(_ids([marker], tokenizer)[0]) + 2 if marker else 1  # with a BOS and one token of the prompt itself
    if needed > config.max_prompt_length:
        raise ValueError(
            f"data.max_prompt_length = {config.max_prompt_length}, but the end of a "
            f'"{config.template}" prompt '
            f"({marker!r}) needs {needed}; raise it, or no prompt would be left"
        )
