"""Held-out distance between student and teacher, weighted by tokens, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from toolkit.batch import DECODER_ONLY, Example, RowLayout
from toolkit.divergences import Divergence, Objective
from toolkit.models import Student
from toolkit.ranks import collectives
from toolkit.teachers.cache import CachedTeacher
from toolkit.teachers.live import NoTeacher, Teacher


class Validation(NamedTuple):
    """Means per response token: forward KL of teacher to student, cross-entropy with the data, and the share of tokens
    where both models' first choices agree; without a teacher only the second is known. scores: of answers, by metric,
    x 100; none where no rows were answered. Where no teacher is loaded and its answers are in a cache, the KL is that
    of the cache: of a top k a lower bound (all other tokens count as one), of draws an unbiased estimate, and the
    teacher's first choice is then the one drawn most."""

    kl_nats: float | None
    ce_nats: float
    top1_agreement: float | None
    scores: Mapping[str, float] = {}

    def metrics(self) -> dict[str, float | None]:
        """All of it by name, as it is logged."""
        perplexity = math.exp(min(self.ce_nats, 700.0))  # more would overflow
        loss = {"kl_nats": self.kl_nats, "ce_nats": self.ce_nats, "top1_agreement": self.top1_agreement}
        return {**loss, "perplexity": perplexity, **self.scores}


class Best(NamedTuple):
    """The best validation so far: after which step, and its value by `validation.best`."""

    step: int
    value: float

    @classmethod
    def of(cls, so_far: Best | None, found: Validation, by: str, step: int) -> Best | None:
        """`so_far`, or `found` where it is better by "kl", "ce" or a score. What is not a number is never best."""
        value = {"kl": found.kl_nats, "ce": found.ce_nats, **found.scores}[by]
        assert value is not None, "validation.best is checked with the settings"
        sign = 1 if by in found.scores else -1
        if math.isnan(value) or (so_far is not None and sign * value <= sign * so_far.value):
            return so_far
        return cls(step, value)


class Validator:
    """Measures on `examples`, dealt over the ranks, against `teacher`. Every rank makes as many passes, whatever its
    share. scores: answers held-out prompts and scores the answers; None leaves it out. layout: of both models' rows."""

    def __init__(self, examples: list[Example], rows_per_pass: int, pad_id: int,
                 teacher: Teacher | NoTeacher | CachedTeacher, scores: Callable[[], Mapping[str, float]] | None = None,
                 layout: RowLayout = DECODER_ONLY):  # fmt: skip
        self.teacher, self.scores = teacher, scores
        rank, world = collectives.rank(), collectives.world()
        # All ranks make as many passes as the one with the most rows needs.
        own = examples[rank::world]
        passes = math.ceil(math.ceil(len(examples) / world) / rows_per_pass)
        parts = [own[start : start + rows_per_pass] for start in range(0, len(own), rows_per_pass)]
        # A rank that runs out of rows still enters the all-gathers, with a row that does not count.
        *self.batches, spare = (layout.batch(part, pad_id).to(collectives.device()) for part in (*parts, examples[:1]))
        self.spares = [spare] * (passes - len(parts))

    @torch.no_grad()
    def measure(self, student: Student) -> Validation:
        """Every rank gets the same numbers. Temperature 1 and the forward KL, whatever training minimises, so that runs
        with different losses can be compared."""
        sums = [0.0] * 4
        student.engine.eval()
        try:
            with self.teacher.head() as head:
                for index, batch in enumerate(self.batches + self.spares):
                    (signal,) = self.teacher.signals([batch])
                    out = student.loss(batch, signal, head, Objective(Divergence("fkl")))
                    if index < len(self.batches):
                        found = [out.divergence_nats, out.cross_entropy_nats, out.agreements]
                        counted = [*map(float, found), batch.num_targets]
                        sums = [total + value for total, value in zip(sums, counted, strict=True)]
        finally:
            student.engine.train()
        # Every rank counts in what it has seen; means are taken once, of the sums.
        kl, cross_entropy, agreements, tokens = collectives.sum_over_ranks(sums)
        scores = self.scores() if self.scores else {}
        if isinstance(self.teacher, NoTeacher):
            return Validation(None, cross_entropy / tokens, None, scores)
        return Validation(kl / tokens, cross_entropy / tokens, agreements / tokens, scores)
