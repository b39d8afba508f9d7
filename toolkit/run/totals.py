"""What the ranks tell each other within an optimizer step, so that all of them do the same with it."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.batch import TokenBatch
from toolkit.ranks import collectives
from toolkit.ranks.memory import peak_rss_gib


class TokenCounts(NamedTuple):
    """Tokens of one step on all ranks: targets are predicted, tokens are all that are no padding."""

    targets: float
    tokens: float
    text_targets: float
    text_tokens: float


def count_tokens(window: Sequence[TokenBatch], text: Sequence[TokenBatch]) -> TokenCounts:
    """Of the micro-batches that are distilled and of those of plain text. Collective."""
    own = ((sum(b.num_targets for b in part), sum(b.num_tokens for b in part)) for part in (window, text))
    return TokenCounts(*collectives.sum_over_ranks([*itertools.chain(*own)]))


class StepTotals(NamedTuple):
    """Sums over all ranks. The first three are sums over the response tokens of the distilled rows, the fourth is one
    over the tokens of plain text."""

    divergence_nats: float
    cross_entropy_nats: float
    agreements: float
    text_cross_entropy_nats: float
    rss_gib: float  # host memory that the ranks have used at most
    stop_requests: float  # ranks that a signal has asked to stop

    def loss(self, counts: TokenCounts, cross_entropy_weight: float, text_weight: float) -> float:
        """What the step minimises, in nats: a mean over response tokens, and beside it one over those of plain text."""
        summed = self.divergence_nats + cross_entropy_weight * self.cross_entropy_nats
        text = text_weight * self.text_cross_entropy_nats / counts.text_targets if counts.text_targets else 0.0
        return summed / counts.targets + text

    def text_metrics(self, counts: TokenCounts) -> dict[str, float]:
        """What a step's metrics say of its plain text; nothing where it has none."""
        if not counts.text_targets:
            return {}
        return {"text_ce": self.text_cross_entropy_nats / counts.text_targets, "text_tokens": int(counts.text_tokens)}


def agree(step: int, measures: Sequence[Tensor], num_window: int, is_asked_to_stop: bool) -> StepTotals:
    """What every rank has to know alike before the step is taken. Collective.

    measures: for each micro-batch the float64 [3] sums over its tokens of divergence, cross entropy and agreements; the
    first `num_window` are distilled, the others are plain text.
    """
    measures_M3 = torch.stack(list(measures))
    distilled, text = measures_M3[:num_window].sum(0).tolist(), measures_M3[num_window:, 1].sum().item()
    *sums, steps = collectives.sum_over_ranks([*distilled, text, peak_rss_gib(), is_asked_to_stop, step])
    # A rank that has lost a step would mix its gradients with those of another batch, and nothing else would tell.
    mean = steps / collectives.world()
    assert mean == step, f"this rank is at step {step}, the mean of all ranks is {mean}"
    return StepTotals(*sums)
