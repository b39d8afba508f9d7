"""Teacher and student: loading under ZeRO, the vocabulary they share, and the two engines."""

from toolkit.models.build import build_student, build_teacher, whole_student, whole_teacher
from toolkit.models.engines import NoTeacher, Student, Teacher, objective_of
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
    "default_cache_dir",
    "generation_ends",
    "load_model",
    "load_tokenizer",
    "objective_of",
    "row_layout",
    "shared_layout",
    "shared_vocabulary",
    "whole_student",
    "whole_teacher",
]
