"""Held-out distance between student and teacher, weighted by tokens, over all ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from toolkit import distributed
from toolkit.batch import Example, TokenBatch
from toolkit.divergences import Divergence
from toolkit.models.engines import NoTeacher, Objective, Student, Teacher


class Validation(NamedTuple):
    """Means per response token: forward KL of teacher to student, cross-entropy with the data, and the share of tokens
    where both models' first choices agree. Without a teacher only the second is known."""

    kl_nats: float | None
    ce_nats: float
    top1_agreement: float | None


class Validator:
    """Measures on `examples`, dealt over the ranks, against `teacher`. Every rank makes as many passes, whatever its
    share. decoder_start_id: as TokenBatch has it."""

    def __init__(self, examples: list[Example], batch_rows: int, pad_id: int, teacher: Teacher | NoTeacher,
                 decoder_start_id: int | None = None):  # fmt: skip
        self.teacher = teacher
        rank, world = distributed.rank(), distributed.world()
        own = examples[rank::world]
        passes = math.ceil(math.ceil(len(examples) / world) / batch_rows)
        parts = [own[start : start + batch_rows] for start in range(0, len(own), batch_rows)]
        # A rank that runs out of rows still enters the all-gathers, with a row that does not count.
        *self.batches, spare = [
            TokenBatch.from_examples(part, pad_id, decoder_start_id=decoder_start_id).to(distributed.device())
            for part in (*parts, examples[:1])
        ]
        self.spares = [spare] * (passes - len(parts))

    @torch.no_grad()
    def measure(self, student: Student) -> Validation:
        """Every rank gets the same numbers. Temperature 1 and the forward KL, whatever training minimises, so that runs
        with different losses can be compared."""
        sums = [0.0, 0.0, 0.0, 0.0]
        student.engine.eval()
        try:
            with self.teacher.head() as head:
                for index, batch in enumerate(self.batches + self.spares):
                    (signal,) = self.teacher.signals([batch])
                    out = student.loss(batch, signal, head, Objective(Divergence("fkl")))
                    if index < len(self.batches):
                        found = (out.divergence_nats, out.cross_entropy_nats, out.agreements, batch.num_targets)
                        sums = [total + float(value) for total, value in zip(sums, found, strict=True)]
        finally:
            student.engine.train()
        kl, cross_entropy, agreements, tokens = distributed.sum_over_ranks(sums)
        if isinstance(self.teacher, NoTeacher):
            return Validation(None, cross_entropy / tokens, None)
        return Validation(kl / tokens, cross_entropy / tokens, agreements / tokens)
