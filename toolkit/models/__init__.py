"""Models: loading under ZeRO, the vocabulary that two of them share, the passes of engines, and the student. Imports
batch, data's probe, divergences, ranks, seeds, settings and storage."""

# ruff: noqa: F401 - the names imported here are what the room offers

from toolkit.models.build import build_student, whole_student
from toolkit.models.engines import Student, objective_of
from toolkit.models.load import (
    check_positions,
    choose_dtype,
    default_cache_dir,
    generation_ends,
    load_model,
    row_layout,
)
from toolkit.models.packing import check_packing
from toolkit.models.tokenizer import load_tokenizer
from toolkit.models.vocabulary import Vocabulary, shared_layout, shared_vocabulary
