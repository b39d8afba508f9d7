"""A model's tokenizer, held against the file that defines it.

transformers takes the rules of most tokenizers (how words are split, which pieces are merged first) from a class that
it chooses by names in the configuration. Where that class does not go with the file, texts get other ids than the model
was trained on, and nothing says so. So each tokenizer is asked for the ids of some texts (`PROBE`), and so is its file,
by the sentencepiece or the tokenizers library.
"""

import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import transformers
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from toolkit.data.probe import PROBE
from toolkit.models.files import source_folder
from toolkit.settings import ModelConfig

#: Part of the names of what is kept with a tokenizer in it: raise it when the same files come to be read otherwise.
TOKENIZERS_READ = 2
JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
#: The classes that mean a sentencepiece file's own ids by it. Others number its pieces anew (Pegasus), or change the
#: text before (XLNet).
SENTENCEPIECE_CLASSES = (
    "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "T5Tokenizer", PreTrainedTokenizerFast.__name__,
)  # fmt: skip
#: The classes whose settings say whether BOS and EOS are added, whatever tokenizer.json says.
FRAMED_BY_SETTINGS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
SPACE = "▁"  # as sentencepiece writes it in a piece
SHOWN_IDS = 8


class Truth(NamedTuple):
    """What the file of a tokenizer says. ids: those of a text, without BOS and EOS; entries: all its tokens."""

    file: Path
    ids: Callable[[str], list[int]]
    entries: Collection[str]


class Difference(NamedTuple):
    """A text that two tokenizers give different ids."""

    text: str
    ids: list[int]
    others: list[int]

    def shown(self) -> tuple[str, str, str]:
        """The text and both lists of ids, cut to where they part."""
        pairs = itertools.zip_longest(self.ids, self.others)
        start = max(0, next(at for at, (one, other) in enumerate(pairs) if one != other) - 1)
        return repr(self.text), _part(self.ids, start), _part(self.others, start)


def load_tokenizer(model: ModelConfig, path: str) -> PreTrainedTokenizerBase:
    """`model.tokenizer`, else the one at `path`. A sentencepiece .model file is read with the settings that lie beside
    it, and texts begin with its BOS unless those say otherwise. A missing pad token is set to EOS. Raises ValueError
    where there is none, where it has no EOS token, and where it gives other ids than its file."""
    name = os.path.expanduser(model.tokenizer or path)
    try:
        tokenizer = _from_file(Path(name)) if name.endswith(".model") else _from_folder(name, model.trust_remote_code)
    except Exception as error:  # the tokenizers library raises nothing narrower, and a model's own code may raise all
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no EOS token, so no text would end; set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where plain transformers reads what `tokenizer` saved in `folder` back as another tokenizer."""
    try:
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=not _is_of_transformers(tokenizer))
    except Exception as error:  # as in `load_tokenizer`
        raise ValueError(f"transformers {transformers.__version__} cannot read the saved tokenizer: {error}") from error
    # Special tokens as well: a class may give them other ids, or take them for plain text.
    texts = [*PROBE, " and ".join(tokenizer.all_special_tokens)]
    found = first_difference(lambda text: tokenizer(text)["input_ids"], lambda text: again(text)["input_ids"], texts)
    if found:
        text, ids, others = found.shown()
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
        raise ValueError(
            f"transformers {transformers.__version__} reads the saved tokenizer back as {type(again).__name__}, which "
            f"gives {text} the ids {others}, and here they are {ids}; beside a config.json of model_type "
            f"{model_type!r} it reads no such tokenizer: take a student of another family, or this family's tokenizer"
        )
    if tokenizer.eos_token_id != again.eos_token_id:
        raise ValueError(
            f"transformers {transformers.__version__} reads the saved tokenizer back with EOS id {again.eos_token_id}, "
            f"and here it is {tokenizer.eos_token_id}; set eos_token in its tokenizer_config.json"
        )


def first_difference(
    ids: Callable[[str], list[int]], others: Callable[[str], list[int]], texts: Iterable[str] = PROBE
) -> Difference | None:
    """The first of the texts for which two tokenizers differ."""
    found = (Difference(text, list(ids(text)), list(others(text))) for text in texts)
    return next((difference for difference in found if difference.ids != difference.others), None)


def plain_ids(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """The ids of a text by `tokenizer`, without BOS and EOS."""
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _from_file(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a sentencepiece file defines, with the settings that lie beside it."""
    if not file.is_file():
        raise OSError(f"no file at {file}")
    settings = _settings(file.parent)
    if (truth := _sentencepiece_truth(file, settings)) is None:
        raise ValueError("it is not a sentencepiece model; name the folder that it lies in")
    return _agreeing(_with_leading_spaces(_from_sentencepiece(file, settings, (True, False))), truth)


