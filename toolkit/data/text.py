"""Plain text: documents, tokenised with EOS after each, packed to blocks in which they do not see each other."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from toolkit.batch import Example
from toolkit.data import sources
from toolkit.data.python_docs import python_docs_rows
from toolkit.data.sources import HUB_FILES, Source
from toolkit.data.store import tokenizer_sha256
from toolkit.ranks import heartbeat
from toolkit.settings import PYTHON_DOCS

TEXT_SUFFIXES = (".txt", *sources.SUFFIXES)
CHUNK_CHARACTERS = 2**20  # tokenised in one call; a longer .txt file becomes several documents
CHUNK_DOCUMENTS = 1024


def read_documents(source: Source, field: str) -> Iterator[str]:
    """The texts of a file (.txt: the whole of it; others: `field` of each row), of a folder of files, or of a hub name.
    Empty ones are left out. Raises ValueError, naming the place, for what is missing, cannot be read, or has no such
    field."""
    files = local_files(source)
    if files is not None:
        yield from (document["text"] for document in file_documents([str(file) for file in files], field))
    elif source.name == PYTHON_DOCS:
        yield from (f"{row['prompt']}\n{row['response']}" for row in python_docs_rows(source.split, source.cache_dir))
    else:
        yield from filter(None, (_text_of(row, field, where) for where, row in sources.records(source)))


def file_documents(files: Sequence[str], field: str) -> Iterator[dict[str, str]]:
    """{"text"} of each document in these files."""
    for name in files:
        path = Path(name)
        if path.suffix.lower() == ".txt":
            texts = (text if text.strip() else "" for text in _pieces(path))
        else:
            texts = (_text_of(row, field, where) for where, row in sources.file_rows(name, path))
        yield from ({"text": text} for text in texts if text)


def local_files(source: Source) -> list[Path] | None:
    """The files of a file's or folder's name, or the one of a hub set that is named; None for a hub name or a built-in
    set. Raises ValueError for what is missing, a folder without text and an unknown ending."""
    if source.name.startswith(HUB_FILES):
        return [sources.hub_file(source)]
    path = Path(source.name).expanduser()
    is_path = sources.looks_like_path(source.name, path) or path.suffix.lower() == ".txt"
    if source.name == PYTHON_DOCS or not is_path:
        return None
    seen = f"(looked at {path.absolute()})"
    if not path.exists():
        raise ValueError(f"{source.name}: the file is missing {seen}; give the path of a file or a folder")
    found = [file for file in sources.files_below(path) if file.suffix.lower() in TEXT_SUFFIXES]
    if not found:
        what = "holds no file with" if path.is_dir() else "has none of"
        raise ValueError(f"{source.name}: {what} the endings {', '.join(TEXT_SUFFIXES)} {seen}")
    return found


def open_stream(source: Source, field: str, rank: int, world: int) -> tuple[Any, str]:
    """A `datasets` stream of this rank's rows, and the field that is their text.

    Of files each rank gets every world-th document. If whole files were dealt, a rank with a short one would read it
    several times while another reads a long one once. Shards of the hub are dealt, where their number allows, so that
    a rank need not fetch what others read.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    if source.name == PYTHON_DOCS:
        raise ValueError(f"{PYTHON_DOCS!r} is not streamed, it is small; set streaming=false")
    files = local_files(source)
    if files is None:
        return split_dataset_by_node(sources.load_table(source, streaming=True), rank, world), field
    settings = {"files": [str(file) for file in files], "field": field}
    documents = datasets.IterableDataset.from_generator(file_documents, gen_kwargs=settings)
    return split_dataset_by_node(documents, rank, world, strategy="examples"), "text"


