"""A run's data from its settings: read, split, tokenised, kept for the next start."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.batch import DECODER_ONLY, Example, RowLayout
from toolkit.data.minillm import LAYOUT, has_test
from toolkit.data.sources import Row, Source, as_it_reads, content_sha256, load_rows
from toolkit.data.store import Part, cached, tokenizer_sha256
from toolkit.data.text import TextStream, blocks, first_documents, is_held_out, read_documents, stream_sha256
from toolkit.data.tokens import tokenize_rows
from toolkit.settings import PYTHON_DOCS, DataConfig, TextConfig

#: The validation text of a stream is so many of the documents that it holds out, or the first of its validation source.
STREAM_VALIDATION_DOCUMENTS = 256


@dataclass(frozen=True)
class Data:
    """train, validation: examples; validation_rows[i] is the text of validation[i] (plain text has none).

    counts: for "train" and "validation" each `_rows` (examples left), `_truncated_prompts`, `_truncated_responses`,
    `_skipped_long` (responses), `_skipped_long_prompts` and `_skipped_bad`. Rows skipped before a source was split
    count as train's. A stream has no counts.
    sha256: of every token; a stream counts by the names and sizes of its files, and its tokenizer.
    """

    train: Sequence[Example] | TextStream
    validation: Sequence[Example]
    validation_rows: list[Row]
    counts: dict[str, int]
    sha256: str


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    token_cache: Path | None = None,
    layout: RowLayout = DECODER_ONLY,
) -> Data:
    """Everything a run trains on and validates on; equal on all ranks.

    `seed` only salts the choice of validation rows where `source` is split: two runs to be compared, or a
    teacher and its student, need the same one. `token_cache`: a folder that keeps the tokens for the next start.
    `layout`: see `tokenize_rows`. Raises ValueError for anything wrong with the settings or the rows, see the parts.
    """
    config.validate()
    if config.kind == "text" and config.streaming:
        return _streamed(config, tokenizer, seed)

    def build() -> dict[str, Part]:
        if config.kind == "text":
            return _text_parts(config, tokenizer, seed)
        return _row_parts(config, tokenizer, seed, layout)

    key = _key(config, tokenizer, seed) | {"layout": layout.name} if token_cache else {}
    parts = cached(token_cache, key, build)
    train, validation = parts["train"], parts["validation"]
    # What the run's report says of them, and one hash for both.
    counts = {}
    for name, part in (("train", train), ("validation", validation)):
        if not part.examples:
            raise ValueError(f"{config.source}: no {name} text is left; use more documents")
        counts[f"{name}_rows"] = len(part.examples)
        counts |= {f"{name}_{what}": count for what, count in part.counts.items()}
    both = hashlib.sha256(f"{train.sha256} {validation.sha256}".encode()).hexdigest()
    return Data(train.examples, validation.examples, list(validation.rows), counts, both)


def load_text(
    config: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | None = None,
    token_cache: Path | None = None,
) -> tuple[Sequence[Example] | TextStream | None, str]:
    """The blocks of plain text that are learned beside the distillation, and the hash of their tokens (of a stream: of
    its files' names and sizes and its tokenizer); (None, "") where the config names no source. Raises ValueError for
    anything wrong with the settings or the text."""
    config.validate()
    if not config.source:
        return None, ""
    # Read while training, or made into blocks now.
    source = Source(config.source, config.subset, config.split, cache_dir)
    if config.streaming:
        return TextStream(source, config.field, tokenizer, config.max_length), stream_sha256(source, tokenizer)

    def build() -> dict[str, Part]:
        documents = itertools.islice(read_documents(source, config.field), config.max_rows)
        return {"text": Part(blocks(documents, tokenizer, config.max_length))}

    key: dict[str, Any] = {}
    if token_cache:
        key = {name: getattr(config, name) for name in ("field", "max_length", "max_rows")}
        key |= {"text": content_sha256(source), "tokenizer": tokenizer_sha256(tokenizer)}
    part = cached(token_cache, key, build)["text"]
    if not part.examples:
        raise ValueError(f"{config.source}: no text in it")
    return part.examples, part.sha256


def split_rows(rows: list[Row], validation_fraction: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(train, validation) by a hash of prompt and input: equal prompts are on one side, and row order does not matter.
    Raises ValueError if one side would be empty."""
    keys = [hashlib.sha256(f"{seed}\0{row['prompt']}\0{row['input']}".encode()).digest() for row in rows]
    last = sorted(keys)[max(1, round(len(rows) * validation_fraction)) - 1]
    train = [row for row, key in zip(rows, keys, strict=True) if key > last]
    validation = [row for row, key in zip(rows, keys, strict=True) if key <= last]
    if not train:
        raise ValueError(
            f"{len(rows)} rows with {len(set(keys))} different prompts and data.validation_fraction = "
            f"{validation_fraction} leave 0 training rows; use more rows or a data.validation_source"
        )
    return train, validation


def _row_parts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, layout: RowLayout) -> dict[str, Part]:
    rows, skipped = load_rows(config, config.source)
    if _is_split(config):
        rows, validation_rows = split_rows(rows, config.validation_fraction, seed)
        validation_skipped = 0
    else:
        source = config.validation_source or PYTHON_DOCS
        validation_rows, validation_skipped = load_rows(config, source, is_validation=True)
    parts = {}
    for name, some, bad in (("train", rows, skipped), ("validation", validation_rows, validation_skipped)):
        part = tokenize_rows(some, tokenizer, config, layout)
        if not part.examples:
            raise ValueError(
                f"{config.source}: none of {len(some)} {name} rows is left after tokenizing "
                f"({dict(part.counts)}); raise data.max_length ({config.max_length}) and data.max_prompt_length "
                f'({config.max_prompt_length}), or set data.on_long_response and data.on_long_prompt to "truncate"; '
                "data.on_bad_row=stop names the first bad row"
            )
        # All counts are there, those that are 0 as well.
        names = ("truncated_prompts", "truncated_responses", "skipped_long", "skipped_long_prompts")
        counts = {what: part.counts[what] for what in names} | {"skipped_bad": bad + part.counts["skipped_bad"]}
        parts[name] = Part(part.examples, part.rows if name == "validation" else [], counts)
    return parts


