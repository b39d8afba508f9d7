"""Calibration text: rows of one length without padding, made of what the student will be trained on, or of a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from toolkit.data import DataConfig, load_rows, tokenize_rows
from toolkit.data.sources import Source
from toolkit.data.text import first_documents, read_documents

#: rows are read until they hold the tokens asked for; hardly any data set has fewer tokens a row on average
LEAST_TOKENS_A_ROW = 8


def calibration_ids(data: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: int, row_tokens: int) -> Tensor:
    """ids_RT, at most [rows, row_tokens]: the first texts, one after another, templates as in training. `data.source`
    is anything that training takes, or a .txt file. Raises ValueError for text that fills no row."""
    # Documents as they are, or prompts and answers as they are trained on.
    most = rows * row_tokens // LEAST_TOKENS_A_ROW + 1
    if data.kind == "text" or Path(data.source).suffix.lower() == ".txt":
        source, field = Source.of(data, data.source, False), data.text_field
        documents = first_documents(source, field, most) if data.streaming else read_documents(source, field)
        texts = (tokenizer(text)["input_ids"] for text in documents)
    else:
        data = dataclasses.replace(data, max_rows=min(most, data.max_rows or most))
        examples = tokenize_rows(load_rows(data, data.source)[0], tokenizer, data).examples
        texts = (example.tokens.tolist() for example in examples)
    # A file may hold far more than is wanted.
    ids: list[int] = []
    for text in texts:
        ids += text
        if len(ids) >= rows * row_tokens:
            break
    whole_rows = min(rows, len(ids) // row_tokens)
    if whole_rows < 1:
        raise ValueError(
            f"{data.source} holds {len(ids)} tokens of calibration text, fewer than one row of {row_tokens}; give more "
            "text or shorter rows (row_tokens)"
        )
    return torch.tensor(ids[: whole_rows * row_tokens]).view(whole_rows, row_tokens)
