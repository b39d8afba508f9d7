"""One vocabulary for both models.

The policy: the tokenizer's real entries, ids 0 to size - 1, are the vocabulary. Heads may be padded further, each to
its own size; columns past `size` count as minus infinity on both sides, in the loss, in validation and in generation.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class Vocabulary(NamedTuple):
    size: int
    eos_ids: tuple[int, ...]
    pad_id: int


def shared_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> Vocabulary:
    """Raises ValueError where the two tokenizers give an id two meanings: their distributions cannot be compared."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs != ours:
        differing = next((t for t in {**theirs, **ours} if theirs.get(t) != ours.get(t)), None)
        raise ValueError(
            f"teacher and student have different tokenizers ({len(theirs)} and {len(ours)} entries; "
            f"{differing!r} is id {theirs.get(differing)} for the teacher, {ours.get(differing)} for the student); "
            "distillation compares distributions id by id, so take a student with the teacher's tokenizer"
        )
    if teacher.eos_token_id != student.eos_token_id:
        raise ValueError(
            f"teacher and student end texts differently (EOS id {teacher.eos_token_id} and {student.eos_token_id}); "
            "set the same eos_token in both tokenizers"
        )
    return Vocabulary(max(ours.values()) + 1, (student.eos_token_id,), student.pad_token_id)


def check_head(role: str, head_rows: int, vocabulary: Vocabulary) -> None:
    """Raises ValueError for a head that is too small for the tokenizer."""
    if head_rows < vocabulary.size:
        raise ValueError(
            f"the {role}'s head has {head_rows} rows, its tokenizer {vocabulary.size} entries; resize the model's "
            "embeddings or take the tokenizer that belongs to it"
        )
