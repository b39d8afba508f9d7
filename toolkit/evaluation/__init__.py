"""How good a model is: distance to a teacher on held-out rows, and scores of what it says. Imports
every room but run and the command line."""
# ruff: noqa: F401 (what is imported here is what other rooms may use)

from toolkit.evaluation.answers import answer, row_seeds, score
from toolkit.evaluation.metrics import METRICS, metric, spread
from toolkit.evaluation.validation import Best, Validation, Validator
