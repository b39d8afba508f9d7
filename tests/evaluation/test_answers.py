"""ROUGE-L as the scorer gives it, row by row."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from toolkit.evaluation import rouge_l


def test_rouge_l_is_the_mean_f_measure_with_stemming():
    answers = ["it copies files", "returns a number", ""]
    references = ["it copied a file", "a number", "something"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    wanted = sum(scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)) / 3 * 100
    assert rouge_l(answers, references) == pytest.approx(wanted)
    assert rouge_l(["it copies files"], ["it copy file"]) == pytest.approx(100)  # stemmed
