"""Scores of answers, all x 100: an exact-name table. rouge-score and sacrebleu do the scoring."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import zip_longest
from typing import NamedTuple

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from toolkit.settings import SCORES
from toolkit.settings.overrides import unknown

Texts = Sequence[str]
References = Sequence[Texts]  # of each answer one or more


class Metric(NamedTuple):
    """row(answer, references) of one answer; total(answers, references, rows) of all, from their texts or from the
    scores of the rows."""

    title: str
    row: Callable[[str, Texts], float]
    total: Callable[[Texts, References, Sequence[float]], float]


class Spread(NamedTuple):
    """Over seeds. deviation: the sample's (n - 1), None for a single seed."""

    mean: float
    deviation: float | None


@lru_cache(1)
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def _rouge_l(answer: str, references: Texts) -> float:
    """F-measure of the longest common subsequence (Lin 2004), stemmed, against the best of the references."""
    return 100 * _rouge().score_multi(references, answer)["rougeL"].fmeasure


def _exact_match(answer: str, references: Texts) -> float:
    """Whether the answer is one of the references, but for white space around them; case and punctuation count."""
    return 100.0 * (answer.strip() in {reference.strip() for reference in references})


def _mean(answers: Texts, references: References, rows: Sequence[float]) -> float:
    return statistics.fmean(rows)


def _of_sacrebleu(title: str, corpus: Callable[[], BLEU | CHRF], sentence: Callable[[], BLEU | CHRF]) -> Metric:
    def row(answer: str, references: Texts) -> float:
        return sentence().sentence_score(answer, list(references)).score

    def total(answers: Texts, references: References, rows: Sequence[float]) -> float:
        # The library wants the first reference of all answers, then the second, with None where there is none.
        return corpus().corpus_score(list(answers), [list(ones) for ones in zip_longest(*references)]).score

    return Metric(title, row, total)


METRICS = {
    "rouge_l": Metric("ROUGE-L", _rouge_l, _mean),
    "bleu": _of_sacrebleu("BLEU", BLEU, partial(BLEU, effective_order=True)),
    "chrf": _of_sacrebleu("chrF", CHRF, CHRF),
    "exact_match": Metric("exact match", _exact_match, _mean),
}
assert tuple(METRICS) == SCORES


def metric(name: str) -> Metric:
    """Raises ValueError for a name not in the table."""
    if name not in METRICS:
        raise unknown("the metric", name, METRICS)
    return METRICS[name]


def spread(values: Sequence[float]) -> Spread:
    """Mean and deviation of one number a seed."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
