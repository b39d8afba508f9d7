"""The `data` and `text` sections of a run's config, and data sets known by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from toolkit.settings.overrides import unknown

PYTHON_DOCS = "python_docs"
TEMPLATE_NAMES = ("chat", "alpaca", "plain")
RESPONSES = ("data", "teacher")
ON_BAD_ROW = ("stop", "skip")
ON_LONG = ("truncate", "skip", "stop")
OWN_TEMPLATE_ARGS = ("messages", "add_generation_prompt")  # what a chat template is given anyway
KINDS = ("instructions", "text")
MIN_BLOCK = 8  # tokens


@dataclass(frozen=True)
class DataConfig:
    """Where prompts and responses come from, and how they become tokens. Lengths are in tokens.

    kind: "instructions" are prompts with responses. "text" is documents, packed to blocks of max_length tokens in which
    every token is learned, without attention from one document to another; then `text_field` is read, and what is said
    below of prompts, responses and templates does not apply.
    source: "python_docs" (needs no network), a .jsonl/.json/.csv/.parquet/.arrow file, a hub data set, one file of it
    as hf://datasets/OWNER/NAME/FILE.jsonl, or a set of MiniLLM, which has its own fields: dolly, self_inst, vicuna,
    sni, unni. For text also a .txt file (one document) or a folder of any of these.
    streaming: of kind "text": read while training, for what does not fit a disk. Every rank reads its own documents,
    over and over, all of them: not with max_rows.
    subset, split, validation_split: which part of a hub data set; files and "python_docs" do not use them.
    validation_source: as `source`. None takes `validation_fraction` of the source's rows by a hash of their
    prompt, so equal prompts stay on one side ("python_docs" has a validation split of its own, by module).
    prompt_field, response_field: "a.b" is the field b of the object in field a, as in {"translation": {"en": ...}}.
    input_field: a second prompt field, as Alpaca's and Dolly's "input"; rows may leave it empty.
    response_field: a list in it is several references: the first is learned, all are kept for evaluation.
    messages_field: conversations, [{"role", "content"}, ...] or ShareGPT's from and value; the assistant's last turn is
    the response, all before it the prompt, by the tokenizer's chat template. Then the three fields above are not read.
    responses: "data" trains on the rows' own; "teacher" on what the teacher answers to their prompts, generated once
    with the rollout section's settings and kept in the cache (sequence-level distillation, arXiv 1606.07947).
    prefix: goes before every prompt's text, as T5's "summarize: "; not with messages_field.
    template_args: for the tokenizer's chat template beside the turns, as {enable_thinking: false}; one that it does not
    read is an error. system: a system turn for rows without one, with the template "chat".
    max_length: prompt and response together.
    on_long_prompt: one of more than max_prompt_length tokens loses its oldest, a system turn first, so that the
    template's end stays (before an encoder, which reads it as a whole, its last ones, and its EOS stays), or is
    skipped, or is an error.
    packing: several examples in one row, of max_length at most, that do not see each other.
    on_long_response: a response that does not fit is cut and gets no EOS, or is skipped, or is an error.
    on_bad_row: a row that cannot be used is an error that names it, or is skipped and counted.
    max_rows: at most this many usable rows of each source.
    cache_dir: for prepared data sets; None is the `datasets` library's own place.
    """

    kind: str = "instructions"
    source: str = PYTHON_DOCS
    subset: str | None = None
    split: str = "train"
    validation_source: str | None = None
    validation_split: str = "validation"
    validation_fraction: float = 0.05
    prompt_field: str = "prompt"
    response_field: str = "response"
    input_field: str | None = None
    messages_field: str | None = None
    text_field: str = "text"
    template: str = "chat"
    responses: str = "data"
    template_args: dict = field(default_factory=dict)
    system: str = ""
    prefix: str = ""
    max_length: int = 512
    max_prompt_length: int = 256
    on_long_prompt: str = "truncate"
    on_long_response: str = "truncate"
    packing: bool = False
    streaming: bool = False
    max_rows: int | None = None
    on_bad_row: str = "stop"
    cache_dir: str | None = None

    def validate(self) -> None:
        """Raises ValueError for the first setting that cannot work, with its value and what to do."""
        for name, known in (
            ("kind", KINDS),
            ("template", TEMPLATE_NAMES),
            ("responses", RESPONSES),
            ("on_bad_row", ON_BAD_ROW),
            ("on_long_prompt", ON_LONG),
            ("on_long_response", ON_LONG),
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
        if self.messages_field is not None and self.template != "chat":
            raise ValueError(
                f"data.messages_field = {self.messages_field!r} with data.template = {self.template!r}; turns go "
                'through the tokenizer\'s own template: set data.template to "chat"'
            )
        for name, value in (("template_args", self.template_args), ("system", self.system)):
            if value and self.template != "chat":
                raise ValueError(
                    f"data.{name} = {value!r} is for a chat template, but data.template = {self.template!r}; set "
                    f'data.template to "chat", or leave data.{name} out'
                )
        self._check_template_args()
        if self.messages_field is not None and self.prefix:
            raise ValueError(
                f"data.prefix = {self.prefix!r} goes before a row's prompt, but with data.messages_field = "
                f'{self.messages_field!r} a row is a conversation; set data.prefix to "", or write it into the turns'
            )
        if self.kind != "text" and self.streaming:
            raise ValueError(
                f'data.streaming is for plain text, but data.kind = {self.kind!r}; set one of them to "text" or false'
            )
        _check_stream("data", self.streaming, self.max_rows)
        if self.kind == "text" and self.max_length < MIN_BLOCK:
            raise ValueError(f"data.max_length = {self.max_length} for blocks of text; give {MIN_BLOCK} or more")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction = {self.validation_fraction}; give a number between 0 and "
                "1 (0.05 is usual), "
                "or a data.validation_source"
            )
        if self.kind != "text" and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"data.max_prompt_length = {self.max_prompt_length} with data.max_length = "
                f"{self.max_length}; the prompt "
                "needs at least one token and must leave one for the response: lower the first or "
                "raise the second"
            )
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"data.max_rows = {self.max_rows}; give 1 or more, or null for all rows")

    def _check_template_args(self) -> None:
        args = self.template_args
        if own := [name for name in OWN_TEMPLATE_ARGS if name in args]:
            raise ValueError(f"data.template_args = {args!r}: {own[0]!r} is given to every chat template; take it out")
        try:
            is_json = json.loads(json.dumps(args)) == args
        except TypeError:
            is_json = False
        if not is_json:
            raise ValueError(
                f"data.template_args = {args!r} holds what JSON cannot keep, as a date or a number for a name; quote it"
            )


@dataclass(frozen=True)
class TextConfig:
    """Plain text whose next tokens are learned beside the distillation, as in the paper (OpenWebText, weight 1).

    source: as data.source of kind "text"; "" is none. subset, split, field, streaming, max_rows (documents): as there.
    weight: of the mean cross entropy of the text's tokens, added to the loss. batch_rows: blocks of `max_length` tokens
    in one step, over all ranks; None is as many as train.batch_rows.
    """

    source: str = ""
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    weight: float = 1.0
    batch_rows: int | None = None
    max_length: int = 512
    streaming: bool = False
    max_rows: int | None = None

    def validate(self) -> None:
        """Raises ValueError for the first setting that cannot work."""
        if not self.weight > 0:
            raise ValueError(f'text.weight = {self.weight}; it has to be above 0, or text.source = ""')
        if self.max_length < MIN_BLOCK:
            raise ValueError(f"text.max_length = {self.max_length} for blocks of text; give {MIN_BLOCK} or more")
        for name in ("batch_rows", "max_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"text.{name} = {value}; give 1 or more, or null")
        _check_stream("text", self.streaming, self.max_rows)


def _check_stream(section: str, streaming: bool, max_rows: int | None) -> None:
    if streaming and max_rows is not None:
        raise ValueError(
            f"{section}.max_rows = {max_rows} with {section}.streaming = true; a stream is read over and over, all of "
            "it: set max_rows to null, or streaming to false"
        )
