"""How good the student is: distance to the teacher on held-out rows, and ROUGE-L of what it says."""

from toolkit.evaluation.answers import answer, rouge_l
from toolkit.evaluation.validation import Validation, Validator

__all__ = ["Validation", "Validator", "answer", "rouge_l"]
