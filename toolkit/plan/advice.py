"""What to change where a plan does not fit: each change is planned again, and told with what it saves and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from toolkit.plan.machine import Machine
from toolkit.plan.plan import Advice, Plan
from toolkit.settings import RunConfig

Planner = Callable[[RunConfig, Machine], Plan]
LEAST_TILES_MIB = 256
MOST_CHANGES = 10  # that are made together
MORE_PASSES = "more micro-batches a step, each with its collectives"
OFFLOADED = "ds_configs/teacher_zero3_offload.json"


class Change(NamedTuple):
    """Settings, or another number of nodes, and what that costs in words."""

    settings: tuple[str, ...]
    costs: str
    nodes: int | None = None

    def __str__(self) -> str:
        return " ".join(self.settings) if self.nodes is None else f"--nodes {self.nodes}"


def advise(plan: Plan, planned: Planner) -> tuple[list[Advice], tuple[str, ...] | None]:
    """(Changes that save memory, the cheapest first; some that fit together where none does alone, else None)."""
    config, machine = plan.config, plan.machine
    useful: list[tuple[Change, Advice]] = []
    for change in _changes(plan):
        if (found := _tried(config, machine, change, planned)) is None:
            continue
        saved = plan.peak[1] - found.peak[1]
        if saved > 0 or found.fits:
            useful.append((change, Advice(str(change), change.costs, saved, found.exposed_seconds, found.fits)))
    # The cheapest is what lengthens a step least; more machines cost more than any settings do.
    useful.sort(
        key=lambda pair: (pair[0].nodes is not None, round(pair[1].seconds / plan.exposed_seconds, 2), -pair[1].saved)
    )
    advice = [one for _, one in useful]
    if any(one.fits and change.nodes is None for change, one in useful):
        return advice, None

    return advice, _together(plan, planned)


def _together(plan: Plan, planned: Planner) -> tuple[str, ...] | None:
    """Settings that fit, found by the cheapest change that saves something, again and again; None where the last such
    change is not enough."""
    now, taken = plan, dict[str, str]()
    for _ in range(MOST_CHANGES):
        best: tuple[tuple[float, ...], Plan, Change] | None = None
        for change in _changes(now):
            found = None if change.nodes else _tried(now.config, now.machine, change, planned)
            if found is None or (found.peak[1] >= now.peak[1] and not found.fits):
                continue
            rank = (-found.fits, round(found.exposed_seconds / now.exposed_seconds, 2), -now.peak[1] + found.peak[1])
            if best is None or rank < best[0]:
                best = rank, found, change
        if best is None:
            return None
        _, now, change = best
        taken |= {text.partition("=")[0]: text for text in change.settings}
        if now.fits:
            return tuple(taken.values())
    return None


def _changes(plan: Plan) -> Iterator[Change]:
    config, work, machine = plan.config, plan.work, plan.machine
    budget = config.loss.memory_budget_mib or (256 if machine.kind.is_cpu else 3072)
    while (budget := budget // 2) >= LEAST_TILES_MIB / 4:
        yield Change((f"loss.memory_budget_mib={budget}",), "smaller tiles of the loss, slower products")
        if budget <= LEAST_TILES_MIB:
            break
    rows = work.micro_rows
    while config.train.tokens_per_micro_batch is None and (rows := rows // 2) >= 1:
        yield Change((f"train.rows_per_micro_batch={rows}",), MORE_PASSES)
    if config.train.tokens_per_micro_batch is not None:
        yield Change((f"train.tokens_per_micro_batch={max(work.length, work.micro_tokens // 2)}",), MORE_PASSES)
    per_pass = config.teacher.rows_per_pass or work.rows
    if plan.teacher_shape is not None and work.micro_rows < per_pass:
        for rows in sorted({max(work.micro_rows, per_pass // 2), work.micro_rows}, reverse=True):
            yield Change((f"teacher.rows_per_pass={rows}",), "the teacher is gathered once for each pass")
    if not config.student.gradient_checkpointing:
        yield Change(("student.gradient_checkpointing=true",), "a third more arithmetic in the student")
    if config.generates:
        row_mib = max(1, work.row_tokens * 4 * plan.student_shape.kv_width * plan.student_shape.layers // 2**20)
        yield Change((f"rollout.cache_mib={max(64, 8 * row_mib)}",), "fewer texts are generated at a time")
        if config.rollout.gather != "never":
            yield Change(("rollout.gather=never",), "each token of a text gathers the student again")
    for role in ("teacher", "student"):
        if getattr(config, role).sharding == "resident":
            yield Change((f"{role}.sharding=sharded",), "weights are gathered layer by layer")
    if plan.teacher_shape is not None and config.teacher.ds_config != OFFLOADED and not machine.kind.is_cpu:
        yield Change((f"teacher.ds_config={OFFLOADED}",), "each pass of the teacher reads its shard from the host")
    for more in (2, 4, 8):
        yield Change((), "more machines", nodes=more * machine.nodes)


def _tried(config: RunConfig, machine: Machine, change: Change, planned: Planner) -> Plan | None:
    """The plan with a change; None where the settings do not go together."""
    try:
        changed = config.with_overrides(list(change.settings))
        return planned(changed, machine if change.nodes is None else machine.with_nodes(change.nodes))
    except ValueError:
        return None
