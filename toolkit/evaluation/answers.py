"""Answers of a model to prompts, and their scores. Training's validation and `evaluate` both come through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from toolkit.evaluation.metrics import References, metric
from toolkit.ranks import collectives
from toolkit.rollout.local import GatheredRollout, SeededSampling, sequence_seed
from toolkit.settings import SamplingSettings

Result = TypeVar("Result")


class Answer(NamedTuple):
    """What a model said to a prompt."""

    text: str
    tokens: int  # EOS included


def answer(
    rollout: GatheredRollout,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    sampling: SamplingSettings,
    max_new_tokens: int,
    seeds: Sequence[int],
) -> list[Answer]:
    """An answer to each prompt (token ids), drawn with its seed; the prompts are dealt over the ranks, and every rank
    gets all answers, in order."""

    def share(rows: range) -> list[Answer]:
        settings = SeededSampling.of(sampling, max_new_tokens, [seeds[row] for row in rows])
        found = rollout.complete([prompts[row] for row in rows], settings)
        texts = [str(tokenizer.decode(example.response, skip_special_tokens=True)).strip() for example in found]
        return [Answer(text, len(example.response)) for text, example in zip(texts, found, strict=True)]

    return _dealt(share, len(prompts))


def row_seeds(seed: int, rows: Sequence[int]) -> list[int]:
    """The seeds of the answers to these rows. With them a text is the same on any rank, and beside any other texts."""
    return [sequence_seed(seed, 0, row) for row in rows]


def score_rows(texts: Sequence[str], references: References, metrics: Sequence[str]) -> list[dict[str, float]]:
    """Each answer's score by each metric; the rows are dealt over the ranks, every rank gets all scores."""
    scorers = {name: metric(name).row for name in metrics}
    return _dealt(
        lambda rows: [{name: score(texts[row], references[row]) for name, score in scorers.items()} for row in rows],
        len(texts),
    )


def score(name: str, texts: Sequence[str], references: References) -> float:
    """Of all answers together, by the metric `name`, x 100. Collective."""
    rows = [scores[name] for scores in score_rows(texts, references, [name])]
    return metric(name).total(texts, references, rows)


def _dealt(work: Callable[[range], list[Result]], count: int) -> list[Result]:
    """`work`'s results for `count` rows, in order, on every rank; each rank does every world-th row."""
    rank, world = collectives.rank(), collectives.world()
    dealt = collectives.gather_objects(work(range(rank, count, world)))
    return [dealt[row % world][row // world] for row in range(count)]
