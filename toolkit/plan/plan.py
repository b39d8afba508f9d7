"""The plan of a run: the layouts that settings allow are all planned, and of those that fit that with the most models
resident is taken."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from toolkit.plan.layout import RESIDENT, SHARDED
from toolkit.plan.machine import GIB, Machine
from toolkit.plan.memory import HOST, Layout, Memory, Part, peak
from toolkit.plan.roofline import Time, exposed_seconds, limit, step_seconds, times
from toolkit.plan.shape import ModelShape
from toolkit.plan.traffic import Collective, collectives
from toolkit.plan.work import Work
from toolkit.settings import ModelConfig, RunConfig
from toolkit.settings.ds_files import sharding_of_file

AUTO = "auto"


class Advice(NamedTuple):
    """A change that was planned. saved: bytes at the peak; seconds: of a step with it, where nothing overlaps. fits: it
    is enough by itself."""

    change: str
    costs: str
    saved: float
    seconds: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run takes on each rank, how long a step is, and how its models are held.

    student, teacher: "resident" or "sharded" ("" without a teacher). gather: "always" or "never". why: one line.
    exposed_seconds: of a step where collectives and ZeRO-3's hooks hide behind nothing. together: settings that make a
    plan fit in which no change does by itself; None where it fits, or where none were found.
    """

    config: RunConfig
    machine: Machine
    teacher_shape: ModelShape | None
    student_shape: ModelShape
    layout: Layout
    work: Work
    parts: tuple[Part, ...]
    moved: tuple[Collective, ...]
    times: tuple[Time, ...]
    exposed_seconds: float
    why: str = ""
    advice: tuple[Advice, ...] = ()
    together: tuple[str, ...] | None = None

    @property
    def student(self) -> str:
        """How the student is held through a step."""
        return self.layout.student

    @property
    def teacher(self) -> str:
        """How the teacher is held."""
        return self.layout.teacher if self.teacher_shape is not None else ""

    @property
    def gather(self) -> str:
        """Whether the whole student is on every rank while it generates."""
        return self.layout.gather

    @cached_property
    def peak(self) -> tuple[str, float]:
        """The phase with the most bytes of a rank's device, and how many."""
        return peak(list(self.parts))

    @cached_property
    def host_bytes(self) -> float:
        """Most bytes of the node's memory that are one rank's."""
        return peak(list(self.parts), HOST)[1]

    @property
    def fits(self) -> bool:
        """Whether a rank has room for it, where its models are and in the node's memory; on a CPU both are one."""
        if self.machine.kind.is_cpu:
            return self.peak[1] + self.host_bytes <= self.machine.room
        return self.peak[1] <= self.machine.room and self.host_bytes <= self.machine.host_bytes

    @property
    def seconds(self) -> float:
        """Of a step on average."""
        return step_seconds(list(self.times))

    @property
    def limit(self) -> str:
        """What limits it: memory where it does not fit, else what most time goes to."""
        if not self.fits:
            return f"memory, in {self.peak[0]}"
        return limit(list(self.times))

    @property
    def steps(self) -> int | None:
        """Of the run; None where its number of rows decides, which settings do not say."""
        config = self.config.for_rows(None)
        return None if config.train.epochs is not None else config.train.steps

    @property
    def gpu_hours(self) -> float | None:
        """Of all steps; None where their number is not known."""
        return None if self.steps is None else self.steps * self.seconds * self.machine.world / 3600

    def table(self) -> str:
        """The whole plan as text."""
        from toolkit.plan.report import table

        return table(self)

    def to_json(self) -> dict[str, Any]:
        """The whole plan as plain values; bytes and seconds."""
        from toolkit.plan.report import to_json

        return to_json(self)

    def refusal(self) -> str | None:
        """Why a run cannot be made so, with the table; None where it fits."""
        if self.fits:
            return None
        return f"this run does not fit: {self.why}\n\n{self.table()}"


def plan_run(
    config: RunConfig, machine: Machine, teacher: ModelShape | None, student: ModelShape, *, advises: bool = True
) -> Plan:
    """Settles `auto` for teacher, student and rollout.gather together: of the layouts that the settings allow and that
    fit, the one with most models resident, the student before the teacher, and with the faster step where collectives
    and hooks hide behind nothing. Where none fits, the smallest.

    teacher: None where none is loaded. advises: what to change is planned too, where it does not fit. Raises ValueError
    for a DeepSpeed file that cannot be read, and for a batch that does not divide among the ranks.
    """
    work, element = Work.of(config, machine.world), element_bytes(config, machine)
    plans = [
        _planned(Memory(config, machine, teacher, student, layout, work, element))
        for layout in layouts(config, teacher)
    ]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        best = min(plans, key=lambda plan: plan.peak[1] + max(0, plan.host_bytes - machine.host_bytes))
    else:
        best = max(fitting, key=_preference)
    best = dataclasses.replace(best, why=_why(best, plans))
    if best.fits or not advises:
        return best
    from toolkit.plan.advice import advise

    advice, together = advise(best, lambda c, m: plan_run(c, m, teacher, student, advises=False))
    return dataclasses.replace(best, advice=tuple(advice), together=together)


