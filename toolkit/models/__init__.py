"""Teacher and student: loading under ZeRO, the vocabulary they share, and the two engines."""

from toolkit.models.engines import NoTeacher, Objective, Student, Teacher, build_student, build_teacher
from toolkit.models.load import decoder_start_id, load_model, load_tokenizer, materialize
from toolkit.models.vocabulary import Vocabulary, shared_decoder_start, shared_vocabulary

__all__ = [
    "NoTeacher",
    "Objective",
    "Student",
    "Teacher",
    "Vocabulary",
    "build_student",
    "build_teacher",
    "decoder_start_id",
    "load_model",
    "load_tokenizer",
    "materialize",
    "shared_decoder_start",
    "shared_vocabulary",
]
