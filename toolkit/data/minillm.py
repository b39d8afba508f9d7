"""The five instruction sets of MiniLLM (Gu et al. 2024, arXiv 2306.08543), which the papers after it evaluate on.

Their files are jsonl with "instruction", "input" and "output", which is a text or a list of texts; the "prompt" beside
them is templated already, and is not read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

#: fields of DataConfig that read MiniLLM's layout, from a file as from the hub
LAYOUT: dict[str, Any] = {
    "prompt_field": "instruction",
    "input_field": "input",
    "response_field": "output",
    "messages_field": None,
}
#: where MiniLLM's authors keep the files
_HUB = "hf://datasets/MiniLLM/"


class InstructionSet(NamedTuple):
    """One file each for training and validation, which is the papers' test: its prompts are left out of training.
    Beside a file lies a .txt, which `datasets` would read as data too. max_rows: of validation."""

    train: str
    validation: str
    max_rows: int | None = None


def _only(file: str, max_rows: int | None = None) -> InstructionSet:
    return InstructionSet(_HUB + file, _HUB + file, max_rows)


#: name -> files. All but Dolly were made to evaluate on, and have a single file.
SETS = {
    "dolly": InstructionSet(f"{_HUB}dolly/raw.jsonl", f"{_HUB}dolly/valid.jsonl"),  # 500 rows of validation
    "self_inst": _only("self-inst/valid.jsonl"),  # 242 rows
    "vicuna": _only("Vicuna/valid.jsonl"),  # 80 rows
    "sni": _only("sinst/11_/valid.jsonl"),  # 1,694 rows: answers of 11 words and more
    "unni": _only("uinst/11_/valid.jsonl", max_rows=10_000),  # the first 10,000 of the file
}


def has_test(name: str) -> bool:
    """Whether this is a set with a file to train on and another one for the papers' test."""
    return name in SETS and SETS[name].train != SETS[name].validation
