"""Whether a model keeps the texts of one row apart, asked of the model itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from toolkit.batch import Example, TokenBatch
from toolkit.models.engines import NoTeacher, Objective, Student, Teacher
from toolkit.models.vocabulary import Vocabulary

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
TEXT_TOKENS, COPIES, ROWS = 12, 3, 2


def check_packing(teacher: Teacher | NoTeacher, student: Student, vocabulary: Vocabulary) -> None:
    """One text three times in each of two rows has to give six times what it gives alone; a model that looks back into
    the copy before it, or counts positions on, gives something else. A few small passes; collective.

    Raises ValueError for a model that does not keep them apart.
    """
    draw = np.random.default_rng(0)
    text = Example(draw.integers(0, vocabulary.size, TEXT_TOKENS), 1)
    alone = TokenBatch.from_examples([text], vocabulary.pad_id)
    packed = TokenBatch.from_rows([[text] * COPIES] * ROWS, vocabulary.pad_id)
    device = next(student.model.parameters()).device
    alone, packed = alone.to(device), packed.to(device)

    def cross_entropy(batch: TokenBatch) -> Tensor:
        return student.loss(batch, None, None, Objective(None)).cross_entropy_nats

    student.engine.eval()
    try:
        with torch.no_grad():
            _compare("student", student, COPIES * ROWS * cross_entropy(alone), cross_entropy(packed))
            if isinstance(teacher, Teacher):
                first, then = (teacher.signals([batch])[0].double().sum(0) for batch in (alone, packed))
                _compare("teacher", teacher, COPIES * ROWS * first, then)
    finally:
        student.engine.train()


def _compare(name: str, model: Teacher | Student, wanted: Tensor, found: Tensor) -> None:
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    limit = TOLERANCE[model.model.dtype]
    if not error <= limit:
        raise ValueError(
            f"the {name}, a {model.model.config.model_type} model, does not keep several texts in one row apart (its "
            f'answer is off by {error:.1e}, {limit:.0e} is allowed): data.packing, data.kind = "text" and text.source '
            "need a model whose attention goes by position ids; leave them out"
        )
