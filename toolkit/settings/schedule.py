"""The `schedule` section: when a step trains on the student's own text."""

import difflib
import math
from dataclasses import dataclass

# Each returns (P(GENERATE), P(GENERATE or REPLAY)); the rest is DATASET. progress = step / total_steps.
POLICIES = {
    "adaptive": lambda config, phi, progress: (phi * GENERATION_SHARES[config.generation_share](progress), phi),
    "on_policy": lambda config, phi, progress: (1.0, 1.0),
    "mixed": lambda config, phi, progress: (config.mixed_share, config.mixed_share),
    "off": lambda config, phi, progress: (0.0, 0.0),
}


GENERATION_SHARES = {
    "decreasing": lambda progress: 1 - progress,
    "constant": lambda progress: 0.5,
    "increasing": lambda progress: progress,
}


REFERENCE_LOSSES = ("previous", "released")


@dataclass(frozen=True)
class ScheduleConfig:
    """How often to train on student text, and how much of that text to generate anew.

    policy            "adaptive": Algorithm 1 of arXiv 2402.03898, by phi, below. "on_policy": generate at every step.
                      "mixed": generate with probability `mixed_share` (GKD, ImitKD). "off": the data set only.
    phi_initial       phi at the start: the probability that a step trains on student text, fresh or replayed.
    phi_step          1 / N_phi: what phi gains at a validation whose loss rose. At most 1 is reached.
    epsilon           nats a token by which the validation loss may rise without moving phi.
    generation_share  the part of phi that is generated anew at step t of T; the rest of phi is replayed.
                      "decreasing": 1 - t/T (the paper), "constant": 1/2, "increasing": t/T (its ablations). All three
                      generate equally often over a run at constant phi. The replayed share runs the other way.
    mixed_share       P(GENERATE) of the "mixed" policy.
    reference_loss    what a validation loss is compared with. "previous": the validation before it (the paper).
                      "released": the loss at the last rise, or the first one seen (the authors' code), so that a loss
                      which first falls and then rises by less than it fell does not move phi.
    """

    policy: str = "adaptive"
    phi_initial: float = 0.0
    phi_step: float = 0.1
    epsilon: float = 0.1
    generation_share: str = "decreasing"
    mixed_share: float = 0.5
    reference_loss: str = "previous"

    def validate(self) -> None:
        """Raise ValueError, naming the field, where a name is unknown or a number out of range."""
        _check_name("policy", self.policy, POLICIES)
        _check_name("generation_share", self.generation_share, GENERATION_SHARES)
        _check_name("reference_loss", self.reference_loss, REFERENCE_LOSSES)
        for field in ("phi_initial", "phi_step", "mixed_share"):
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise ValueError(f"schedule.{field} is {value}, but it is a probability: give a number from 0 to 1")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"schedule.epsilon is {self.epsilon}: give a finite number of nats, 0 or more")


def _check_name(field: str, name: str, known) -> None:
    if name in known:
        return
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
    raise ValueError(f"schedule.{field} {name!r} is unknown; known: {', '.join(known)}; nearest: {nearest!r}")
