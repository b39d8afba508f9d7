"""Teacher and student: loading under ZeRO, the vocabulary they share, and the two engines."""

from toolkit.models.engines import Student, Teacher, build_student, build_teacher, whole_student, whole_teacher
from toolkit.models.load import choose_dtype, default_cache_dir, load_model, load_tokenizer, materialize
from toolkit.models.vocabulary import Vocabulary, shared_vocabulary

__all__ = [
    "Student",
    "Teacher",
    "Vocabulary",
    "build_student",
    "build_teacher",
    "choose_dtype",
    "default_cache_dir",
    "load_model",
    "load_tokenizer",
    "materialize",
    "shared_vocabulary",
    "whole_student",
    "whole_teacher",
]
