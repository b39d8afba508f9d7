"""The `data` and `text` sections: where prompts, responses and plain text come from, and how they become tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.settings.section import Section
from toolkit.settings.setting import setting

if TYPE_CHECKING:
    from toolkit.settings.run import RunConfig

PYTHON_DOCS = "python_docs"
TEMPLATE_NAMES = ("chat", "alpaca", "plain")
RESPONSES = ("data", "teacher")
ON_BAD_ROW = ("stop", "skip")
ON_LONG = ("truncate", "skip", "stop")
OWN_TEMPLATE_ARGS = ("messages", "add_generation_prompt")  # what a chat template is given anyway
KINDS = ("instructions", "text")
MIN_BLOCK = 8  # tokens


@dataclass(frozen=True)
class DataConfig(Section):
    """Where prompts and responses come from, and how they become tokens."""

    # fmt: off
    kind: str = setting("instructions",
        "instructions are prompts with responses. text is documents, packed to blocks of max_length tokens in which "
        "every token is learned; attention does not cross from one document to another. Then text_field is read, and "
        "settings of prompts, responses and templates do not apply.", choices=KINDS)
    source: str = setting(PYTHON_DOCS,
        "python_docs (needs no network), a .jsonl, .json, .csv, .parquet or .arrow file, a hub data set, one file of "
        "it as hf://datasets/OWNER/NAME/FILE.jsonl, or a set of MiniLLM, which has its own fields: dolly, self_inst, "
        "vicuna, sni, unni. With kind=text also a .txt file (one document) or a folder of any of these.",
        may_change=True)
    subset: str | None = setting(None, "Subset of a hub data set.", means={None: "its default"})
    split: str = setting("train", "Split of a hub data set that is trained on.")
    validation_source: str | None = setting(None,
        "Where validation rows come from, as source.",
        means={None: "the source; of python_docs its own validation split, by module"}, may_change=True)
    validation_split: str = setting("validation", "Split of a hub data set named by validation_source.")
    validation_fraction: float = setting(0.05,
        "Share of the source's rows that is held out where validation_source is null. A hash of the prompt decides, so "
        "equal prompts stay on one side.", above=0, below=1)
    prompt_field: str = setting("prompt", "Field with the prompt; a.b is the field b of the object in field a.")
    response_field: str = setting("response",
        "Field with the response. Of a list the first is learned, and all are references in an evaluation.")
    input_field: str | None = setting(None,
        "Second field of a prompt, as Alpaca's and Dolly's input; rows may leave it empty.", means={None: "none"})
    messages_field: str | None = setting(None,
        "Field with a conversation: a list of role and content, or ShareGPT's from and value. The assistant's last "
        "turn is the response, all before it the prompt, by the tokenizer's chat template. The three fields above are "
        "not read then.", means={None: "rows are no conversations"})
    text_field: str = setting("text", "Field with a document, where kind is text.")
    template: str = setting("chat",
        "How a prompt is laid out; chat is the tokenizer's own chat template.", choices=TEMPLATE_NAMES)
    responses: str = setting("data",
        "data trains on the rows' own responses. teacher trains on what the teacher answers, generated once with the "
        "rollout section's sampling and kept in the cache folder (sequence-level distillation, arXiv 1606.07947).",
        choices=RESPONSES)
    template_args: dict[str, Any] = setting({},
        "Arguments for the tokenizer's chat template, as {enable_thinking: false}; one that it does not read is an "
        "error.")
    system: str = setting("", "System turn of rows that have none, with template=chat.", means={"": "none"})
    prefix: str = setting("",
        "Text before every prompt, as T5's \"summarize: \"; not with messages_field.", means={"": "none"})
    max_length: int = setting(512, "Longest prompt and response together.", unit="tokens")
    max_prompt_length: int = setting(256, "Longest prompt.", unit="tokens")
    on_long_prompt: str = setting("truncate",
        "What is done with a longer prompt. truncate takes away its oldest tokens, a system turn first, so that the "
        "template's end stays; before an encoder it takes away the last ones, but for EOS. stop is an error.",
        choices=ON_LONG)
    on_long_response: str = setting("truncate",
        "What is done with a response that does not fit; after truncate it has no EOS, stop is an error.",
        choices=ON_LONG)
    packing: bool = setting(False,
        "Several examples share a row of at most max_length tokens; attention does not cross between them.",
        may_change=True)
    streaming: bool = setting(False,
        "Of kind text: documents are read while training, for what does not fit a disk. Every rank reads its own ones, "
        "over and over.")
    max_rows: int | None = setting(None,
        "Most usable rows of each source; not with streaming.", unit="rows", least=1, means={None: "all rows"})
    on_bad_row: str = setting("stop",
        "What is done with a row that cannot be used: stop is an error that names it, skip counts it.",
        choices=ON_BAD_ROW)
    cache_dir: str | None = setting(None,
        "Folder for prepared data sets.", means={None: "the place of the datasets library"}, may_change=True)
    # fmt: on

    def validate(self, section: str = "data") -> None:
        """Raises ValueError for the first setting that cannot work, with its value and what to do."""
        super().validate(section)
        self._check_fields(section)
        self._check_template(section)

        # The last checks are about how much is read, and how long it may be.
        if self.kind != "text" and self.streaming:
            raise ValueError(
                f"{section}.streaming is for plain text, but {section}.kind = {self.kind!r}; set {section}.kind "
                f'to "text", or {section}.streaming to false'
            )
        _check_stream(section, self.streaming, self.max_rows)
        _check_block(section, self.max_length, self.kind == "text")
        if self.kind != "text" and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"{section}.max_prompt_length = {self.max_prompt_length} with {section}.max_length = "
                f"{self.max_length}; make room for one token of prompt and one of response"
            )

    def _check_fields(self, section: str) -> None:
        if not self.source or self.validation_source == "":
            raise ValueError(
                f"{section}.source = {self.source!r}, {section}.validation_source = {self.validation_source!r}; "
                f"name a data set or a file, {PYTHON_DOCS!r} is built in"
            )
        fields = [self.prompt_field, self.response_field] + ([] if self.input_field is None else [self.input_field])
        if not all(fields) or len(set(fields)) < len(fields):
            raise ValueError(f"{section}.prompt_field, response_field, input_field = {fields}; give each its own name")
        if self.messages_field is not None and self.prefix:
            raise ValueError(
                f"{section}.prefix = {self.prefix!r} goes before a prompt, but with {section}.messages_field = "
                f'{self.messages_field!r} a row is a conversation; set it to "", or write it into the turns'
            )

    def _check_template(self, section: str) -> None:
        """Turns and their arguments need a chat template, which reads them as JSON."""
        args = self.template_args
        for name in ("messages_field", "template_args", "system"):
            value = getattr(self, name)
            if value and self.template != "chat":
                raise ValueError(
                    f"{section}.{name} = {value!r} is for a chat template, but {section}.template = "
                    f'{self.template!r}; set {section}.template to "chat", or leave {section}.{name} out'
                )
        if own := [name for name in OWN_TEMPLATE_ARGS if name in args]:
            raise ValueError(f"{section}.template_args = {args!r}: every template is given {own[0]!r}; take it out")
        try:
            is_json = json.loads(json.dumps(args)) == args
        except TypeError:
            is_json = False
        if not is_json:
            what = "holds what JSON cannot keep, as a date or a number for a name"
            raise ValueError(f"{section}.template_args = {args!r} {what}; quote it")

    def check_with(self, run: RunConfig) -> None:
        """Answers need prompts, and the teacher's answers need a teacher. Raises ValueError."""
        if self.responses == "teacher" and not run.has_teacher and not run.teacher.cache:
            raise ValueError('data.responses = "teacher", but teacher.path is empty; name a teacher, or use "data"')
        if self.kind != "text":
            return
        for name, value, needed in (
            ("schedule.policy", run.schedule.policy, "off"),
            ("validation.scored_rows", run.validation.scored_rows, 0),
            ("validation.samples", run.validation.samples, 0),
            ("data.responses", self.responses, "data"),
        ):
            if value != needed:
                asks = f"{name} = {value!r} asks for generated answers"
                raise ValueError(f'{asks}, but data.kind = "text" has no prompts; set it to {needed!r}')


