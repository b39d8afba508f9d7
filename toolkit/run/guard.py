"""Steps that are not taken: loss or gradient is not finite, or the loss jumps."""

import math
import statistics
from dataclasses import dataclass, field

from toolkit.settings import FaultsConfig


@dataclass
class StepGuard:
    """Decides which optimizer steps are not taken. Its numbers are those of all ranks together, so that every rank
    decides alike, and a checkpoint keeps them."""

    skipped: int = 0  # steps since the run began
    skipped_in_row: int = 0  # steps up to the last one
    losses: list[float] = field(default_factory=list)  # of the last faults.spike_window steps that were taken

    def objection(self, loss: float, faults: FaultsConfig) -> str | None:
        """Why a step with this loss must not be taken, or None."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if faults.spike_factor is not None and len(self.losses) >= faults.spike_window:
            limit = faults.spike_factor * statistics.median(self.losses)
            if loss > limit:
                return f"its loss is {loss:.4g}, above {faults.spike_factor:g} medians = {limit:.4g}"
        return None

    def record(self, loss: float, taken: bool, faults: FaultsConfig) -> None:
        """Remember a step that was taken, or count one that was skipped."""
        if taken:
            self.skipped_in_row = 0
            self.losses = [*self.losses, loss][-faults.spike_window :]
        else:
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1

    def gives_up(self, faults: FaultsConfig) -> bool:
        """Whether so many steps in a row were skipped that the run has to end."""
        return self.skipped_in_row >= faults.max_skipped_steps
