"""Seconds of a step by a roofline: each phase takes as long as the slowest of its arithmetic, its memory traffic and
its collectives, which overlap at best.

What is reached of a peak is stated below, not measured on the machine at hand: 45 % of the products' FLOP/s (what well
tuned training of dense models reports), 75 % of memory bandwidth, 70 % of links. A pass over one token of each row
reads all weights, and takes at least the time in which its kernels are launched.

Layouts are chosen by a less kind figure, `exposed_seconds`: collectives and the hooks of ZeRO-3 hide behind nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from toolkit.plan.machine import Machine
from toolkit.plan.memory import ANSWERS, FORWARD, GENERATION, SENDING, STEP, TEACHER, Memory
from toolkit.plan.shape import ModelShape
from toolkit.plan.traffic import Collective

FLOPS_REACHED, MEMORY_REACHED, LINKS_REACHED = 0.45, 0.75, 0.70
KERNELS_OF_A_LAYER = 14  # of a pass of one token a row, transformers' own layers
#: host time of ZeRO-3's hooks around one module in one pass, and the modules of a layer that have weights
HOOKS_S, MODULES_OF_A_LAYER = 5e-5, 9
#: bytes of a trained weight in an optimizer's step: read gradient, master and two states, write three and the weight
STEP_BYTES = 30
STUDENT = "student"
#: what is looked up for a phase's collectives
PHASES_OF = {TEACHER: (TEACHER,), STUDENT: (FORWARD, SENDING), STEP: (STEP,), GENERATION: (GENERATION, ANSWERS)}


class Time(NamedTuple):
    """Seconds of a phase if each of these were all there is to it. steps: share of the steps that have this phase."""

    phase: str
    arithmetic: float
    memory: float
    in_node: float
    between_nodes: float
    share: float = 1.0

    @property
    def seconds(self) -> float:
        """Of one step that has the phase."""
        return max(self[1:5])

    @property
    def limit(self) -> str:
        """Which of the four it is."""
        names = ("arithmetic", "memory bandwidth", "links in a node", "network between nodes")
        return max(zip(self[1:5], names, strict=True))[1]


def times(memory: Memory, moved: list[Collective]) -> list[Time]:
    """Of the phases that a step has."""
    work, machine, student, teacher = memory.work, memory.machine, memory.student, memory.teacher
    found = []
    if teacher is not None and memory.asks_teacher:
        flops = forward_flops(teacher, work.teacher_tokens, work.length) + 2 * work.window * teacher.head
        bytes_ = memory.element * teacher.parameters * work.passes
        time = _time(machine, TEACHER, flops, bytes_, moved)
        if memory.teacher_is_partitioned and memory.of_teacher.parameters_offloaded:
            read = bytes_ / machine.world / (machine.kind.host_rate * LINKS_REACHED)
            time = time._replace(in_node=time.in_node + read)
        found.append(time)
    # Forward and backward pass are three times the forward one, and once more where activations are made again.
    factor = 4 if memory.config.student.gradient_checkpointing else 3
    flops = factor * forward_flops(student, work.step_tokens, work.length) + 6 * work.step_responses * student.head
    tiles = work.step_responses * student.vocabulary * (2 if memory.element == 2 else 4) * 6
    bytes_ = 3 * memory.element * student.parameters * work.micro_batches + tiles
    found.append(_time(machine, STUDENT, flops, bytes_, moved))
    found.append(_time(machine, STEP, 0, STEP_BYTES * memory.trained_share, moved))
    if work.generating:
        found.append(_generation(memory, moved))
    return found


def _generation(memory: Memory, moved: list[Collective]) -> Time:
    work, shape, machine = memory.work, memory.student, memory.machine
    rows = work.generated_rows
    flops = forward_flops(shape, rows * (work.prompt_tokens + work.new_tokens), work.length)
    flops += 2 * rows * work.new_tokens * shape.head
    # Each pass reads the weights, and what the cache holds by then, half of it on average.
    cache = memory.element * 2 * shape.kv_width * shape.layers * rows * work.row_tokens / 2
    bytes_ = work.new_tokens * (memory.element * (sum(shape.parts.values()) + shape.head) + cache)
    time = _time(machine, GENERATION, flops, bytes_, moved)
    launches = work.new_tokens * shape.layers * KERNELS_OF_A_LAYER * machine.kind.launch_s
    return time._replace(memory=max(time.memory, launches), share=work.generating)


def forward_flops(shape: ModelShape, tokens: int, length: int) -> float:
    """Of a forward pass without the head: two for each weight and token, and causal attention's two products."""
    attention = 2 * length * shape.heads * shape.head_dim * shape.all_layers
    return tokens * (2 * shape.active + attention)


def _time(machine: Machine, phase: str, flops: float, bytes_: float, moved: list[Collective]) -> Time:
    device = machine.kind
    got = [one.received(machine) for one in moved if one.phase in PHASES_OF[phase]]
    return Time(
        phase=phase, arithmetic=flops / (device.flops * FLOPS_REACHED),
        memory=bytes_ / (device.memory_rate * MEMORY_REACHED),
        in_node=sum(inside for inside, _ in got) / (device.link_rate * LINKS_REACHED),
        between_nodes=sum(between for _, between in got) / (device.network_rate * LINKS_REACHED),
    )  # fmt: skip


def step_seconds(found: list[Time]) -> float:
    """Of a step on average over the run."""
    return sum(time.seconds * time.share for time in found)


def exposed_seconds(memory: Memory, found: list[Time]) -> float:
    """Of a step on average, where nothing overlaps."""
    work, passes = memory.work, 0
    if memory.teacher is not None and memory.teacher_is_partitioned and memory.asks_teacher:
        passes += memory.teacher.all_layers * work.passes  # its layers are gathered whole, with one hook
    if memory.student_is_partitioned:
        of_one = 3 if memory.config.student.gradient_checkpointing else 2
        passes += MODULES_OF_A_LAYER * memory.student.all_layers * of_one * work.micro_batches
    computed = sum(max(t.arithmetic, t.memory) * t.share for t in found)
    return computed + HOOKS_S * passes + sum((t.in_node + t.between_nodes) * t.share for t in found)


def limit(found: list[Time]) -> str:
    """What the most time of a step goes to, and in which phase."""
    largest = max(found, key=lambda time: time.seconds * time.share)
    share = largest.seconds * largest.share / max(1e-30, step_seconds(found))
    return f"{largest.limit} in {largest.phase} ({share:.0%} of a step)"
