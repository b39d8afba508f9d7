"""When the student generates: pure decisions, equal on all ranks and after a resume (Algorithm 1, arXiv 2402.03898)."""

import math
from dataclasses import dataclass, field
from enum import Enum

from toolkit.seeds import uniform
from toolkit.settings import POLICIES, ScheduleConfig


class Source(Enum):
    """Where the window of one optimizer step comes from."""

    DATASET = "dataset"
    REPLAY = "replay"
    GENERATE = "generate"


@dataclass
class ScheduleState:
    """What a schedule has learned from validations. Nothing else of it has to be saved."""

    phi: float
    reference_nats: float | None = None  # the loss that the next one is compared with
    history: list[tuple[int, float, float]] = field(default_factory=list)  # (step, loss_nats, phi after it)


class Schedule:
    """Decides the source of every step, and moves phi at validations. All ranks hold an equal Schedule as long as they
    pass equal losses to `observe_validation`: pass the loss reduced over ranks. `state` is that of a run which goes on.
    Raises ValueError for an invalid config, a total_steps below 1, or a seed outside [0, 2**64)."""

    def __init__(self, config: ScheduleConfig, seed: int, total_steps: int, state: ScheduleState | None = None):
        config.validate()
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}: give at least 1")
        uniform(seed)  # a seed out of range fails here, not at the first step
        self.config, self.seed, self.total_steps = config, seed, total_steps
        self.state = state or ScheduleState(config.phi_initial)

    def probabilities(self, step: int) -> dict[Source, float]:
        """P(source) at `step`, with the present phi. Raises ValueError outside 0 <= step <= total_steps."""
        generate, student = self._thresholds(step)
        return {Source.GENERATE: generate, Source.REPLAY: student - generate, Source.DATASET: 1 - student}

    def decide(self, step: int) -> Source:
        """Where this step's window comes from; a function of (seed, step, phi) alone.

        u ~ U(0,1): GENERATE if u < phi (1 - t/T), else REPLAY if u < phi, else DATASET (Alg. 1, arXiv 2402.03898; the
        other shares and policies replace the two thresholds). Whether the buffer can serve a REPLAY is for the caller
        to settle, alike on all ranks. Raises ValueError outside 0 <= step <= total_steps.
        """
        generate, student = self._thresholds(step)
        draw = uniform(self.seed, step)  # counter-based: no state to lose
        if draw < generate:
            return Source.GENERATE
        return Source.REPLAY if draw < student else Source.DATASET

    def observe_validation(self, step: int, loss_nats: float) -> bool:
        """Record a validation loss, in nats a token, and say whether phi moved.

        If loss > reference + epsilon: phi = min(phi + phi_step, 1) (Alg. 1), under the policy "adaptive" alone. The
        reference is the previous loss, or the loss at the last rise, by `config.reference_loss`. The first loss only
        sets it: validate before training, as the released code does. Raises ValueError for a loss that is not finite
        or a step before the last one observed; nothing is recorded.
        """
        loss_nats = float(loss_nats)
        if not math.isfinite(loss_nats):
            reason = "training has diverged, or a validation batch has no response tokens"
            raise ValueError(f"validation loss at step {step} is {loss_nats}: {reason}")
        state = self.state
        if state.history and step < state.history[-1][0]:
            raise ValueError(
                f"validation at step {step} comes after one at step {state.history[-1][0]}: load the "
                "schedule's state from the checkpoint that training went back to"
            )
        rose = state.reference_nats is not None and loss_nats > state.reference_nats + self.config.epsilon
        if state.reference_nats is None or rose or self.config.reference_loss == "previous":
            state.reference_nats = loss_nats
        # Phi rises where the loss did.
        phi_before = state.phi
        if rose and self.config.policy == "adaptive":
            raised = state.phi + self.config.phi_step
            state.phi = 1.0 if raised > 1 - 1e-9 else raised  # ten times 0.1 is 1, whatever the rounding
        state.history.append((int(step), loss_nats, state.phi))
        return state.phi != phi_before

    def _thresholds(self, step: int) -> tuple[float, float]:
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"step {step} is outside 0..{self.total_steps}: set total_steps to the length of the run")
        return POLICIES[self.config.policy](self.config, self.state.phi, step / self.total_steps)
