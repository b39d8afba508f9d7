"""Rows of text to token ids. The only place that truncates."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from toolkit.batch import Example
from toolkit.data.templates import Refused, Template, get_template
from toolkit.ranks import heartbeat
from toolkit.settings import DataConfig

CHUNK_ROWS = 1024


class Tokenized(NamedTuple):
    """examples[i] is rows[i] in tokens.

    counts: truncated_prompts, truncated_responses, skipped_long (responses), skipped_long_prompts, skipped_bad.
    """

    examples: list[Example]
    rows: list[dict]
    counts: Counter


def tokenize_rows(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, config: DataConfig, for_encoder: bool = False
) -> Tokenized:
    """Prompt ids, response ids, EOS for every row ({"prompt", "input", "response"}), order kept.

    A prompt longer than max_prompt_length goes by config.on_long_prompt; one that is cut keeps its last tokens, so the
    template's marker stays, and its BOS if it begins with one. A response and its EOS that do not fit into max_length
    go by config.on_long_response. Prompt and response are tokenized apart: a generated response continues just the
    prompt ids that training has seen. `for_encoder`: prompts end in EOS, as T5's encoder was trained, and one that is
    cut loses what stands before that.

    Raises ValueError if the tokenizer has no EOS, if the marker does not fit into max_prompt_length, for a row without
    tokens or with turns that the chat template refuses (on_bad_row "stop"), and for a long prompt or response
    (on_long_prompt, on_long_response "stop").
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token; a student could not learn to stop"
        )
    template = get_template(config.template)
    _check_marker(template, tokenizer, config, for_encoder)
    examples, kept, counts = [], [], Counter()
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        texts = [_prompt_text(template, tokenizer, row, config) for row in chunk]
        prompts = _prompt_ids(texts, template, tokenizer, for_encoder)
        responses = _ids([row["response"] for row in chunk], tokenizer)
        for number, (row, text, prompt, response) in enumerate(
            zip(chunk, texts, prompts, responses, strict=True), start + 1
        ):
            response = response if response[-1:] == [tokenizer.eos_token_id] else [*response, tokenizer.eos_token_id]
            is_refused = isinstance(text, Refused)
            if is_refused or len(prompt) <= for_encoder or len(response) < 2:  # an encoder's EOS alone is no prompt
                if config.on_bad_row == "stop":
                    what = text if is_refused else f"{len(prompt)} prompt and {len(response) - 1} response tokens"
                    raise ValueError(f'{_name(number, row)}: {what}; mend the row, or set data.on_bad_row to "skip"')
                counts["skipped_bad"] += 1
                continue
            if len(prompt) > config.max_prompt_length:
                if config.on_long_prompt == "stop":
                    raise ValueError(
                        f"{_name(number, row)}: {len(prompt)} prompt tokens with data.max_prompt_length = "
                        f'{config.max_prompt_length}; raise it, or set data.on_long_prompt to "truncate" or "skip"'
                    )
                if config.on_long_prompt == "skip":
                    counts["skipped_long_prompts"] += 1
                    continue
                counts["truncated_prompts"] += 1
                prompt = _cut(prompt, config.max_prompt_length, tokenizer, for_encoder)
            room = config.max_length - len(prompt)
            if len(response) > room:
                if config.on_long_response == "stop":
                    raise ValueError(
                        f"{_name(number, row)}: {len(prompt)} prompt and {len(response)} response tokens (EOS "
                        f"included) with data.max_length = {config.max_length}; raise it, or set "
                        'data.on_long_response to "truncate" or "skip"'
                    )
                if config.on_long_response == "skip":
                    counts["skipped_long"] += 1
                    continue
                counts["truncated_responses"] += 1
            examples.append(Example(np.array(prompt + response[:room], dtype=np.int32), len(prompt)))
            kept.append(row)
    return Tokenized(examples, kept, counts)


def _name(number: int, row: dict) -> str:
    return f"usable row {number} ({row['prompt']!r:.60})"


def _prompt_text(
    template: Template, tokenizer: PreTrainedTokenizerBase, row: dict, config: DataConfig
) -> str | Refused:
    """A row that its template refuses is the exception that said so."""
    try:
        return template.prompt(tokenizer, row | {"prompt": config.prefix + row["prompt"]}, config)
    except Refused as error:
        return error


def _prompt_ids(
    texts: list[str | Refused], template: Template, tokenizer: PreTrainedTokenizerBase, for_encoder: bool
) -> list[list[int]]:
    """Whole, with BOS or EOS where the model expects them."""
    bos, prompts = _bos(template, tokenizer), []
    for ids in _ids(["" if isinstance(text, Refused) else text for text in texts], tokenizer):
        if ids[:1] != bos:
            ids = bos + ids
        if for_encoder and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        prompts.append(ids)
    return prompts


def _cut(ids: list[int], longest: int, tokenizer: PreTrainedTokenizerBase, for_encoder: bool) -> list[int]:
    if for_encoder:
        return [*ids[: longest - 1], tokenizer.eos_token_id]
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return head + ids[len(ids) - (longest - len(head)) :]


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    heartbeat.beat()
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _bos(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer begins a text with it and the template does not. An EOS it adds is unwanted."""
    begins = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins and not template.has_specials else []


def _check_marker(
    template: Template, tokenizer: PreTrainedTokenizerBase, config: DataConfig, for_encoder: bool
) -> None:
    marker = template.marker(tokenizer, config)
    # with a BOS, or an encoder's EOS, and one token of the prompt itself
    needed = len(_ids([marker], tokenizer)[0]) + 2 if marker else 1 + for_encoder
    if needed > config.max_prompt_length:
        raise ValueError(
            f"data.max_prompt_length = {config.max_prompt_length}, but the end of a "
            f'"{config.template}" prompt '
            f"({marker!r}) needs {needed}; raise it, or no prompt would be left"
        )
