"""The `schedule` section: when a step trains on the student's own text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from toolkit.settings.section import Section
from toolkit.settings.setting import setting

# Each returns (P(GENERATE), P(GENERATE or REPLAY)); the rest is DATASET. progress = step / total_steps.
POLICIES: dict[str, Callable[[ScheduleConfig, float, float], tuple[float, float]]] = {
    "adaptive": lambda config, phi, progress: (phi * GENERATION_SHARES[config.generation_share](progress), phi),
    "on_policy": lambda config, phi, progress: (1.0, 1.0),
    "mixed": lambda config, phi, progress: (config.mixed_share, config.mixed_share),
    "off": lambda config, phi, progress: (0.0, 0.0),
}

# The part of phi that is generated anew, as a function of progress.
GENERATION_SHARES: dict[str, Callable[[float], float]] = {
    "decreasing": lambda progress: 1 - progress,
    "constant": lambda progress: 0.5,
    "increasing": lambda progress: progress,
}

REFERENCE_LOSSES = ("previous", "released")


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """How often a step trains on the student's own text, and how much of that text is generated anew."""

    # fmt: off
    policy: str = setting("adaptive",
        "adaptive: with probability phi a step trains on student text, fresh or replayed (Algorithm 1 of arXiv "
        "2402.03898). on_policy: every step generates. mixed: a step generates with probability mixed_share, as in GKD "
        "and ImitKD. off: the data set only.", choices=tuple(POLICIES))
    phi_initial: float = setting(0.0, "phi at the start, of policy adaptive.", least=0, most=1)
    phi_step: float = setting(0.1, "What phi gains at a validation whose loss rose; phi stays at 1.", least=0, most=1)
    epsilon: float = setting(0.1,
        "Rise of the validation loss up to which phi stays as it is.", unit="nats a token", least=0, below=math.inf)
    generation_share: str = setting("decreasing",
        "Part of phi that is generated anew at step t of T; the rest of phi is replayed. decreasing: 1 - t/T (the "
        "paper). constant: 1/2, and increasing: t/T (its ablations). All three generate equally often over a run at "
        "constant phi.", choices=tuple(GENERATION_SHARES))
    mixed_share: float = setting(0.5, "Probability that a step generates, of policy mixed.", least=0, most=1)
    reference_loss: str = setting("previous",
        "What a validation loss is compared with. previous: the validation before it (the paper). released: the loss "
        "at the last rise, or the first one (the authors' code), so that a loss which first falls and then rises by "
        "less than it fell leaves phi as it is.", choices=REFERENCE_LOSSES)
    # fmt: on

    def validate(self, section: str = "schedule") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
