"""Data: sources -> templates -> tokens -> examples. `load_data` does all of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from toolkit.batch import Example
from toolkit.data.config import PYTHON_DOCS, DataConfig
from toolkit.data.dataset import PromptDataset
from toolkit.data.sources import load_rows
from toolkit.data.templates import TEMPLATES, get_template
from toolkit.data.tokens import Tokenized, encode_prompts, tokenize_rows

__all__ = [
    "TEMPLATES",
    "Data",
    "DataConfig",
    "PromptDataset",
    "Tokenized",
    "encode_prompts",
    "get_template",
    "load_data",
    "load_rows",
    "split_rows",
    "tokenize_rows",
]


@dataclass(frozen=True)
class Data:
    """train, validation: examples; validation_rows[i] is the text of validation[i].

    counts: for "train" and "validation" each `_rows` (examples left), `_truncated_prompts`,
    `_truncated_responses`, `_skipped_long` and `_skipped_bad`. Rows skipped before a source was split count
    as train's.
    """

    train: list[Example]
    validation: list[Example]
    validation_rows: list[dict]
    counts: dict[str, int]


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0, for_encoder: bool = False) -> Data:
    """Everything a run trains on and validates on; equal on all ranks.

    `seed` only salts the choice of validation rows where `source` is split: two runs to be compared, or a
    teacher and its student, need the same one. `for_encoder`: prompts as `encode_prompts` has them. Raises
    ValueError for anything wrong with the settings or the rows, see the parts.
    """
    config.validate()
    rows, skipped = load_rows(config, config.source)
    validation_skipped = 0
    if config.validation_source is None and config.source != PYTHON_DOCS:
        rows, validation_rows = split_rows(rows, config.validation_fraction, seed)
    else:
        source = config.validation_source or PYTHON_DOCS
        validation_rows, validation_skipped = load_rows(config, source, is_validation=True)
    parts, counts = {}, {}
    for name, some, bad in (("train", rows, skipped), ("validation", validation_rows, validation_skipped)):
        part = parts[name] = tokenize_rows(some, tokenizer, config, for_encoder)
        if not part.examples:
            raise ValueError(
                f"{config.source}: none of {len(some)} {name} rows is left after tokenizing "
                f"({dict(part.counts)}); raise "
                f'data.max_length ({config.max_length}), or set data.on_long_response to "truncate"'
            )
        counts[f"{name}_rows"] = len(part.examples)
        for what in ("truncated_prompts", "truncated_responses", "skipped_long"):
            counts[f"{name}_{what}"] = part.counts[what]
        counts[f"{name}_skipped_bad"] = bad + part.counts["skipped_bad"]
    return Data(parts["train"].examples, parts["validation"].examples, parts["validation"].rows, counts)


def split_rows(rows: list[dict], validation_fraction: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(train, validation) by a hash of prompt and input, so equal prompts are on one side and row order does
    not matter.

    Raises ValueError if one side would be empty.
    """
    keys = [hashlib.sha256(f"{seed}\0{row['prompt']}\0{row['input']}".encode()).digest() for row in rows]
    last = sorted(keys)[max(1, round(len(rows) * validation_fraction)) - 1]
    train = [row for row, key in zip(rows, keys, strict=True) if key > last]
    validation = [row for row, key in zip(rows, keys, strict=True) if key <= last]
    if not train:
        raise ValueError(
            f"{len(rows)} rows with {len(set(keys))} different prompts and data.validation_fraction = "
            f"{validation_fraction} leave {len(train)} training rows; use more rows or a "
            "data.validation_source"
        )
    return train, validation