def _preference(plan: Plan) -> tuple[int, bool, float]:
    """Resident models come before the roofline's seconds: what ZeRO-3 costs beside bytes, waiting for each layer and
    the host's work for it, is more than the few per cent that these may differ by (docs/speed.md)."""
    return plan.layout.count(RESIDENT), plan.layout.student == RESIDENT, -plan.exposed_seconds


def plan_of(config: RunConfig, machine: Machine, init: Any = None) -> Plan:
    """`plan_run` of the models that the settings name. init: what a stage before the run cuts out of the teacher, which
    is then the student. Raises ValueError where a configuration is not to be had."""
    teacher = ModelShape.of_settings(config.teacher) if config.has_teacher else None
    student = ModelShape.of_settings(config.student if init is None else config.teacher, init)
    return plan_run(config, machine, teacher, student)


def element_bytes(config: RunConfig, machine: Machine) -> int:
    """Of a number in the run's precision."""
    if config.precision != AUTO:
        return {"bf16": 2, "fp32": 4}[config.precision]
    if not machine.kind.is_cpu:
        return 2
    from toolkit.divergences.products import cpu_has_bf16_products

    return 2 if cpu_has_bf16_products() else 4


def layouts(config: RunConfig, teacher: ModelShape | None) -> Iterator[Layout]:
    """Those that the settings allow."""
    of_student, of_teacher = _allowed(config.student), [SHARDED]
    if teacher is not None:
        of_teacher = _allowed(config.teacher)
    for student, held in itertools.product(of_student, of_teacher):
        # Where nothing is partitioned, or nothing generates, there is nothing to gather.
        is_partitioned = student == SHARDED or (teacher is not None and held == SHARDED)
        gathers = ["always"]
        if config.rollout.gather != AUTO:
            gathers = [config.rollout.gather]
        elif is_partitioned and config.generates:
            gathers = ["always", "never"]
        for gather in gathers:
            yield Layout(student, held, gather)


def _allowed(model: ModelConfig) -> list[str]:
    """A file by which its user has decided how weights are kept is obeyed."""
    chosen = sharding_of_file(model.ds_config) if model.sharding == AUTO else model.sharding
    return [RESIDENT, SHARDED] if chosen is None else [chosen]


def _planned(memory: Memory) -> Plan:
    moved = collectives(memory)
    found = times(memory, moved)
    return Plan(
        config=memory.config, machine=memory.machine, teacher_shape=memory.teacher, student_shape=memory.student,
        layout=memory.layout, work=memory.work, parts=tuple(memory.parts()), moved=tuple(moved),
        times=tuple(found), exposed_seconds=exposed_seconds(memory, found),
    )  # fmt: skip


def _why(best: Plan, plans: list[Plan]) -> str:
    """One line for the run's log."""
    phase, bytes_ = best.peak
    room, machine = best.machine.room, best.machine
    held = f"student {best.student}"
    if best.teacher:
        held += f", teacher {best.teacher}"
    if best.config.generates:
        held += f", rollout.gather {best.gather}"
    at = f"{bytes_ / GIB:.3g} of {room / GIB:.3g} GiB of a rank at the peak ({phase})"
    if not best.fits:
        least = "the least of all layouts" if len(plans) > 1 else "the only layout that the settings allow"
        host = f", and {best.host_bytes / GIB:.2f} GiB of the node's memory where it may take "
        host += f"{machine.host_bytes / GIB:.2f}"
        return f"{held} takes {at}{host if best.host_bytes > machine.host_bytes else ''}, {least}"
    # What each choice takes and gives, beside the layout in which it alone is made the other way.
    told = []
    for role in best.layout._fields:
        turned = [plan for plan in plans if _differs_in(plan.layout, best.layout) == [role]]
        if turned and getattr(best, role) and (role != "gather" or best.config.generates):
            other = turned[0]
            more, slower = (other.peak[1] - bytes_) / GIB, other.exposed_seconds - best.exposed_seconds
            no_room = "" if other.fits else ", which does not fit"
            told.append(f"{role} {getattr(other.layout, role)}: {more:+.2f} GiB{no_room}, {slower:+.3g} s a step")
    return f"{held}: {at}" + (f" ({'; '.join(told)})" if told else ", as the settings say")


def _differs_in(one: Layout, other: Layout) -> list[str]:
    return [name for name, a, b in zip(Layout._fields, one, other, strict=True) if a != b]