@dataclass(frozen=True)
class TextConfig(Section):
    """Plain text whose next tokens are learned beside the distillation, as in DistiLLM's paper."""

    # fmt: off
    source: str = setting("", "As data.source with kind=text.", means={"": "no plain text"}, may_change=True)
    subset: str | None = setting(None, "Subset of a hub data set.", means={None: "its default"})
    split: str = setting("train", "Split of a hub data set.")
    field: str = setting("text", "Field with a document.")
    weight: float = setting(1.0,
        "Weight of the text's mean cross entropy in the loss; source=\"\" leaves it out.", above=0)
    rows_per_step: int | None = setting(None,
        "Blocks of text in one optimizer step, over all ranks.", unit="rows of all ranks", least=1,
        means={None: "as many as train.rows_per_step"},
        formerly="batch_rows")
    max_length: int = setting(512, "Length of a block.", unit="tokens")
    streaming: bool = setting(False, "Documents are read while training, as data.streaming says.")
    max_rows: int | None = setting(None,
        "Most documents that are read; not with streaming.", unit="documents", least=1, means={None: "all"})
    # fmt: on

    def validate(self, section: str = "text") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
        _check_block(section, self.max_length, True)
        _check_stream(section, self.streaming, self.max_rows)


def _check_block(section: str, max_length: int, is_text: bool) -> None:
    if is_text and max_length < MIN_BLOCK:
        raise ValueError(f"{section}.max_length = {max_length} for blocks of text; give {MIN_BLOCK} or more")


def _check_stream(section: str, streaming: bool, max_rows: int | None) -> None:
    if streaming and max_rows is not None:
        raise ValueError(
            f"{section}.max_rows = {max_rows} with {section}.streaming = true; a stream is read over and over: set "
            "max_rows to null, or streaming to false"
        )
