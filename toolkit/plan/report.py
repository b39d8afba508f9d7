"""A plan as text, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.plan.machine import GIB
from toolkit.plan.memory import ALWAYS, DEVICE, HOST, by_phase
from toolkit.tables import format_table

if TYPE_CHECKING:
    from toolkit.plan.plan import Plan

MB = 1e6


def table(plan: Plan) -> str:
    """Memory by part, collectives, times, what they come to, and what to change where it does not fit."""
    parts = [_heading(plan), _memory(plan)]
    if plan.moved:
        parts.append(_traffic(plan))
    parts += [_time(plan), _summary(plan)]
    if plan.advice:
        parts.append(_advice(plan))
    return "\n\n".join(parts)


def _heading(plan: Plan) -> str:
    machine, shapes = plan.machine, [("student", plan.student_shape)]
    if plan.teacher_shape is not None:
        shapes.insert(0, ("teacher", plan.teacher_shape))
    models = ", ".join(f"{role} {shape.parameters / 1e9:.3g} B parameters ({shape.family})" for role, shape in shapes)
    return (
        f"{plan.config.name}: {models}\n{machine.nodes} node{'s' * (machine.nodes > 1)} of {machine.ranks_per_node} x "
        f"{machine.kind.name}, {machine.memory_bytes / GIB:.1f} GiB for the tensors of a rank"
    )


def _memory(plan: Plan) -> str:
    parts, phase = list(plan.parts), plan.peak[0]
    rows: list[list[Any]] = []
    for part in parts:
        if part.when in (ALWAYS, phase) or part.where == HOST:
            when = part.when if part.where == DEVICE else f"{part.when}, on the host"
            rows.append([part.name, when, part.bytes / GIB])
    rows.append([f"**peak, in {phase}**", "", plan.peak[1] / GIB])
    others = [[f"peak of {name}", "", bytes_ / GIB] for name, bytes_ in by_phase(parts).items() if name != phase]
    if plan.host_bytes:
        others.append(["host memory of a rank", "", plan.host_bytes / GIB])
    return format_table(["memory of a rank", "when", "GiB"], rows + others)


def _traffic(plan: Plan) -> str:
    rows: list[list[Any]] = []
    for one in plan.moved:
        inside, between = one.received(plan.machine)
        rows.append([one.name, one.kind, one.phase, one.payload / MB, (inside + between) / MB, between / MB])
    titles = ["collectives of a step", "kind", "phase", "tensors, MB", "received, MB", "from other nodes, MB"]
    return format_table(titles, rows)


def _time(plan: Plan) -> str:
    rows: list[list[Any]] = [[*time[:5], time.seconds, time.limit, time.share] for time in plan.times]
    titles = ["seconds of a step", "arithmetic", "memory", "in the node", "between nodes", "the longest", "limited by"]
    return format_table([*titles, "share of steps"], rows)


def _summary(plan: Plan) -> str:
    tokens = plan.work.step_tokens * plan.machine.world / plan.seconds
    hours = "the number of steps follows from the data"
    if plan.gpu_hours is not None:
        hours = f"{plan.steps:,} steps take {plan.gpu_hours:,.1f} {'rank' if plan.machine.kind.is_cpu else 'GPU'}-hours"
    fits = "It fits" if plan.fits else "It does not fit"
    return (
        f"{fits}: {plan.why}.\nA step takes {plan.seconds:.3g} s at best, {tokens:,.0f} tokens/s; {hours}. Limited by "
        f"{plan.limit}."
    )


def _advice(plan: Plan) -> str:
    rows = [
        [
            one.change,
            one.saved / GIB,
            f"{one.seconds / plan.exposed_seconds - 1:+.0%}",
            "yes" if one.fits else "no",
            one.costs,
        ]
        for one in plan.advice
    ]
    text = format_table(["to change, the cheapest first", "saves GiB", "time of a step", "then it fits", "costs"], rows)
    if plan.together:
        text += f"\n\nTogether these fit: {' '.join(plan.together)}"
    elif not any(one.fits for one in plan.advice):
        text += "\n\nNone of these is enough, nor all together: take more ranks, or smaller models."
    return text


def to_json(plan: Plan) -> dict[str, Any]:
    """Bytes of a rank, bytes of collectives, seconds."""
    machine, received = plan.machine, ("received_in_node", "received_between_nodes")
    return {
        "run": plan.config.name,
        "machine": {
            "nodes": machine.nodes, "ranks_per_node": machine.ranks_per_node, "device": machine.kind.name,
            "memory_bytes": machine.memory_bytes, "host_bytes": machine.host_bytes,
        },
        "student": plan.student, "teacher": plan.teacher, "gather": plan.gather, "fits": plan.fits, "why": plan.why,
        "parameters": {
            "student": plan.student_shape.parameters,
            "teacher": plan.teacher_shape.parameters if plan.teacher_shape else None,
        },
        "peak": {"phase": plan.peak[0], "bytes": plan.peak[1], "host_bytes": plan.host_bytes},
        "bytes_by_phase": by_phase(list(plan.parts)),
        "parts": [part._asdict() for part in plan.parts],
        "collectives": [
            one._asdict() | dict(zip(received, one.received(machine), strict=True))
            for one in plan.moved
        ],
        "times": [time._asdict() | {"seconds": time.seconds, "limit": time.limit} for time in plan.times],
        "step_seconds": plan.seconds, "steps": plan.steps, "gpu_hours": plan.gpu_hours, "limit": plan.limit,
        "advice": [one._asdict() for one in plan.advice],
        "together": None if plan.together is None else list(plan.together),
    }  # fmt: skip


def plot(plan: Plan, file: Path) -> None:
    """Memory by phase, stacked by part, below the line of what a rank has. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts = [part for part in plan.parts if part.where == DEVICE]
    phases = [name for name in by_phase(list(plan.parts)) if name != ALWAYS] or [ALWAYS]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    bottom = dict.fromkeys(phases, 0.0)
    colours = plt.get_cmap("tab20").colors
    for at, name in enumerate(dict.fromkeys(part.name for part in parts)):
        heights = [
            sum(p.bytes for p in parts if p.name == name and p.when in (ALWAYS, phase)) / GIB for phase in phases
        ]
        axes.bar(phases, heights, bottom=list(bottom.values()), label=name, color=colours[at % len(colours)], width=0.7)
        bottom = {phase: below + height for (phase, below), height in zip(bottom.items(), heights, strict=True)}
    axes.axhline(plan.machine.room / GIB, color="black", linestyle="--", linewidth=1, label="room for a plan")
    axes.set_ylabel("GiB of a rank")
    held = f"student {plan.student}, teacher {plan.teacher or 'none'}"
    axes.set_title(f"{plan.config.name}: {held}, {plan.machine.world} ranks")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=150)
    plt.close(figure)
