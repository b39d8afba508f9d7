"""What a run knows of its own course, and how a checkpoint keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from toolkit.evaluation import Best, Validation
from toolkit.rollout.schedule import ScheduleState, Source
from toolkit.run.guard import StepGuard
from toolkit.run.held_out import Answers


@dataclass
class LoopState:
    """Everything that changes as a run takes its steps, apart from what is large or belongs to one rank: weights and
    optimizer, the replay buffer, random generators, places in streams. A checkpoint holds it as JSON."""

    schedule: ScheduleState  # phi, and the validations that moved it
    guard: StepGuard = field(default_factory=StepGuard)  # the steps that were skipped
    done: int = 0  # optimizer steps, the skipped ones included
    tokens: int = 0  # real tokens of all ranks that these steps used, prompts included
    source_counts: dict[str, int] = field(default_factory=lambda: {source.value: 0 for source in Source})
    windows_ahead: int = 0  # steps to come whose student text was made by an earlier one (rollout.windows)
    before: Answers | None = None  # what the student said before its first step
    initial: Validation | None = None  # the validation before the first step
    latest: Validation | None = None
    best: Best | None = None  # the validation whose student is kept in RUN/best
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, see PhaseTimer
    wall_time_s: float = 0.0  # of the starts of this run that came before the present one
    metrics_bytes: int | None = None  # length of metrics.jsonl at the checkpoint

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON types; `from_json` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> LoopState:
        """The state in a checkpoint's state.json, of which `saved` is the content. Raises ValueError for a field of
        another type."""
        # Checkpoints of version 0.1 have some of the fields beside "loop" instead of in it.
        return TypeAdapter(cls).validate_python({**saved, **saved["loop"]})
