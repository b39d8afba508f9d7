"""Bytes of one rank, by part and by phase of a step. The formulas are written out in docs/scale.md.

What is there always, and beside it what each phase adds: the teacher's pass, the student's forward pass with its loss,
the begin of its backward pass, the time when its gradients are sent, the optimizer's step, generation, and the answers
of a validation. The peak is the largest phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from toolkit.plan.layout import RESIDENT, SHARDED, Sharding, bucket_fill, kept_for_backward, share
from toolkit.plan.machine import Machine
from toolkit.plan.shape import ModelShape, Weight
from toolkit.plan.work import Work
from toolkit.settings import NO_DIVERGENCE, RunConfig

ALWAYS = "always"
TEACHER, FORWARD, BACKWARD, SENDING, STEP = "teacher", "forward and loss", "backward", "gradients sent", "optimizer"
GENERATION, ANSWERS = "generation", "teacher's answers"
PHASES = (TEACHER, FORWARD, BACKWARD, SENDING, STEP, GENERATION, ANSWERS)
DEVICE, HOST = "device", "host"
MIB = 2**20
FP32 = 4
TOKEN_BYTES = 4  # of a token in the replay buffer
ALL_PROMPTS = 10**9  # of a data set, whose size settings do not say
#: scores of a CPU's attention up to this size are written to memory (toolkit/models/attention.py)
MOST_SCORE_BYTES = 32 * MIB
SAMPLED = 3  # tiles of fp32 logits that sampling of a token needs at once
ADAM, SGD = 2, 0  # numbers that the optimizer keeps for each weight


class Part(NamedTuple):
    """Some bytes of a rank, and when and where they are there."""

    name: str
    bytes: float
    when: str = ALWAYS
    where: str = DEVICE


class Layout(NamedTuple):
    """How both models are held through a step, and the student while it generates: gather is "always" or "never"."""

    student: str
    teacher: str
    gather: str


@dataclass(frozen=True)
class Memory:
    """Counts the bytes of one rank for one layout."""

    config: RunConfig
    machine: Machine
    teacher: ModelShape | None
    student: ModelShape
    layout: Layout
    work: Work
    element: int  # bytes of a number in the run's precision

    # What both halves need to know.

    @property
    def is_cpu(self) -> bool:
        """Buffers take memory as they are filled there, and products have the CPU's dtypes."""
        return self.machine.kind.is_cpu

    @cached_property
    def of_student(self) -> Sharding:
        """The student's file; a resident one is trained by ZeRO-2 with its buckets."""
        return Sharding.of_model(self.config.student)

    @cached_property
    def of_teacher(self) -> Sharding:
        """The teacher's file."""
        return Sharding.of_model(self.config.teacher)

    @property
    def student_is_partitioned(self) -> bool:
        """Whether each rank keeps a part of the student's weights alone."""
        return self.layout.student == SHARDED and self.of_student.is_partitioned

    @property
    def teacher_is_partitioned(self) -> bool:
        """Whether each rank keeps a part of the teacher's weights alone."""
        return self.teacher is not None and self.layout.teacher == SHARDED and self.of_teacher.is_partitioned

    @cached_property
    def trained(self) -> list[Weight]:
        """What the optimizer updates: all of the student, or its adapters."""
        lora = self.config.student.lora
        if not lora.rank:
            return list(self.student.weights)
        targets, found = lora.target_modules, []
        for weight in self.student.weights:
            module = weight.name.removesuffix(".weight").rpartition(".")[2]
            if len(weight.shape) == 2 and weight.part and (not targets or module in targets):
                found += [
                    Weight(f"{weight.name}.{side}", (lora.rank, n)) for side, n in zip("ab", weight.shape, strict=True)
                ]
        return found

    @cached_property
    def trained_numel(self) -> int:
        """Their elements."""
        return sum(weight.numel for weight in self.trained)

    @cached_property
    def trained_share(self) -> int:
        """Those of one rank."""
        world = self.machine.world
        if self.layout.student == RESIDENT or not self.of_student.is_partitioned:
            return -(-self.trained_numel // world)
        return share(self.trained, world)

    @property
    def accumulator(self) -> int:
        """Bytes of a number in the sum of several micro-batches' gradients."""
        said = self.of_student.accumulates_fp32
        return FP32 if (self.work.micro_batches > 1 if said is None else said) else self.element

    @property
    def asks_teacher(self) -> bool:
        """Whether training steps make the teacher pass over their rows."""
        return self.teacher is not None and self.config.loss.divergence != NO_DIVERGENCE

    # The parts.

    def parts(self) -> list[Part]:
        """All of them; none is empty."""
        found = [*self._teacher(), *self._student(), *self._passes(), *self._loss(), *self._optimizer()]
        always = sum(part.bytes for part in found if part.when == ALWAYS and part.where == DEVICE)
        host = list(self._host())
        if self.is_cpu:  # one memory for both
            always += sum(part.bytes for part in host)
        found += [*self._generation(always), *host]
        return [part for part in found if part.bytes > 0]

    def _teacher(self) -> Iterator[Part]:
        shape, world = self.teacher, self.machine.world
        if shape is None:
            return
        element = self.element
        if not self.teacher_is_partitioned:
            yield Part("teacher's weights", element * shape.parameters)
            return
        file = self.of_teacher
        kept = share(shape.weights, world)
        yield Part("teacher's shard", element * kept, where=HOST if file.parameters_offloaded else DEVICE)
        if world > 1:
            yield Part("teacher's small weights, whole", element * sum(w.numel for w in file.persistent(shape)))
        if file.secondary > 1:
            yield Part("teacher's second shard (hpZ)", element * share(shape.weights, file.secondary))

    def _student(self) -> Iterator[Part]:
        shape, world, element, file = self.student, self.machine.world, self.element, self.of_student
        if not self.student_is_partitioned:
            yield Part("student's weights", element * shape.parameters)
        else:
            where = HOST if file.parameters_offloaded else DEVICE
            yield Part("student's shard", element * share(shape.weights, world), where=where)
            if world > 1:
                yield Part("student's small weights, whole", element * sum(w.numel for w in file.persistent(shape)))
        states = {"adamw": ADAM, "sgd": SGD}[self.config.optimizer.name]
        where = HOST if file.optimizer_offloaded else DEVICE
        yield Part("fp32 weights", FP32 * self.trained_share, where=where)
        yield Part("optimizer's states", FP32 * states * self.trained_share, where=where)
        # ZeRO-3 keeps room for gradients and a bucket between steps; ZeRO-2 makes both in the backward pass.
        if self.student_is_partitioned:
            yield Part("gradients", self.accumulator * self.trained_share, where=where)
            yield Part("bucket of gradients", element * self._bucket())

    def _bucket(self) -> int:
        """Elements of the bucket that gradients are sent from."""
        size = self.of_student.reduce_bucket
        return bucket_fill(self.trained, size) if self.is_cpu else size

    def _passes(self) -> Iterator[Part]:
        """Weights that are gathered and activations of the passes of both models."""
        work, element = self.work, self.element
        if self.teacher is not None and self.asks_teacher:
            yield Part("teacher's gathered layers", element * self.gathered_at_once(self.teacher), TEACHER)
            rows = math.ceil(work.pass_tokens / work.length)
            of_token = pass_bytes(self.teacher, element, self.written_scores(self.teacher, rows))
            yield Part("teacher's activations", work.pass_tokens * of_token, TEACHER)
            window = element * work.window * self.teacher.hidden
            for phase in (TEACHER, FORWARD, BACKWARD, SENDING, STEP):
                yield Part("teacher's hidden states", window, phase)
            if self.teacher_is_partitioned:
                for phase in (FORWARD, BACKWARD, SENDING, STEP):
                    yield Part("teacher's head, gathered", element * self.teacher.head, phase)
        for phase, left in ((FORWARD, 1.0), (BACKWARD, 1.0), (SENDING, self.left_when_sending())):
            yield Part("student's gathered weights", left * element * self.kept_numel(), phase)
            yield Part("student's activations", left * self.activation_bytes(), phase)

    def left_when_sending(self) -> float:
        """Share of the layers that the backward pass has still before it when the first full bucket is sent."""
        in_layers = sum(weight.numel for weight in self.trained if weight.part)
        before = min(self.student.head, self.of_student.reduce_bucket)  # the head's gradient comes first
        sent = max(0, bucket_fill(self.trained, self.of_student.reduce_bucket) - before)
        return max(0.0, 1 - sent / max(1, in_layers))

    def gathered_at_once(self, shape: ModelShape) -> int:
        """Elements of the largest layer, or of an embedding, twice: as they arrive, and laid out again; and what is
        fetched ahead. None where nothing is sharded, or all of it is on one rank."""
        file, is_partitioned = self.of_student, self.student_is_partitioned
        if shape is self.teacher:
            file, is_partitioned = self.of_teacher, self.teacher_is_partitioned
        if not is_partitioned or self.machine.world == 1:
            return 0
        outside = max((w.numel for w in shape.weights if not w.part), default=0)
        largest = max(shape.largest_layer, outside)
        return 2 * largest + min(file.prefetch, max(0, shape.parameters - largest))

    def kept_numel(self) -> int:
        """Elements of the student that are gathered when its loss is computed."""
        if not self.student_is_partitioned or self.machine.world == 1:
            return 0
        return kept_for_backward(self.student, self.of_student.reuse)

    def written_scores(self, shape: ModelShape, rows: int) -> int:
        """How many scores of a token each head writes down: all of its row's on a CPU in bf16, where they are few."""
        length = self.work.length
        written = self.element * rows * shape.heads * length**2
        is_written = self.is_cpu and self.element < FP32 and written <= MOST_SCORE_BYTES
        return length if is_written else 0

    def activation_bytes(self) -> float:
        """What the student's forward pass keeps for its backward pass, of one micro-batch."""
        shape, work, element = self.student, self.work, self.element
        one = work.micro_tokens * saved_bytes(shape, element, self.written_scores(shape, work.micro_rows))
        around = work.micro_tokens * (FP32 + 2 * element) * shape.hidden  # the last norm, and what the embedding made
        mask = element * work.micro_rows * work.length**2 if self.config.packs else 0
        if self.config.student.gradient_checkpointing:
            return one + shape.all_layers * work.micro_tokens * element * shape.hidden + around + mask
        return shape.all_layers * one + around + mask

    def _loss(self) -> Iterator[Part]:
        """Tiles, the head and its gradient, and the gradient of hidden states: all are there when the loss ends."""
        student, n, element = self.student, self.work.micro_responses, self.element
        yield Part("student's hidden states and their gradient", (2 * element + FP32) * n * student.hidden, FORWARD)
        tiles, is_single = self.tiles()
        yield Part("loss: tiles of logits", tiles, FORWARD)
        if not self.config.student.lora.rank:
            gradient = element if is_single else FP32
            yield Part("loss: gradient of the head", gradient * student.head, FORWARD)
            # Its scaled copy, in the head's dtype. On a CPU the factor is known to be 1, and there is none.
            more = 0 if self.is_cpu and gradient == element else element
            yield Part("gradient of the head", (gradient + more) * student.head, BACKWARD)

    def tiles(self) -> tuple[float, bool]:
        """(Bytes of the tiles, whether one holds all tokens of a micro-batch), as divergences/plan.py divides them."""
        import torch

        from toolkit.divergences.plan import make_plan, padded

        models = 1 + self.asks_teacher
        # Of a logit: fp32 on a GPU, and the gradient in bf16 beside it; on a CPU what its products return.
        logit = self.element if self.is_cpu else FP32
        gradient = 0 if logit == self.element else self.element
        vocabulary = min([self.student.vocabulary, *([self.teacher.vocabulary] if self.teacher else [])])
        plan = make_plan(
            n_tokens=self.work.micro_responses, v=vocabulary, element_bytes=models * logit + gradient, blocks=0,
            blocks_to_add=int(self.is_cpu and self.element < FP32), rows_buffered=False,
            device=torch.device("cpu" if self.is_cpu else "cuda"), budget_mib=self.config.loss.memory_budget_mib,
        )  # fmt: skip
        is_single = plan.tile_rows >= self.work.micro_responses
        tile = plan.tile_rows * padded(plan.tile_columns) * (models * logit + gradient)
        return tile + (0 if is_single else plan.block_bytes * int(self.is_cpu and self.element < FP32)), is_single

    def _sent(self) -> Iterator[Part]:
        """What the backward pass needs to send gradients: copies of what a bucket holds, and of a gradient too large
        for one, which for the most is the head's; and both in fp32 where they add up so."""
        element, own, file, world = self.element, self.trained_share, self.of_student, self.machine.world
        sizes = [weight.numel for weight in self.trained]
        fill = bucket_fill(self.trained, file.reduce_bucket)
        large = max((size for size in sizes if size > file.reduce_bucket), default=0)
        widest = max((size for size in sizes if size <= file.reduce_bucket), default=0)
        # ZeRO-3 widens the rank's part of what was sent, ZeRO-2 one parameter at a time, of those that are the rank's.
        of_bucket, of_large = fill / world, large / world
        if not self.student_is_partitioned:
            of_bucket, of_large = min(own, widest), min(own, large)
            yield Part("large gradient, as it is sent", element * large, BACKWARD)
        yield Part("bucket of gradients, as it is sent", element * fill, SENDING)
        if self.accumulator > element:
            yield Part("gradients in fp32", self.accumulator * of_large, BACKWARD)
            yield Part("gradients in fp32", self.accumulator * of_bucket, SENDING)

    def _optimizer(self) -> Iterator[Part]:
        """Buckets and gradients of a resident student, and the fp32 copy that the optimizer's step makes of a rank's
        share."""
        element, own, file = self.element, self.trained_share, self.of_student
        adds_fp32 = self.accumulator > element
        yield from self._sent()
        if not self.student_is_partitioned:
            # Buckets, and room for the rank's share of this micro-batch, are made where the backward pass begins. On a
            # CPU they take memory as they are filled.
            filled = 1 - self.left_when_sending() if self.is_cpu else 1
            buckets = 2 if file.overlaps and not self.is_cpu else 1
            for phase in (SENDING,) if self.is_cpu else (BACKWARD, SENDING):
                yield Part("buckets of gradients", buckets * element * self._bucket(), phase)
                if not adds_fp32:
                    yield Part("gradients of this micro-batch", filled * element * own, phase)
            for phase in (FORWARD, BACKWARD, SENDING, STEP) if self.work.micro_batches > 1 else (STEP,):
                yield Part("gradients, summed up", self.accumulator * own, phase)
        if file.optimizer_offloaded:
            return
        if adds_fp32 and not self.student_is_partitioned:
            return  # they are flat already, and what their norm reads is fp32
        # Flattened in the dtype in which they were summed up, then in fp32.
        again = self.accumulator if self.accumulator == FP32 else self.accumulator + FP32
        yield Part("gradients, flat and in fp32", again * own, STEP)

    def _generation(self, always: float) -> Iterator[Part]:
        """Of the student's text for training and of both models' answers in a validation. always: bytes beside it."""
        config, world = self.config, self.machine.world
        asked = math.ceil(max(config.validation.scored_rows, config.validation.samples) / world)
        fresh = self.work.generated_rows if config.schedule.policy != "off" and config.rollout.engine == "local" else 0
        if rows := max(fresh, asked):
            yield from self._speaking(self.student, GENERATION, rows, self.student_is_partitioned, always)
        if self.teacher is None:
            return
        # The teacher's own text is made of all prompts at once, as many as the cache has room for.
        if rows := ALL_PROMPTS if config.data.responses == "teacher" else asked:
            yield from self._speaking(self.teacher, ANSWERS, rows, self.teacher_is_partitioned, always)

    def _speaking(
        self, shape: ModelShape, phase: str, rows: int, is_partitioned: bool, always: float
    ) -> Iterator[Part]:
        """Weights, cache and logits while a model generates."""
        work, element, settings = self.work, self.element, self.config.rollout
        weights, packed, is_whole = 0, 0, not is_partitioned or self.layout.gather == "always"
        if is_partitioned and self.machine.world > 1:  # one rank has all parts, and copies none
            weights = element * (shape.parameters if is_whole else self.gathered_at_once(shape))
            yield Part("whole model, gathered" if is_whole else "gathered layers", weights, phase)
        if self.is_cpu and is_whole:  # `packed_weights`: linear layers again, in another order
            packed = element * packed_numel(shape)
            yield Part("weights, packed for products of few rows", packed, phase)
        # As many rows as the cache may have bytes for, which is half of what is free unless settings say it; and where
        # memory runs out, generation halves them.
        row = max(1, element * 2 * shape.kv_width * shape.layers * work.row_tokens)
        passes, logits = work.prompt_tokens * pass_bytes(shape, element), SAMPLED * FP32 * shape.vocabulary
        free = self.machine.memory_bytes - always - weights - packed
        budget = settings.cache_mib * MIB if settings.cache_mib else free / 2
        fit = min(budget / row, (free - self.machine.memory_bytes + self.machine.room) / (row + passes + logits))
        rows = min(rows, settings.rows_at_once or rows, max(1, int(fit)))
        yield Part("key-value cache", rows * row, phase)
        yield Part("activations of prompts", rows * passes, phase)
        yield Part("logits of sampled tokens", rows * logits, phase)

    def _host(self) -> Iterator[Part]:
        if self.config.schedule.policy != "off":
            texts = math.ceil(self.config.rollout.capacity / self.machine.world)
            yield Part("replay buffer", texts * self.work.length * TOKEN_BYTES, where=HOST)
        if self.of_student.optimizer_offloaded:
            yield Part("gradients in fp32", FP32 * self.trained_share, where=HOST)


def packed_numel(shape: ModelShape) -> int:
    """Weights of all linear layers, the head included."""
    return shape.head + sum(w.numel for w in shape.weights if w.part and len(w.shape) > 1)


def pass_bytes(shape: ModelShape, element: int, scores: int = 0) -> float:
    """Of a token in a pass that keeps nothing: the widest place of a layer, between the MLP's matrices, or its scores
    where attention writes them down, twice."""
    inside = 3 if shape.is_gated else 2
    attention = 2 * element * shape.heads * scores + element * (2 * shape.heads * shape.head_dim + 2 * shape.kv_width)
    return max(element * inside * shape.mlp, attention if scores else 0) + element * 3 * shape.hidden


def saved_bytes(shape: ModelShape, element: int, scores: int = 0) -> float:
    """Of a token in one layer, what autograd keeps for its backward pass. Transformers' own layers, attention by
    scaled_dot_product_attention, or by products that write down so many `scores` of a token."""
    hidden, heads = shape.hidden, shape.heads * shape.head_dim
    if shape.is_gated:  # RMSNorm computes in fp32: its input so, and what it made in the model's dtype
        norms = 2 * (FP32 + element) * hidden
        mlp = 4 * element * shape.mlp  # gate, what the activation made of it, up, their product
    else:  # LayerNorm keeps its input; an activation's input and output
        norms = 2 * element * hidden
        mlp = (6 if shape.family == "gpt2" else 2) * element * shape.mlp  # gelu_new is made of pieces
    # Queries, keys, values, the output, and its statistics or probabilities.
    attention = element * (2 * heads + 2 * shape.kv_width) + shape.heads * (element * scores if scores else FP32)
    inputs = 2 * element * hidden  # of the linear layers behind the two norms
    return norms + inputs + attention + mlp


def by_phase(parts: list[Part], where: str = DEVICE) -> dict[str, float]:
    """Bytes in each phase that has any of its own, with what is always there; ALWAYS where none has."""
    always = sum(part.bytes for part in parts if part.when == ALWAYS and part.where == where)
    found = {ALWAYS: always}
    for phase in PHASES:
        own = [part.bytes for part in parts if part.when == phase and part.where == where]
        if own:
            found[phase] = always + sum(own)
    return found


def peak(parts: list[Part], where: str = DEVICE) -> tuple[str, float]:
    """The phase with the most bytes, and how many."""
    found = by_phase(parts, where)
    phase = max(found, key=lambda name: found[name])
    return phase, found[phase]