def _from_folder(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name: as transformers reads it, or else as its file defines it."""
    if not name:
        raise ValueError("neither a tokenizer nor a model with one is named")
    folder = source_folder(name, with_weights=False)
    # Otherwise the class would depend on whether mistral-common is installed.
    first = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, mistral_format=False)
    if not isinstance(first, PreTrainedTokenizerFast) or not _is_of_transformers(first):
        return first  # its own code, or the library that it calls, says what its ids are
    # A sentencepiece file defines the ids where the class takes them from it, else tokenizer.json does.
    settings, has_json, kind = _settings(folder), (folder / JSON_FILE).is_file(), type(first).__name__
    files = [folder / file for file in SENTENCEPIECE_FILES if kind in SENTENCEPIECE_CLASSES]
    truths = (_sentencepiece_truth(file, settings, first) for file in files if file.is_file())
    if truth := next(filter(None, truths), None):
        is_t5 = kind == "T5Tokenizer"  # the others begin a text with BOS unless their settings say otherwise
        frame = _frame(first) if has_json else (not is_t5, _frame(first)[1])
        added = [token.content for _, token in sorted(first.added_tokens_decoder.items())] if is_t5 else []

        def readings() -> Iterator[PreTrainedTokenizerBase]:
            yield first
            if has_json:
                yield from _with_leading_spaces(PreTrainedTokenizerFast.from_pretrained(folder))
            yield from _with_leading_spaces(_from_sentencepiece(truth.file, settings, frame, added))

        return _framed(_agreeing(readings(), truth), settings, frame, has_json)
    if has_json:
        tokenizer = _as_json_says(folder, first, settings)
        return _framed(tokenizer, settings, _frame(tokenizer), has_json)
    return first


def _as_json_says(folder: Path, first: PreTrainedTokenizerBase, settings: dict[str, Any]) -> PreTrainedTokenizerBase:
    """`first`, or where it differs from tokenizer.json, the tokenizer that is just this file."""
    if type(first) is PreTrainedTokenizerFast:
        return first
    truth = _json_truth(folder / JSON_FILE, settings)

    def readings() -> Iterator[PreTrainedTokenizerBase]:
        plain = PreTrainedTokenizerFast.from_pretrained(folder)
        ends, plain_ends = ((one.bos_token, one.eos_token) for one in (first, plain))
        # A class may add a token of its own (Qwen2's <|endoftext|>), for which the model may have no row.
        if len(first) > len(truth.entries) and len(plain) < len(first) and ends == plain_ends:
            yield plain
        yield first
        yield plain

    return _agreeing(readings(), truth)


def _agreeing(readings: Iterable[PreTrainedTokenizerBase], truth: Truth) -> PreTrainedTokenizerBase:
    """The first of the readings that gives the ids that the file says. Raises ValueError where none does."""
    refused: list[tuple[str, str, str, str]] = []
    for tokenizer in readings:
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        own = [token for token in added if token not in truth.entries]  # the file cannot know them
        texts = [text for text in PROBE if not any(token in text for token in own)]
        found = first_difference(plain_ids(tokenizer), truth.ids, texts)
        if found is None:
            return tokenizer
        refused.append((type(tokenizer).__name__, *found.shown()))
    kind, text, ids, others = refused[0]
    raise ValueError(
        f"transformers reads it as {kind}, which gives {text} the ids {ids}, and by {truth.file.name} they are "
        f"{others}; if {truth.file.name} is not what the model had, take it away and put the right {JSON_FILE} there"
    )


def _json_truth(file: Path, settings: dict[str, Any]) -> Truth:
    rules = Tokenizer.from_file(str(file))
    rules.no_truncation()
    rules.no_padding()
    prefix = settings.get("add_prefix_space")
    if prefix is not None and isinstance(rules.pre_tokenizer, ByteLevel):
        rules.pre_tokenizer.add_prefix_space = prefix  # GPT-2's classes go by the settings here, not by the file
    return Truth(file, lambda text: rules.encode(text, add_special_tokens=False).ids, rules.get_vocab())


def _sentencepiece_truth(
    file: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None
) -> Truth | None:
    """None where the file is not sentencepiece's (tiktoken's have the same name), or is not that of `tokenizer`, which
    has entries beside it that were not added."""
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        proto.ParseFromString(file.read_bytes())
        if settings.get("add_prefix_space") is False:
            proto.normalizer_spec.add_dummy_prefix = False
        library = SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (DecodeError, RuntimeError):
        return None
    pieces = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    if tokenizer is not None:
        added = tokenizer.get_added_vocab()
        if any(pieces.get(token) != id for token, id in tokenizer.get_vocab().items() if token not in added):
            return None
    return Truth(file, library.encode, pieces)


def _from_sentencepiece(
    file: Path, settings: dict[str, Any], frame: tuple[bool, bool], added: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """The tokenizer of `file` alone, with the settings that lie beside it. (LlamaTokenizer would rank merges by ids in
    place of scores, and T5Tokenizer leaves out mT5's bytes.) added: tokens that its class has, in the order of ids."""
    adds_bos, adds_eos = _wanted_frame(settings, frame)
    more: dict[str, Any] = {"extra_special_tokens": list(added)} if added else {}
    return PreTrainedTokenizerFast.from_pretrained(
        file.parent, vocab_file=str(file), tokenizer_file="",  # no tokenizer.json
        legacy=settings.get("legacy") is not False, add_bos_token=adds_bos, add_eos_token=adds_eos, **more,
    )  # fmt: skip


def _with_leading_spaces(tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    """`tokenizer`, then the same one with a rule changed, if it has that rule: sentencepiece puts its "▁" before each
    text, Metaspace only before one that does not begin with a space."""
    yield tokenizer
    inner = tokenizer.backend_tokenizer
    before = inner.pre_tokenizer
    rules: list[Any] = [*cast(Any, before)] if isinstance(before, pre_tokenizers.Sequence) else [before]
    if not isinstance(rules[0], Metaspace) or rules[0].split or rules[0].prepend_scheme == "never":
        return
    normal = [] if inner.normalizer is None else [inner.normalizer]
    inner.normalizer = normalizers.Sequence([*normal, normalizers.Replace(" ", SPACE)])
    # No text begins with a space now, so a space goes before each, and then becomes the piece's sign.
    prefix = Metaspace(" ", rules[0].prepend_scheme, split=False), Metaspace(SPACE, "never", split=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*prefix, *rules[1:]])
    yield tokenizer


def _framed(
    tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], frame: tuple[bool, bool], has_json: bool
) -> PreTrainedTokenizerBase:
    """`tokenizer`, with BOS and EOS around a text as its settings say, which transformers 5 does not ask where there is
    a tokenizer.json; else as in `frame`."""
    kind = settings.get("tokenizer_class") or ""
    says = settings if not has_json or kind.removesuffix("Fast") in FRAMED_BY_SETTINGS else {}
    if _frame(tokenizer) != (wanted := _wanted_frame(says, frame)):
        tokenizer.add_bos_token, tokenizer.add_eos_token = wanted
    return tokenizer


def _wanted_frame(settings: dict[str, Any], otherwise: tuple[bool, bool]) -> tuple[bool, ...]:
    """Whether BOS and EOS are added by the settings; where they say nothing, as `otherwise`."""
    says = (settings.get(name) for name in ("add_bos_token", "add_eos_token"))
    return tuple(other if said is None else said for said, other in zip(says, otherwise, strict=True))


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text begins with BOS, and ends with EOS."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id]


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _is_of_transformers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its class is one of the library's, not code that came with a model."""
    return type(tokenizer).__module__.startswith("transformers.")


def _part(ids: Sequence[int], start: int) -> str:
    shown = ", ".join(map(str, ids[start : start + SHOWN_IDS]))
    return f"[{'..., ' if start else ''}{shown}{', ...' if len(ids) > start + SHOWN_IDS else ''}]"
