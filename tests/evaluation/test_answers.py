"""ROUGE-L as the scorer gives it, row by row, on one rank and dealt over two."""

import itertools
import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from tests.evaluation import evaluation_cases
from toolkit.data.python_docs import python_docs_rows
from toolkit.evaluation import score


def real_answers(count=200):
    """Documentation, and what might be said of it: cut, with words left out and words of another entry between."""
    rows, draw = python_docs_rows("validation")[: count + 1], random.Random(5)
    assert len(rows) == count + 1
    answers = []
    for row, other in itertools.pairwise(rows):
        words = [word for word in row["response"].split() if draw.random() < 0.7]
        answers.append(" ".join(words + other["response"].split()[: draw.randrange(9)]))
    return answers, [row["response"] for row in rows[:-1]]


def test_rouge_l_is_the_scorers_row_by_row():
    answers, references = real_answers()
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rows = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    assert 0.3 < sum(rows) / 200 < 0.9 and len(set(rows)) > 100
    assert score("rouge_l", answers, [[one] for one in references]) == pytest.approx(sum(rows) / 200 * 100)
    assert score("rouge_l", ["it copies files"], [["it copy file"]]) == pytest.approx(100)  # stemmed


@pytest.mark.multiprocess
def test_ranks_deal_the_rows_and_agree(ranks2):
    answers, references = real_answers(21)
    wanted = score("rouge_l", answers, [[one] for one in references])
    assert ranks2.run(evaluation_cases.rouge_l, answers, [[one] for one in references]) == pytest.approx([wanted] * 2)
