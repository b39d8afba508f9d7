"""Steps that are not taken: loss or gradient is not finite, or the loss jumps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolkit.settings import FaultsConfig


@dataclass
class StepGuard:
    """Which optimizer steps are not taken. Its numbers are of all ranks together, so every rank decides alike."""

    config: FaultsConfig
    skipped: int = 0
    skipped_in_row: int = 0
    losses: list[float] = field(default_factory=list)  # of the last steps that were taken

    def objection(self, loss: float) -> str | None:
        """Why a step with this loss must not be taken, or None."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if self.config.spike_factor is not None and len(self.losses) >= self.config.spike_window:
            limit = self.config.spike_factor * statistics.median(self.losses)
            if loss > limit:
                return f"its loss is {loss:.4g}, above {self.config.spike_factor:g} medians = {limit:.4g}"
        return None

    def record(self, loss: float, taken: bool) -> None:
        if taken:
            self.skipped_in_row = 0
            self.losses = [*self.losses, loss][-self.config.spike_window :]
        else:
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1

    @property
    def gives_up(self) -> bool:
        return self.skipped_in_row >= self.config.max_skipped_steps

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row, "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.skipped_in_row, self.losses = state["skipped"], state["skipped_in_row"], state["losses"]
