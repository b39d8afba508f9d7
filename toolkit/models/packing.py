"""Whether a model keeps the texts of one row apart, asked of the model itself."""

from typing import Any, NamedTuple

import numpy as np
import torch

from toolkit.batch import Example, TokenBatch
from toolkit.models.engines import evaluation_mode, hidden_states
from toolkit.models.vocabulary import Vocabulary

TEXT_TOKENS, TEXTS, ROWS = 6, 5, 6  # of a text, of a row, of a pass
#: How far another text before one may move its hidden states: by this, or RATIO times as far as rounding is seen to.
ROUNDING, RATIO = {torch.float32: 1e-5, torch.bfloat16: 2e-3}, 5.0
#: How far they may be from those of the text alone, whose products round otherwise. Positions that do not start over
#: in each text move them further.
ALONE = {torch.float32: 1e-3, torch.bfloat16: 2e-1}


class Moved(NamedTuple):
    """How far hidden states move, relative to their size."""

    by_neighbours: float  # when the texts before and after one are changed
    of_first: float  # when the same is done to the first text of a row, which sees none of them
    from_alone: float  # between a text in a row and the same text alone


def check_packing(role: str, engine: Any, vocabulary: Vocabulary) -> None:
    """Three small passes of the engine's model, in eval mode; collective. Raises ValueError for a model that does not
    keep texts apart."""
    model = engine.module.model
    with evaluation_mode(engine):
        moved = measure(engine, vocabulary)
    limit, alone = max(ROUNDING[model.dtype], RATIO * moved.of_first), ALONE[model.dtype]
    if not (moved.by_neighbours <= limit and moved.from_alone <= alone):
        raise ValueError(
            f"the {role}, a {model.config.model_type} model, does not keep several texts in one row apart: another "
            f"text before one moves its hidden states by {moved.by_neighbours:.1e} of their size ({limit:.0e} is "
            f"allowed), and they are {moved.from_alone:.1e} from those of the text alone ({alone:.0e}). data.packing, "
            'data.kind = "text" and text.source need a model whose attention goes by position ids; leave them out'
        )


def measure(engine: Any, vocabulary: Vocabulary) -> Moved:
    """How far texts move where others stand beside them. Collective.

    Each row is a watched text, a neighbour, a watched one, ...; a second pass has other neighbours. The first text of a
    row sees none of them: what it moves by is rounding, for instance of experts that multiply other numbers of tokens.
    Of each place in a text the median over texts counts, as rounding may send one token to another expert; of the
    places the largest, as a convolution reaches the first tokens of the next text alone.
    """
    draw = np.random.default_rng(0)

    def new_text() -> Example:
        return Example(draw.integers(0, vocabulary.size, TEXT_TOKENS), 1)

    rows_RT = [[new_text() for _ in range(TEXTS)] for _ in range(ROWS)]
    changed_RT = [[new_text() if place % 2 else text for place, text in enumerate(row)] for row in rows_RT]
    watched = [text for row in rows_RT for text in row[::2]]
    alone, packed, changed = (
        hidden_states(engine, TokenBatch.from_rows(rows, vocabulary.pad_id)).float()
        for rows in ([[text] for text in watched], rows_RT, changed_RT)
    )
    # W watched texts, each of L hidden states: in the row, in the row with other neighbours, and alone.
    shape = TEXTS, TEXT_TOKENS - 1, packed.shape[-1]
    alone_WLH = alone.unflatten(0, (-1, TEXT_TOKENS - 1))
    packed_WLH, changed_WLH = (hidden.view(ROWS, *shape)[:, ::2].flatten(0, 1) for hidden in (packed, changed))
    by_neighbours_WL, from_alone_WL = (
        (packed_WLH - other_WLH).norm(dim=2) / packed_WLH.square().sum(2).mean().sqrt()  # the size of all: some are 0
        for other_WLH in (changed_WLH, alone_WLH)
    )
    # The first text of each row, and the later ones.
    by_neighbours_RPL = by_neighbours_WL.unflatten(0, (ROWS, -1))
    moved = by_neighbours_RPL[:, 1:].flatten(0, 1), by_neighbours_RPL[:, 0], from_alone_WL
    return Moved(*(float(moved_WL.median(0).values.max()) for moved_WL in moved))
