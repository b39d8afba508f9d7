"""Bytes of each collective of an optimizer step, inside a node and between nodes.

A collective's payload is the whole tensor that it makes or takes. Of an all-gather or a reduce-scatter each rank gets
what the other ranks have, of an all-reduce twice that. What comes from other nodes enters a node once, through all of
its ports together, and goes on inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from toolkit.plan.layout import kept_for_backward, share
from toolkit.plan.machine import Machine
from toolkit.plan.memory import FORWARD, GENERATION, SENDING, STEP, TEACHER, Memory
from toolkit.plan.shape import ModelShape, Weight

GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
TIMES = {GATHER: 1, SCATTER: 1, REDUCE: 2}


class Collective(NamedTuple):
    """What one kind of collective moves in a step. payload: bytes, over the whole step. in_node: only the ranks of a
    node take part."""

    name: str
    kind: str
    phase: str
    payload: float
    in_node: bool = False

    def received(self, machine: Machine) -> tuple[float, float]:
        """Bytes that a rank receives from its own node and from others."""
        nodes, ranks = (1 if self.in_node else machine.nodes), machine.ranks_per_node
        world, bytes_ = nodes * ranks, TIMES[self.kind] * self.payload
        between = bytes_ * (nodes - 1) / nodes / ranks
        return bytes_ * (world - 1) / world - between, between


def collectives(memory: Memory) -> list[Collective]:
    """Those of a step; of generation, those of a step that generates."""
    return [one for one in _all(memory) if one.payload > 0] if memory.machine.world > 1 else []


def _all(memory: Memory) -> Iterator[Collective]:
    element, work, world = memory.element, memory.work, memory.machine.world
    if memory.teacher is not None and memory.asks_teacher and memory.teacher_is_partitioned:
        shape, file = memory.teacher, memory.of_teacher
        # Its passes end with hidden states: a head that is no embedding too is gathered by itself, for the loss.
        sharded = _gathered(shape, set(file.persistent(shape)), world)
        sharded -= 0 if shape.is_tied else _padded(shape.head, world)
        in_node = file.secondary > 1
        payload = element * sharded * work.passes
        yield Collective("teacher's layers", GATHER, TEACHER, payload, in_node)
        yield Collective("teacher's head", GATHER, TEACHER, element * _padded(shape.head, world))
    student, file, count = memory.student, memory.of_student, work.micro_batches
    trained = sum(_padded(weight.numel, world) for weight in memory.trained)
    if memory.student_is_partitioned:
        small = file.persistent(student)
        sharded = _gathered(student, set(small), world)
        kept = min(sharded, kept_for_backward(student, file.reuse))
        yield Collective("student's weights, forward", GATHER, FORWARD, element * sharded * count)
        yield Collective("student's weights, backward", GATHER, SENDING, element * (sharded - kept) * count)
        yield Collective("gradients", SCATTER, SENDING, element * trained * count)
        yield Collective("small weights after the step", GATHER, STEP, element * sum(w.numel for w in small))
    else:
        yield Collective("gradients", REDUCE, SENDING, element * memory.trained_numel * count)
        yield Collective("weights after the step", GATHER, STEP, element * memory.trained_numel)
    if memory.config.schedule.policy != "off" and memory.config.rollout.engine == "local":
        yield from _of_generation(memory)


def _of_generation(memory: Memory) -> Iterator[Collective]:
    if not memory.student_is_partitioned:
        return
    shape, world = memory.student, memory.machine.world
    whole = _gathered(shape, set(memory.of_student.persistent(shape)), world)
    # In step with the others each token is a pass, and each pass gathers all layers.
    passes = 1 if memory.layout.gather == "always" else 1 + memory.work.new_tokens
    yield Collective("student, to generate", GATHER, GENERATION, memory.element * whole * passes)
    if memory.layout.gather == "always":
        # Hooks are put back afterwards, and forget what is used again soon: the next micro-batch keeps nothing.
        kept = min(whole, kept_for_backward(shape, memory.of_student.reuse))
        yield Collective("student's weights, backward after it", GATHER, GENERATION, memory.element * kept)


def _gathered(shape: ModelShape, persistent: set[Weight], world: int) -> int:
    """Elements that a pass through the model gathers."""
    return world * share([weight for weight in shape.weights if weight not in persistent], world)


def _padded(numel: int, world: int) -> int:
    return -(-numel // world) * world
