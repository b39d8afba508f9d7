"""Each metric against its library or against numbers worked out by hand."""

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from toolkit.evaluation import METRICS, metric, spread
from toolkit.evaluation.validation import Best, Validation

ANSWERS = ["the cat sat on the mat", "a dog barks", "nothing fits", "he goes home now"]
REFERENCES = [
    ["a cat sat on a mat", "the cat sat on the mat today"],
    ["a dog barks"],
    ["something else", "quite another text", "a third"],
    ["she went home", "he goes home"],
]


def rows(name):
    return [METRICS[name].row(a, r) for a, r in zip(ANSWERS, REFERENCES, strict=True)]


def total(name):
    return METRICS[name].total(ANSWERS, REFERENCES, rows(name))


def test_rouge_l_is_of_the_best_reference():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    wanted = [
        100 * max(scorer.score(one, answer)["rougeL"].fmeasure for one in ones)
        for answer, ones in zip(ANSWERS, REFERENCES, strict=True)
    ]
    assert rows("rouge_l") == pytest.approx(wanted)
    assert total("rouge_l") == pytest.approx(sum(wanted) / 4)
    # by hand: all 6 words of 7, so precision 1, recall 6/7, F = 12/13; against the first it is 4/6
    assert rows("rouge_l")[0] == pytest.approx(100 * 12 / 13)


@pytest.mark.parametrize(("name", "corpus"), [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)])
def test_corpus_scores_are_those_of_sacrebleu(name, corpus):
    streams = [[ones[i] if i < len(ones) else None for ones in REFERENCES] for i in range(3)]
    assert total(name) == pytest.approx(corpus(ANSWERS, streams).score)
    assert 0 < total(name) < 100
    assert total(name) != pytest.approx(sum(rows(name)) / 4)  # not the mean of the rows
    assert rows(name)[1] == pytest.approx(100)


def test_bleu_by_hand():
    # 4 words of 5 and no clipping: precisions 4/4, 3/3, 2/2, 1/1, and the brevity penalty exp(1 - 5/4)
    assert METRICS["bleu"].total(["a b c d"], [["a b c d e"]], [0]) == pytest.approx(77.8800783)


def test_exact_match_strips_and_nothing_else():
    row = METRICS["exact_match"].row
    assert row(" Paris\n", ["Rome", "Paris "]) == 100
    assert row("paris", ["Paris"]) == row("Paris.", ["Paris"]) == 0
    assert total("exact_match") == pytest.approx(25)


def test_mean_and_deviation_by_hand():
    assert spread([25.0, 27.0, 26.0, 24.0, 28.0]) == pytest.approx((26.0, 2.5**0.5))  # squares 1 1 0 4 4 over n - 1
    assert spread([25.0]) == (25.0, None)


def test_an_unknown_metric_is_named_with_its_nearest():
    with pytest.raises(ValueError, match="did you mean 'rouge_l'"):
        metric("rougel")


def test_the_best_is_the_lowest_loss_or_the_highest_score():
    def best(by, *validations):
        found = None
        for step, validation in enumerate(validations):
            found = Best.of(found, validation, by, step)
        return found

    nan = float("nan")
    found = ((nan, 4.0, 1.0), (2.0, 5.0, 3.0), (1.0, 4.0, nan), (1.0, 3.5, 2.0))
    seen = [Validation(kl, ce, 0, {"rouge_l": score}) for kl, ce, score in found]
    assert best("kl", *seen) == (2, 1.0)  # the first of equals
    assert best("ce", *seen) == (3, 3.5)
    assert best("rouge_l", *seen) == (1, 3.0)
    assert best("kl", seen[0]) is None
