"""Teacher and student: loading under ZeRO, the vocabulary they share, and the two engines."""

from toolkit.models.engines import NoTeacher, Objective, Student, Teacher, build_student, build_teacher
from toolkit.models.load import load_model, load_tokenizer, materialize
from toolkit.models.packing import check_packing
from toolkit.models.vocabulary import Vocabulary, shared_vocabulary

__all__ = [
    "NoTeacher",
    "Objective",
    "Student",
    "Teacher",
    "Vocabulary",
    "build_student",
    "build_teacher",
    "check_packing",
    "load_model",
    "load_tokenizer",
    "materialize",
    "shared_vocabulary",
]
