"""The engine loop: one optimizer step, from prompts to weights, in the order in which it happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from toolkit import distributed
from toolkit.batch import Example, make_window
from toolkit.checkpoint import Checkpoint, Checkpoints
from toolkit.config import RunConfig
from toolkit.data import PromptDataset
from toolkit.evaluation import Validation, Validator
from toolkit.faults import GoOnLater, StepGuard, StopSignals
from toolkit.models import NoTeacher, Objective, Student, Teacher, Vocabulary
from toolkit.monitor import Monitor, PhaseTimer, peak_device_gib, peak_rss_gib
from toolkit.rollout.engine import GatheredRollout, SeededSampling, sequence_seed
from toolkit.rollout.replay import ReplayBuffer
from toolkit.rollout.schedule import Schedule, Source


@dataclass
class DistillationLoop:
    config: RunConfig
    vocabulary: Vocabulary
    dataset: PromptDataset
    teacher: Teacher | NoTeacher  # of training; the validator has its own
    student: Student
    schedule: Schedule
    replay: ReplayBuffer
    rollout: GatheredRollout
    validator: Validator
    monitor: Monitor
    timer: PhaseTimer
    checkpoints: Checkpoints
    signals: StopSignals
    guard: StepGuard
    run_state: Callable[[], dict[str, Any]] = dict  # what the run itself wants kept in a checkpoint
    watch: Callable[[str, int], None] = lambda phase, step: None  # told of each step as it begins
    done: int = 0  # optimizer steps
    initial: Validation | None = None
    latest: Validation | None = None
    asked_to_stop: bool = False
    source_counts: dict[str, int] = field(default_factory=lambda: {source.value: 0 for source in Source})
    tokens: int = 0

    def run(self) -> tuple[Validation, Validation]:
        """All steps that are left; returns the validation before the first and after the last one.

        Raises GoOnLater where a signal asked for it, after a checkpoint of the step that ended; ValueError where too
        many steps in a row were not finite.
        """
        if self.initial is None:
            self.initial = self.latest = self.validate(step=0)
        self.monitor.start()
        config, last = self.config, self.config.train.steps
        for step in range(self.done, last):
            record = self.step(step)
            self.done = step + 1
            if self.guard.gives_up:
                self.monitor.log_step(record)
                raise ValueError(self._diverged(step))
            if self.done % config.validation.every_steps == 0 or self.done == last:
                self.latest = self.validate(self.done)
                record["validation"] = self.latest._asdict()
            seconds = self.timer.take()
            step_time_s = sum(seconds.values()) - seconds.get("validation", 0.0) - seconds.get("checkpoint", 0.0)
            self.monitor.log_step(record | {"tokens_per_s": record["tokens"] / step_time_s, "seconds": seconds})
            every = config.checkpoint.every_steps
            if self.asked_to_stop or self.done == last or (every and self.done % every == 0):
                self.save()
            if self.asked_to_stop:
                raise GoOnLater(f"stopped by a signal after step {self.done} of {last}")
        return self.initial, self.latest

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; the returned metrics are of all ranks together."""
        self.watch("data", step + 1)
        source, examples = self.choose_examples(step)
        window = [
            batch.to(distributed.device())
            for batch in make_window(
                examples,
                self.config.train.micro_rows,
                self.vocabulary.pad_id,
                decoder_start_id=self.vocabulary.decoder_start_id,
            )
        ]
        targets, tokens = distributed.sum_over_ranks(
            [sum(batch.num_targets for batch in window), sum(batch.num_tokens for batch in window)]
        )
        # deepspeed divides by micro-batches and averages over ranks; this undoes both and divides by tokens, once.
        token_weight = len(window) * distributed.world() / targets
        learning_rate = self.student.set_learning_rate(step)

        with self.timer.phase("teacher"):
            signals = self.teacher.signals(window)
        objective = Objective.of(self.config.loss, on_student_text=source is not Source.DATASET)
        sums, objection = [], None
        with self.teacher.head() as head:
            for batch, signal in zip(window, signals, strict=True):
                with self.timer.phase("student"):
                    found = self.student.loss(batch, signal, head, objective, token_weight)
                    sums.append(
                        torch.stack([found.divergence_nats, found.cross_entropy_nats, found.agreements]).double()
                    )
                    if len(sums) == len(window):  # all of the step's losses are known, and nothing is taken yet
                        divergence, cross_entropy, agreements, rss_gib, stop, steps = distributed.sum_over_ranks(
                            [*torch.stack(sums).sum(0).tolist(), peak_rss_gib(), self.signals.received, step]
                        )
                        assert steps == step * distributed.world(), f"rank at step {step}, mean of ranks {steps}"
                        loss = (divergence + self.config.loss.cross_entropy_weight * cross_entropy) / targets
                        objection = self.guard.objection(loss)
                    # deepspeed leaves a step out, on all ranks, whose gradient is not finite on any
                    self.student.engine.backward(found.loss * float("nan") if objection else found.loss)
                with self.timer.phase("optimizer"):
                    self.student.engine.step()

        self.asked_to_stop = stop > 0
        taken = self.student.engine.was_step_applied()
        self.guard.record(loss, taken)
        if not taken:
            self._tell_skipped(step, source, examples, objection or "its gradient is not finite")
        self.source_counts[source.value] += 1
        self.tokens += int(tokens)
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
            "skipped_steps": self.guard.skipped,
            "peak_rss_gib": rss_gib,
            "peak_device_gib": peak_device_gib(),
        }

    def choose_examples(self, step: int) -> tuple[Source, list[Example]]:
        """This rank's share of the step's rows, and where they are from: data, buffer, or the student (Algorithm 1)."""
        rank, world = distributed.rank(), distributed.world()
        rows = self.config.train.batch_rows // world
        source = self.schedule.decide(step)
        # The buffer is filled before it is drawn from. Ranks agree: shards differ after a change of world size.
        if source is Source.REPLAY and not distributed.everywhere(self.replay.is_ready(rows, step)):
            source = Source.GENERATE
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
            found = self.validator.measure(self.student)
        self.schedule.observe_validation(step, found.ce_nats if found.kl_nats is None else found.kl_nats)
        return found

    def save(self) -> None:
        """A checkpoint of the steps done. A failure ends the run or is only told, by checkpoint.on_failure."""
        with self.timer.phase("checkpoint"):
            try:
                state = {
                    "config": self.config.to_dict(),
                    "metrics_bytes": distributed.together(self.monitor.position),
                    "loop": self.state_dict(),
                    **self.run_state(),
                }
                self.checkpoints.save(self.done, self.student.engine, self.replay, state)
            except ValueError as error:
                if self.config.checkpoint.on_failure == "stop":
                    raise
                self.monitor.note(f"warning: {error}; training goes on, the older checkpoints stand")

    def state_dict(self) -> dict[str, Any]:
        """What the loop knows beside weights, replay and generators; plain JSON types."""
        return {
            "done": self.done,
            "initial": self.initial,
            "latest": self.latest,
            "source_counts": self.source_counts,
            "tokens": self.tokens,
            "schedule": self.schedule.state_dict(),
            "guard": self.guard.state_dict(),
            "seconds": self.timer.totals,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done, self.tokens, self.source_counts = state["done"], state["tokens"], dict(state["source_counts"])
        self.initial, self.latest = Validation(*state["initial"]), Validation(*state["latest"])
        self.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["guard"])
        self.timer.totals = dict(state["seconds"])

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from `checkpoint`, which is checked and of this run."""
        self.load_state_dict(checkpoint.state["loop"])
        checkpoint.load_student(self.student.engine)
        distributed.together(lambda: checkpoint.load_replay(self.replay))
        distributed.together(lambda: checkpoint.load_rng(self.config.seed, self.done))

    def _tell_skipped(self, step: int, source: Source, examples: list[Example], reason: str) -> None:
        """The batch of a step that was not taken goes to a file: it is what has to be looked at."""
        folder = self.config.run_dir / "skipped" / f"step-{step + 1:08d}"
        rows = [{"prompt_length": e.prompt_length, "tokens": e.tokens.tolist()} for e in examples]
        self.monitor.note(
            f"warning: step {step + 1} is skipped, {reason} ({self.guard.skipped_in_row} in a row, "
            f"{self.guard.skipped} in all); its rows are in {folder}"
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{distributed.rank():05d}.json").write_text(
                json.dumps({"step": step + 1, "source": source.value, "reason": reason, "rows": rows})
            )
        except OSError as error:
            self.monitor.note(f"warning: the rows of step {step + 1} could not be written: {error}")

    def _diverged(self, step: int) -> str:
        return (
            f"steps up to {step + 1} were skipped, {self.guard.skipped_in_row} in a row "
            f"(faults.max_skipped_steps = {self.config.faults.max_skipped_steps}): loss or gradient is not finite. "
            f"The rows are in {self.config.run_dir / 'skipped'}, the last good weights in {self.checkpoints.folder}. "
            "Lower optimizer.lr, set optimizer.max_grad_norm, or take the rows out"
        )
