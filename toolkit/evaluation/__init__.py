"""How good a model is: distance to a teacher on held-out rows, and scores of what it says."""

from toolkit.evaluation.answers import Answer, answer, row_seeds, score, score_rows
from toolkit.evaluation.metrics import METRICS, metric, spread
from toolkit.evaluation.validation import Best, Validation, Validator

__all__ = [
    "METRICS",
    "Answer",
    "Best",
    "Validation",
    "Validator",
    "answer",
    "metric",
    "row_seeds",
    "score",
    "score_rows",
    "spread",
]
