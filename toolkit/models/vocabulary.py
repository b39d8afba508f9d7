"""One vocabulary for both models.

The policy: the tokenizer's real entries, ids 0 to size - 1, are the vocabulary. Heads may be padded further, each to
its own size; columns past `size` count as minus infinity on both sides, in the loss, in validation and in generation.
"""

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from toolkit.batch import DECODER_ONLY, RowLayout
from toolkit.models.tokenizer import first_difference, plain_ids


class Vocabulary(NamedTuple):
    """What both models share. eos_ids: what ends a generated text; the first is the tokenizer's EOS, the end of the
    data's own. layout: how both read a prompt and its response."""

    size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    layout: RowLayout = DECODER_ONLY


def shared_vocabulary(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, other_ends: Iterable[int] = ()
) -> Vocabulary:
    """What both tokenizers have. other_ends: ids that end a generated text as EOS does, see `generation_ends`. Raises
    ValueError where they give an id two meanings: their distributions cannot be compared; and where they split texts
    differently: the teacher would be asked about texts of a kind that it was not trained on."""
    # Equal tables of tokens, equal ids for the same texts, and the same end of a text.
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs != ours:
        differing = next(token for token in {**theirs, **ours} if theirs.get(token) != ours.get(token))
        raise ValueError(
            f"teacher and student have different tokenizers ({len(theirs)} and {len(ours)} entries; "
            f"{differing!r} is id {theirs.get(differing)} for the teacher, {ours.get(differing)} for the student); "
            "distributions are compared id by id, so take a student with the teacher's tokenizer"
        )
    if found := first_difference(plain_ids(teacher), plain_ids(student)):
        text, their_ids, our_ids = found.shown()
        raise ValueError(
            f"teacher and student have one vocabulary and split texts differently: {text} has ids {their_ids} for the "
            f"teacher, {our_ids} for the student; let one tokenizer serve both (student.tokenizer=TEACHER)"
        )
    if teacher.eos_token_id != student.eos_token_id:
        raise ValueError(
            f"teacher and student end texts differently (EOS id {teacher.eos_token_id} and {student.eos_token_id}); "
            "let one tokenizer serve both (student.tokenizer=TEACHER), or set the same eos_token in both"
        )
    # Only special tokens end a text beside EOS: a default of the model's class may be a word of this tokenizer.
    size, eos_id = max(ours.values()) + 1, student.eos_token_id
    special = {id for id, token in student.added_tokens_decoder.items() if token.special}
    others = sorted(special & {*other_ends} - {eos_id})
    return Vocabulary(size, (eos_id, *others), student.pad_token_id)


def shared_layout(teacher: RowLayout, student: RowLayout) -> RowLayout:
    """The layout of both models' rows. Raises ValueError where they differ."""
    if teacher != student:
        raise ValueError(
            f"the teacher {teacher}, the student {student}: they read rows of different make; take two encoder-decoder "
            "models that start alike (decoder_start_token_id of config.json), or two without an encoder"
        )
    return student


def check_head(role: str, head_rows: int, vocabulary: Vocabulary) -> None:
    """Raises ValueError for a head that is too small for the tokenizer."""
    if head_rows < vocabulary.size:
        raise ValueError(
            f"the {role}'s head has {head_rows} rows, its tokenizer {vocabulary.size} entries; resize the model's "
            "embeddings or take the tokenizer that belongs to it"
        )