def stream_sha256(source: Source, tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what decides a stream's tokens, as far as it is known without reading all of it: the tokenizer, and a hub name
    or the files' names and sizes."""
    content, files = source.name, local_files(source)
    if files is not None:
        sizes = [(file.name, file.stat().st_size) for file in files]
        content = hashlib.sha256(repr(sizes).encode()).hexdigest()
    return hashlib.sha256(f"{content} {tokenizer_sha256(tokenizer)}".encode()).hexdigest()


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is for validation. A hash of its text decides, so equal documents are on one side."""
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class BlockPacker:
    """Documents in, blocks of exactly `length` tokens out; what is left over waits for the next documents.

    A document that passes the end of a block goes on in the next one as a text of its own, whose first token is not
    predicted. The tokenizer's BOS, where it sets one, begins each document, EOS ends it. Raises ValueError if the
    tokenizer has no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token to put between documents")
        self.tokenizer, self.length = tokenizer, length
        self.tokens: list[int] = []
        self.starts: list[int] = []  # of texts after the first, in `tokens`

    def add(self, texts: Sequence[str]) -> list[Example]:
        """The blocks that become full."""
        heartbeat.beat()
        # Documents go behind what was left over, each with one EOS at its end.
        eos = self.tokenizer.eos_token_id
        for ids in self.tokenizer(list(texts), verbose=False)["input_ids"] if texts else ():
            if self.tokens:
                self.starts.append(len(self.tokens))
            self.tokens += ids if ids[-1:] == [eos] else [*ids, eos]
        # Full blocks are cut off, each with the starts that lie inside of it.
        tokens, starts = np.array(self.tokens, dtype=np.int32), np.array(self.starts, dtype=np.int64)
        blocks, used = [], len(tokens) - len(tokens) % self.length
        for first in range(0, used, self.length):
            inside = starts[(starts > first) & (starts < first + self.length)] - first
            blocks.append(Example(tokens[first : first + self.length], 1, tuple(inside.tolist())))
        self.tokens, self.starts = self.tokens[used:], (starts[starts > used] - used).tolist()
        return blocks

    def rest(self) -> list[Example]:
        """What is left over, as one short block, or none where it predicts nothing."""
        is_enough = len(self.tokens) > len(self.starts) + 1
        return [Example(np.array(self.tokens, dtype=np.int32), 1, tuple(self.starts))] if is_enough else []


def blocks(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Example]:
    """All of them packed; the last block may be shorter."""
    packer, documents = BlockPacker(tokenizer, length), iter(documents)
    while chunk := take_chunk(documents):
        yield from packer.add(chunk)
    yield from packer.rest()


def take_chunk(documents: Iterator[str]) -> list[str]:
    """The next documents, enough for one call of the tokenizer; none at the end."""
    chunk, characters = [], 0
    for text in documents:
        chunk.append(text)
        characters += len(text)
        if characters >= CHUNK_CHARACTERS or len(chunk) == CHUNK_DOCUMENTS:
            break
    return chunk


class TextStream:
    """Blocks of text that are read while training, over and over, in the source's order. Each rank reads its own
    documents, so a step's blocks depend on the number of ranks.

    The place in the stream is a small JSON state: the library's own of the last chunk of documents, how often this rank
    had begun anew, what was left over before the chunk, and how many of its blocks were taken. `is_wanted` keeps
    held-out documents away.
    """

    def __init__(self, source: Source, field: str, tokenizer: PreTrainedTokenizerBase, length: int,
                 is_wanted: Callable[[str], bool] = lambda text: True):  # fmt: skip
        self.source, self.field, self.is_wanted = source, field, is_wanted
        self.packer = BlockPacker(tokenizer, length)
        self._stream: Any = None
        self._of = 0, 1  # (rank, world) that it is opened for
        self._passes = 0  # that are over
        self._mark: dict[str, Any] = {"source": None, "passes": 0, "tokens": [], "starts": []}
        self._blocks: list[Example] = []
        self._taken = 0

    def window_examples(self, step: int, rank: int, world: int, per_rank: int) -> list[Example]:
        """The next blocks of `rank`, whatever the step: steps come in order, and a resumed run has loaded its state.
        Raises ValueError where the stream has no usable text for this rank."""
        if self._stream is None:
            self._of = rank, world
            self._open(None)
        assert self._of == (rank, world)
        found: list[Example] = []
        while len(found) < per_rank:
            if self._taken == len(self._blocks):
                self._refill()
            found.append(self._blocks[self._taken])
            self._taken += 1
        return found

    def check(self, rank: int, world: int) -> None:
        """Read one document, as `rank` will, from a stream of its own: the place in this one stays as it is. Raises
        ValueError where there is none, or the source cannot be read."""
        rows, field = open_stream(self.source, self.field, rank, world)
        if next(filter(self.is_wanted, _texts(rows, field, self.source.name)), None) is None:
            raise self._no_text(rank, world)

    def state_dict(self) -> dict[str, Any]:
        """Of this rank; plain JSON types."""
        return {**self._mark, "taken": self._taken}

    def load_state_dict(self, states: Sequence[dict[str, Any]], rank: int) -> None:
        """Go on from the states of all ranks. Raises ValueError where the stream is not that of these states."""
        state = states[rank]
        if "passes" not in state:
            raise ValueError(
                f"the place in {self.source.name} was written by a version that dealt documents in another way, "
                "so it says nothing here; start the run over with resume=never"
            )
        self._of, self._passes = (rank, len(states)), state["passes"]
        self.packer.tokens, self.packer.starts = list(state["tokens"]), list(state["starts"])
        self._open(state["source"])
        # The chunk that the blocks in use were made of is read again.
        self._blocks, self._taken = [], 0
        if state["taken"]:
            self._refill()
            if len(self._blocks) < state["taken"]:
                raise ValueError(f"{self.source.name} does not hold what it held when the checkpoint was written")
            self._taken = state["taken"]

    def _open(self, state: dict[str, Any] | None) -> None:
        """Begin a pass over the documents, at `state` of the library."""
        self._stream, field = open_stream(self.source, self.field, *self._of)
        if state is not None:
            self._stream.load_state_dict(state)
        self._texts = filter(self.is_wanted, _texts(self._stream, field, self.source.name))
        self._opened_at = state

    def _refill(self) -> None:
        """Replace the blocks, which are all taken, by those of the next chunk of documents that fills any."""
        ends = 0
        while self._taken == len(self._blocks):
            # What `state_dict` tells is the place before this chunk.
            position = self._stream.state_dict()
            self._mark = {
                "source": position if position is not None else self._opened_at, "passes": self._passes,
                "tokens": list(self.packer.tokens), "starts": list(self.packer.starts),
            }  # fmt: skip
            texts = take_chunk(self._texts)
            if texts:
                if ends and local_files(self.source) is None:
                    self._tell_new_pass()
                ends, self._blocks, self._taken = 0, self.packer.add(texts), 0
                continue
            # The documents are read through: from the first one on again, if there was any.
            ends += 1
            if ends == 2:
                raise self._no_text(*self._of)
            self._passes += 1
            self._open(None)

    def _no_text(self, rank: int, world: int) -> ValueError:
        what = f"{self.source.name}: no usable text for rank {rank} of {world}"
        return ValueError(f"{what}; use fewer ranks, more text, or streaming=false")

    def _tell_new_pass(self) -> None:
        warnings.warn(
            f"{self.source.name}: rank {self._of[0]} of {self._of[1]} begins pass {self._passes + 1} over its "
            "documents. Where ranks have shards of their own, documents of short ones are read more often; take fewer "
            "steps, or a number of ranks that does not divide the number of shards",
            stacklevel=2,
        )


def first_documents(
    source: Source, field: str, count: int, is_wanted: Callable[[str], bool] = lambda text: True
) -> Iterator[str]:
    """The first `count` wanted documents of a stream."""
    stream, field = open_stream(source, field, 0, 1)
    return itertools.islice(filter(is_wanted, _texts(stream, field, source.name)), count)


def _texts(rows: Iterable[object], field: str, where: str) -> Iterator[str]:
    """The texts of a stream's rows, without the empty ones."""
    for row in rows:
        heartbeat.beat()
        if text := _text_of(row, field, where):
            yield text


def _text_of(row: object, field: str, where: str) -> str:
    """A row's text; "" where it is empty or blank."""
    found = sources.as_object(row, where)
    value = sources.field_of(found, field, "the text field (data.text_field, text.field)", where)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} is {value!r:.60} ({type(value).__name__}), not text; make it a string")
    return value if value and value.strip() else ""


def _pieces(path: Path) -> Iterator[str]:
    """The file's text, cut at the ends of lines where it is longer than a chunk."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.readlines(CHUNK_CHARACTERS):
                heartbeat.beat()
                yield "".join(piece)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
