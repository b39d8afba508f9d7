"""The engine loop: one optimizer step, from prompts to weights, in the order in which it happens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from toolkit import distributed
from toolkit.batch import Example, make_window
from toolkit.config import RunConfig
from toolkit.data import PromptDataset
from toolkit.evaluation import Validation, Validator
from toolkit.models import Student, Teacher, Vocabulary
from toolkit.monitor import Monitor, PhaseTimer, peak_device_gib, peak_rss_gib
from toolkit.rollout.engine import GatheredRollout, SeededSampling, sequence_seed
from toolkit.rollout.replay import ReplayBuffer
from toolkit.rollout.schedule import Schedule, Source


@dataclass
class DistillationLoop:
    config: RunConfig
    vocabulary: Vocabulary
    dataset: PromptDataset
    teacher: Teacher
    student: Student
    schedule: Schedule
    replay: ReplayBuffer
    rollout: GatheredRollout
    validator: Validator
    monitor: Monitor
    timer: PhaseTimer
    source_counts: dict[str, int] = field(default_factory=lambda: {source.value: 0 for source in Source})
    tokens: int = 0

    def run(self) -> tuple[Validation, Validation]:
        """All steps; returns the validation before the first and after the last one."""
        initial = latest = self.validate(step=0)
        self.monitor.start()
        for step in range(self.config.train.steps):
            record = self.step(step)
            done = step + 1
            if done % self.config.validation.every_steps == 0 or done == self.config.train.steps:
                latest = self.validate(done)
                record["validation"] = latest._asdict()
            seconds = self.timer.take()
            step_time_s = sum(seconds.values()) - seconds.get("validation", 0.0)
            self.monitor.log_step(record | {"tokens_per_s": record["tokens"] / step_time_s, "seconds": seconds})
        return initial, latest

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; the returned metrics are of all ranks together."""
        source, examples = self.choose_examples(step)
        window = [
            batch.to(distributed.device())
            for batch in make_window(examples, self.config.train.micro_rows, self.vocabulary.pad_id)
        ]
        targets, tokens = distributed.sum_over_ranks(
            [sum(batch.num_targets for batch in window), sum(batch.num_tokens for batch in window)]
        )
        # deepspeed divides by micro-batches and averages over ranks; this undoes both and divides by tokens, once.
        token_weight = len(window) * distributed.world() / targets
        learning_rate = self.student.set_learning_rate(step)

        with self.timer.phase("teacher"):
            signals = self.teacher.hidden_states(window)
        sums = []
        with self.teacher.head() as head:
            for batch, hidden_NT in zip(window, signals, strict=True):
                with self.timer.phase("student"):
                    found = self.student.loss(batch, hidden_NT, head, token_weight)
                    self.student.engine.backward(found.loss)
                with self.timer.phase("optimizer"):
                    self.student.engine.step()
                sums.append(torch.stack([found.divergence_nats, found.cross_entropy_nats, found.agreements]).double())

        divergence, cross_entropy, agreements, rss_gib = distributed.sum_over_ranks(
            [*torch.stack(sums).sum(0).tolist(), peak_rss_gib()]  # read once, after all micro-batches are queued
        )
        self.source_counts[source.value] += 1
        self.tokens += int(tokens)
        loss = (divergence + self.config.loss.cross_entropy_weight * cross_entropy) / targets
        return {
            "step": step + 1,
            "loss": loss,
            "kl": divergence / targets,
            "ce": cross_entropy / targets,
            "top1_agreement": agreements / targets,
            "phi": self.schedule.phi,
            "source": source.value,
            "rollout_mode": self.rollout.last.mode if source is Source.GENERATE else None,
            "staleness_steps": self.replay.staleness(step) if source is not Source.DATASET else None,
            "tokens": int(tokens),
            "response_tokens": int(targets),
            "learning_rate": learning_rate,
            "grad_norm": float(self.student.engine.get_global_grad_norm() or 0.0),
            "peak_rss_gib": rss_gib,
            "peak_device_gib": peak_device_gib(),
        }

    def choose_examples(self, step: int) -> tuple[Source, list[Example]]:
        """This rank's share of the step's rows, and where they are from: data, buffer, or the student (Algorithm 1)."""
        rank, world = distributed.rank(), distributed.world()
        rows = self.config.train.batch_rows // world
        source = self.schedule.decide(step)
        if source is Source.REPLAY and not self.replay.is_ready(rows, step):
            source = Source.GENERATE  # the buffer is filled before it is drawn from; alike on all ranks
        examples = self.dataset.window_examples(step, rank, world, rows)
        if source is Source.DATASET:
            return source, examples
        if source is Source.GENERATE:
            settings = self.config.rollout
            first = rank * rows
            sampling = SeededSampling(
                self.config.max_new_tokens, settings.temperature, settings.top_p, settings.top_k,
                min_p=settings.min_p, repetition_penalty=settings.repetition_penalty,
                seeds=[sequence_seed(self.config.seed, step + 1, row) for row in range(first, first + rows)],
            )  # fmt: skip
            with self.timer.phase("rollout"):
                examples = self.rollout.complete([example.prompt for example in examples], sampling)
            self.replay.push(examples, step)
            if settings.train_on_fresh:
                return source, examples
        return source, self.replay.sample(rows, step)

    def validate(self, step: int) -> Validation:
        """Measures, and lets the schedule move phi: all ranks see the same number."""
        with self.timer.phase("validation"):
            found = self.validator.measure(self.student, self.teacher)
        self.schedule.observe_validation(step, found.kl_nats)
        return found
