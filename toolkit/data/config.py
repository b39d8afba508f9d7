"""The `data` section of a run's config."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

PYTHON_DOCS = "python_docs"
TEMPLATE_NAMES = ("chat", "alpaca", "plain")
ON_BAD_ROW = ("stop", "skip")
ON_LONG_RESPONSE = ("truncate", "skip", "stop")


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name not in a table: lists the known names, and the nearest where one is near."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return ValueError(
        f"{what} = {name!r} is not one of {', '.join(known)}" + (f"; did you mean {near[0]!r}?" if near else "")
    )


@dataclass(frozen=True)
class DataConfig:
    """Where prompts and responses come from, and how they become tokens. Lengths are in tokens.

    source: "python_docs" (needs no network), a .jsonl/.json/.csv/.parquet/.arrow file, or a hub data set.
    subset, split, validation_split: which part of a hub data set; files and "python_docs" do not use them.
    validation_source: as `source`. None takes `validation_fraction` of the source's rows by a hash of their
    prompt, so equal prompts stay on one side ("python_docs" has a validation split of its own, by module).
    input_field: a second prompt field, as Alpaca's and Dolly's "input"; rows may leave it empty.
    prefix: goes before every prompt's text, as T5's "summarize: ".
    max_length: prompt and response together. max_prompt_length: a longer prompt loses its oldest tokens, so that the
    template's end stays; before an encoder, which reads it as a whole, it loses its last ones, and its EOS stays.
    on_long_response: a response that does not fit is cut and gets no EOS, or is skipped, or is an error.
    on_bad_row: a row that cannot be used is an error that names it, or is skipped and counted.
    max_rows: at most this many usable rows of each source.
    cache_dir: for prepared data sets; None is the `datasets` library's own place.
    """

    source: str = PYTHON_DOCS
    subset: str | None = None
    split: str = "train"
    validation_source: str | None = None
    validation_split: str = "validation"
    validation_fraction: float = 0.05
    prompt_field: str = "prompt"
    response_field: str = "response"
    input_field: str | None = None
    template: str = "chat"
    prefix: str = ""
    max_length: int = 512
    max_prompt_length: int = 256
    on_long_response: str = "truncate"
    max_rows: int | None = None
    on_bad_row: str = "stop"
    cache_dir: str | None = None

    def validate(self) -> None:
        """Raises ValueError for the first setting that cannot work, with its value and what to do."""
        for name, known in (
            ("template", TEMPLATE_NAMES),
            ("on_bad_row", ON_BAD_ROW),
            ("on_long_response", ON_LONG_RESPONSE),
        ):
            if getattr(self, name) not in known:
                raise unknown(f"data.{name}", getattr(self, name), known)
        if not self.source or self.validation_source == "":
            raise ValueError(
                f"data.source = {self.source!r}, data.validation_source = {self.validation_source!r}; "
                f"name a data set or a file, {PYTHON_DOCS!r} is built in"
            )
        fields = [self.prompt_field, self.response_field] + ([] if self.input_field is None else [self.input_field])
        if not all(fields) or len(set(fields)) < len(fields):
            raise ValueError(
                f"data.prompt_field, response_field, input_field = {fields}; give a different name to each"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction = {self.validation_fraction}; give a number between 0 and "
                "1 (0.05 is usual), "
                "or a data.validation_source"
            )
        if not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"data.max_prompt_length = {self.max_prompt_length} with data.max_length = "
                f"{self.max_length}; the prompt "
                "needs at least one token and must leave one for the response: lower the first or "
                "raise the second"
            )
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"data.max_rows = {self.max_rows}; give 1 or more, or null for all rows")
