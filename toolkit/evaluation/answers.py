"""Answers of a model to prompts, and ROUGE-L of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase

from toolkit import distributed
from toolkit.rollout.engine import GatheredRollout, SeededSampling, sequence_seed


def answer(
    rollout: GatheredRollout,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """A text for each prompt (token ids), the prompts dealt over the ranks; every rank gets all texts, in order."""
    rank, world = distributed.rank(), distributed.world()
    rows = range(rank, len(prompts), world)
    sampling = SeededSampling(max_new_tokens, temperature, seeds=[sequence_seed(seed, 0, row) for row in rows])
    examples = rollout.complete([prompts[row] for row in rows], sampling)
    texts = [tokenizer.decode(example.response, skip_special_tokens=True).strip() for example in examples]
    dealt = distributed.gather_objects(texts)
    return [dealt[row % world][row // world] for row in range(len(prompts))]


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure x 100, with stemming, as the paper's protocol has it (Lin 2004, `rouge_score`)."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score(reference, text)["rougeL"].fmeasure for text, reference in zip(answers, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)
