"""Teacher and student: loading under ZeRO, the vocabulary they share, and the two engines."""

from toolkit.models.engines import (
    NoTeacher,
    Student,
    Teacher,
    build_student,
    build_teacher,
    free,
    objective_of,
    whole_student,
    whole_teacher,
)
from toolkit.models.load import (
    check_positions,
    choose_dtype,
    decoder_start_id,
    default_cache_dir,
    generation_ends,
    load_model,
)
from toolkit.models.packing import check_packing
from toolkit.models.tokenizer import load_tokenizer
from toolkit.models.vocabulary import Vocabulary, shared_decoder_start, shared_vocabulary

__all__ = [
    "NoTeacher",
    "Student",
    "Teacher",
    "Vocabulary",
    "build_student",
    "build_teacher",
    "check_packing",
    "check_positions",
    "choose_dtype",
    "decoder_start_id",
    "default_cache_dir",
    "free",
    "generation_ends",
    "load_model",
    "load_tokenizer",
    "objective_of",
    "shared_decoder_start",
    "shared_vocabulary",
    "whole_student",
    "whole_teacher",
]