def _text_parts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Part]:
    """Documents are split by a hash of their text, or validation has a source of its own."""
    is_split, own = _is_split(config), config.validation_source or config.source

    def part(is_validation: bool) -> Part:
        source = Source.of(config, own if is_validation else config.source, is_validation and not is_split)
        found = read_documents(source, config.text_field)
        if is_split:
            found = (text for text in found if is_held_out(text, config.validation_fraction, seed) == is_validation)
        return Part(blocks(itertools.islice(found, config.max_rows), tokenizer, config.max_length))

    return {"train": part(is_validation=False), "validation": part(is_validation=True)}


def _streamed(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    """Training reads a stream; validation is what the stream holds out, or comes from a source of its own."""
    own, field, length = config.validation_source, config.text_field, config.max_length

    def is_validation(text: str) -> bool:
        return is_held_out(text, config.validation_fraction, seed)

    source = Source.of(config, config.source, False)
    if own is None:
        stream = TextStream(source, field, tokenizer, length, lambda text: not is_validation(text))
        held_out = first_documents(source, field, STREAM_VALIDATION_DOCUMENTS, is_validation)
    else:
        stream = TextStream(source, field, tokenizer, length)
        held_out = first_documents(Source.of(config, own, True), field, STREAM_VALIDATION_DOCUMENTS)
    part = cached(None, {}, lambda: {"validation": Part(blocks(held_out, tokenizer, length))})["validation"]
    if not part.examples:
        raise ValueError(f"{own or source.name}: no validation text in it; raise data.validation_fraction")
    sha256 = f"{stream_sha256(source, tokenizer)} {part.sha256}"
    return Data(stream, part.examples, [], {"validation_rows": len(part.examples)}, sha256)


def _is_split(config: DataConfig) -> bool:
    """Whether validation rows are taken out of the source's own."""
    return config.validation_source is None and config.source != PYTHON_DOCS


def _key(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Any]:
    """All that decides the tokens: content, tokenizer, settings; names and places do not."""
    is_split, own = _is_split(config), config.validation_source or config.source
    settings = dataclasses.asdict(as_it_reads(config, config.source))
    for name in ("source", "subset", "split", "validation_source", "validation_split", "cache_dir", "packing"):
        del settings[name]
    reads = as_it_reads(config, own, True)
    settings["validation_reads"] = {name: getattr(reads, name) for name in (*LAYOUT, "max_rows")}
    if has_test(config.source) and config.kind == "instructions":
        settings["test"] = content_sha256(Source.of(config, config.source, True))
    return settings | {
        "seed": seed if is_split else None,
        "train": content_sha256(Source.of(config, config.source, False)),
        "validation": None if is_split else content_sha256(Source.of(config, own, True)),
        "tokenizer": tokenizer_sha256(tokenizer),
    }
