"""What a finished run says of itself: summary.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from toolkit.ranks import collectives
from toolkit.settings import RunConfig

if TYPE_CHECKING:  # recipes import this file, and are imported by commands that need no model
    from toolkit.data import Data
    from toolkit.models.identity import RunIdentity
    from toolkit.plan import Plan
    from toolkit.run.held_out import Answers, HeldOutPrompts
    from toolkit.run.state import LoopState

SUMMARY = "summary.json"
STUDENT, BEST = "student", "best"  # folders of a run: the student after its last step, and after its best validation
TRAINING_PHASES = ("teacher", "rollout", "student", "optimizer")
OTHER_PHASES = ("teacher_text", "validation", "evaluation", "checkpoint", "export")


class Summary(TypedDict):
    """Of all ranks together; what was measured counts all starts of the run."""

    steps: int
    tokens: int  # prompts included
    wall_time_s: float
    train_time_s: float  # without the phases of OTHER_PHASES, and without loading
    tokens_per_s: float  # of training time
    ranks: int  # of the last start
    precision: str
    sharding: dict[str, str]  # of teacher and student in the last start, and why
    peak_rss_gib: float
    validation: dict[str, dict[str, float | None]]  # "initial" and "final" -> Validation.metrics
    best: dict[str, Any] | None  # by, step, value and folder of the best student, where validation.best asks for it
    rouge_l: dict[str, float] | None  # "initial", "final", "teacher" x 100, of so many "rows"
    time_share: dict[str, float]  # of the wall time, by phase
    source_counts: dict[str, int]  # steps by where their rows came from
    skipped_steps: int
    phi_final: float
    phi_history: list[tuple[int, float, float]]  # (step, validation loss in nats, phi after it)
    data: dict[str, int]  # rows read, skipped and cut: Data.counts
    identity: RunIdentity
    student: str  # folder of the trained student


def summarize(
    config: RunConfig, state: LoopState, data: Data, held_out: HeldOutPrompts, answers: dict[str, Answers],
    identity: RunIdentity, wall_time_s: float, plan: Plan,
) -> Summary:  # fmt: skip
    """The summary of a run that has taken its steps. answers: of "initial", "final" and perhaps "teacher". Collective.

    wall_time_s: of all starts of the run.
    """
    from toolkit.ranks.memory import peak_rss_gib

    # Time that was spent in no phase counts as "other".
    phases = {name: state.seconds.get(name, 0.0) for name in (*TRAINING_PHASES, *OTHER_PHASES)}
    train_time_s = sum(state.seconds.values()) - sum(phases[name] for name in OTHER_PHASES)
    phases["other"] = wall_time_s - sum(phases.values())

    # Scores and the best student are there only where they were asked for.
    rouge_l = None
    if rows := len(answers["final"].sampled):
        rouge_l = {name: held_out.score("rouge_l", found.sampled) for name, found in answers.items()} | {"rows": rows}
    best = state.best
    assert state.initial and state.latest, "a run validates before its first step"
    return {
        "steps": config.train.steps,
        "tokens": state.tokens,
        "wall_time_s": wall_time_s,
        "train_time_s": train_time_s,
        "tokens_per_s": state.tokens / train_time_s,
        "ranks": collectives.world(),
        "precision": identity["precision"],
        "sharding": {"teacher": plan.teacher, "student": plan.student, "gather": plan.gather, "why": plan.why},
        "peak_rss_gib": collectives.sum_over_ranks([peak_rss_gib()])[0],
        "validation": {"initial": state.initial.metrics(), "final": state.latest.metrics()},
        "best": best and {"by": config.validation.best, **best._asdict(), "student": str(config.run_dir / BEST)},
        "rouge_l": rouge_l,
        "time_share": {name: spent_s / wall_time_s for name, spent_s in phases.items()},
        "source_counts": state.source_counts,
        "skipped_steps": state.guard.skipped,
        "phi_final": state.schedule.phi,
        "phi_history": state.schedule.history,
        "data": data.counts,
        "identity": identity,
        "student": str(config.run_dir / STUDENT),
    }
