"""The engine loop: one optimizer step, from prompts to weights, in the order in which it happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from toolkit.batch import Example, TokenBatch, make_window
from toolkit.data import PromptDataset, TextStream
from toolkit.evaluation import Best, Validation, Validator
from toolkit.models import NoTeacher, Student, Teacher, Vocabulary, objective_of
from toolkit.ranks import collectives
from toolkit.ranks.memory import peak_device_gib, peak_rss_gib
from toolkit.ranks.signals import GoOnLater, StopSignals
from toolkit.rollout.local import Rollout, SeededSampling, sequence_seed
from toolkit.rollout.replay import ReplayBuffer
from toolkit.rollout.schedule import Schedule, Source
from toolkit.run.checkpoint import Checkpoint, Checkpoints
from toolkit.run.guard import StepGuard
from toolkit.run.monitor import Monitor
from toolkit.run.timer import PhaseTimer
from toolkit.settings import RunConfig
from toolkit.teachers.cache import CachedTeacher


@dataclass
class DistillationLoop:
    config: RunConfig
    vocabulary: Vocabulary
    dataset: PromptDataset | TextStream
    teacher: Teacher | NoTeacher | CachedTeacher  # of training; the validator has its own
    student: Student
    schedule: Schedule
    replay: ReplayBuffer
    rollout: Rollout
    validator: Validator
    monitor: Monitor
    timer: PhaseTimer
    checkpoints: Checkpoints
    signals: StopSignals
    guard: StepGuard
    cached: CachedTeacher | None = None  # in the teacher's place where a step trains on the data
    text: PromptDataset | TextStream | None = None  # plain text learned beside the distillation
    run_state: Callable[[], dict[str, Any]] = dict  # what the run itself wants kept in a checkpoint
    watch: Callable[[str, int], None] = lambda phase, step: None  # told of each step as it begins
    export_best: Callable[[], None] = lambda: None
    done: int = 0  # optimizer steps
    initial: Validation | None = None
    latest: Validation | None = None
    best: Best | None = None
    asked_to_stop: bool = False
    has_saved: bool = False  # a checkpoint, since this start
    save_failure: str = ""  # of the last save that failed
    source_counts: dict[str, int] = field(default_factory=lambda: {source.value: 0 for source in Source})
    tokens: int = 0
    windows_ahead: int = 0  # GENERATE steps whose text an earlier one has made

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
            self.signals.in_vain = not self.has_saved
            if self.guard.gives_up:
                self.monitor.log_step(record)
                raise ValueError(self._diverged(step))
            if self.done % config.validation.every_steps == 0 or self.done == last:
                self.latest = self.validate(self.done)
                record["validation"] = self.latest.metrics()
            seconds = self.timer.take()
            beside = ("validation", "checkpoint", "export")
            step_time_s = sum(seconds.values()) - sum(seconds.get(name, 0.0) for name in beside)
            self.monitor.log_step(record | {"tokens_per_s": record["tokens"] / step_time_s, "seconds": seconds})
            every = config.checkpoint.every_steps
            if self.asked_to_stop or self.done == last or (every and self.done % every == 0):
                self.save()
            if self.asked_to_stop:
                self.go_on_later(f"after step {self.done} of {last}")
        return self.initial, self.latest

    def go_on_later(self, where: str) -> None:
        """Raises GoOnLater: a signal has stopped the run, and the next start goes on from the newest checkpoint.

        Raises ValueError where nothing of what this start did was kept: the next one would only do it again, and a job
        that is requeued would do so for ever.
        """
        if self.save_failure and not self.has_saved:
            raise ValueError(
                f"stopped by a signal {where}, and what was done since the start is lost: {self.save_failure}. Make "
                "room there or change the folder (output_dir), and give the same command again"
            )
        raise GoOnLater(f"stopped by a signal {where}")

    def stop_if_asked(self, where: str) -> None:
        """As `go_on_later`, where a signal came after the last step. Collective."""
        if self.signals.agreed():
            self.go_on_later(where)

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; the returned metrics are of all ranks together."""
        self.watch("data", step + 1)
        source, examples = self.choose_examples(step)
        data = self.config.data
        window = self._window(examples, data.max_length if data.packing else None)
        text_examples = self.choose_text(step)
        text = self._window(text_examples)
        targets, tokens, text_targets, text_tokens = collectives.sum_over_ranks(
            [sum(getattr(batch, n) for batch in part) for part in (window, text) for n in ("num_targets", "num_tokens")]
        )
        # deepspeed divides by a number of micro-batches, the config's, and averages over ranks; this undoes both and
        # divides by tokens, once.
        shares = self.student.engine.gradient_accumulation_steps() * collectives.world()
        token_weights = [shares / targets] * len(window)
        token_weights += [self.config.text.weight * shares / text_targets for _ in text]
        learning_rate = self.student.set_learning_rate(step)

        teacher = self.cached if self.cached and source is Source.DATASET else self.teacher
        with self.timer.phase("teacher"):
            signals = [*teacher.signals(window), *(None for _ in text)]
        objective = objective_of(
            self.config.loss, on_student_text=source is not Source.DATASET, progress=step / self.config.train.steps
        )
        sums, objection = [], None
        with teacher.head() as head:
            for batch, signal, token_weight in zip(window + text, signals, token_weights, strict=True):
                with self.timer.phase("student"):
                    # told and not counted by deepspeed: with a token budget every step may have another number of them
                    self.student.engine.set_gradient_accumulation_boundary(len(sums) + 1 == len(token_weights))
                    found = self.student.loss(batch, signal, head, objective, token_weight)
                    sums.append(
                        torch.stack([found.divergence_nats, found.cross_entropy_nats, found.agreements]).double()
                    )
                    if len(sums) == len(token_weights):  # all losses are known, and nothing is taken yet
                        stacked = torch.stack(sums)
                        known = [*stacked[: len(window)].sum(0).tolist(), stacked[len(window) :, 1].sum().item()]
                        known += [peak_rss_gib(), self.signals.received, step]
                        divergence, cross_entropy, agreements, text_ce, rss_gib, stop, steps = (
                            collectives.sum_over_ranks(known)
                        )
                        mean = steps / collectives.world()
                        assert mean == step, f"this rank is at step {step}, the mean of all ranks is {mean}"
                        loss = (divergence + objective.cross_entropy_weight * cross_entropy) / targets
                        loss += self.config.text.weight * text_ce / text_targets if text else 0.0
                        objection = self.guard.objection(loss)
                    # deepspeed leaves a step out, on all ranks, whose gradient is not finite on any
                    self.student.engine.backward(found.loss * float("nan") if objection else found.loss)
                with self.timer.phase("optimizer"):
                    self.student.engine.step()

        self.asked_to_stop = stop > 0
        taken = self.student.engine.was_step_applied()
        self.guard.record(loss, taken)
        if not taken:
            self._tell_skipped(step, source, [*examples, *text_examples], objection or "its gradient is not finite")
        self.source_counts[source.value] += 1
        self.tokens += int(tokens + text_tokens)
        return {
            "step": step + 1,
            "loss": loss,
            "kl": divergence / targets,
            "ce": cross_entropy / targets,
            "top1_agreement": agreements / targets,
            "phi": self.schedule.phi,
            "source": source.value,
            "teacher": teacher.kind,
            "rollout_mode": self.rollout.last.mode if source is Source.GENERATE else None,
            "staleness_steps": self._staleness(step, source),
            **({"text_ce": text_ce / text_targets, "text_tokens": int(text_tokens)} if text else {}),
            "tokens": int(tokens + text_tokens),
            "micro_batches": len(token_weights),
            "response_tokens": int(targets),
            "learning_rate": learning_rate,
            "grad_norm": float(self.student.engine.get_global_grad_norm() or 0.0),
            "skipped_steps": self.guard.skipped,
            "peak_rss_gib": rss_gib,
            "peak_device_gib": peak_device_gib(),
        }

    def choose_examples(self, step: int) -> tuple[Source, list[Example]]:
        """This rank's share of the step's rows, and where they are from: data, buffer, or the student (Algorithm 1)."""
        rows = self.config.train.batch_rows // collectives.world()
        source = self.schedule.decide(step)
        if source is Source.GENERATE and self.windows_ahead:
            self.windows_ahead -= 1
            source = Source.REPLAY
            if self.config.rollout.train_on_fresh:  # what was made for this step, and not any of the buffer
                return source, self.replay.newest(rows, skip=self.windows_ahead * rows)
        # The buffer is filled before it is drawn from. Ranks agree: shards differ after a change of world size.
        if source is Source.REPLAY and not collectives.everywhere(self.replay.is_ready(rows, step)):
            source = Source.GENERATE
        if source is Source.DATASET:
            return source, self._read(self.dataset, step, rows)
        if source is Source.GENERATE:
            fresh = self.generate(step, rows)
            self.replay.push(fresh, self.rollout.weights_step)
            if self.config.rollout.train_on_fresh:
                return source, fresh[:rows]
        return source, self.replay.sample(rows, step)

    def generate(self, step: int, rows: int) -> list[Example]:
        """This rank's texts of the step's prompts, and of those of as many later steps as rollout.windows asks for."""
        settings, rank, world = self.config.rollout, collectives.rank(), collectives.world()
        prompts, seeds = [], []
        for window in range(settings.windows):
            prompts += [example.prompt for example in self._read(self.dataset, step + window, rows)]
            first = (window * world + rank) * rows
            seeds += [sequence_seed(self.config.seed, step + 1, row) for row in range(first, first + rows)]
        sampling = SeededSampling.of(settings, self.config.max_new_tokens, seeds)
        with self.timer.phase("rollout"):
            self.rollout.sync_weights(step)
            texts = self.rollout.complete(prompts, sampling)
        self.windows_ahead = settings.windows - 1
        return texts

    def choose_text(self, step: int) -> list[Example]:
        """This rank's blocks of plain text for the step."""
        if self.text is None:
            return []
        return self._read(self.text, step, self.config.text_rows // collectives.world())

    def _read(self, rows: PromptDataset | TextStream, step: int, count: int) -> list[Example]:
        """This rank's share. A stream is read from outside, and may fail on one rank alone: all of them end then."""

        def read() -> list[Example]:
            return rows.window_examples(step, collectives.rank(), collectives.world(), count)

        return collectives.together(read) if isinstance(rows, TextStream) else read()

    def _window(self, examples: list[Example], pack_to: int | None = None) -> list[TokenBatch]:
        if not examples:
            return []
        window = make_window(
            examples, self.config.micro_rows(collectives.world()), self.vocabulary.pad_id, pack_to=pack_to,
            decoder_start_id=self.vocabulary.decoder_start_id, micro_tokens=self.config.train.micro_tokens,
            agree=collectives.max_over_ranks,
        )  # fmt: skip
        return [batch.to(collectives.device()) for batch in window]

    def validate(self, step: int) -> Validation:
        """Measures, lets the schedule move phi, keeps the best student: all ranks see the same numbers."""
        with self.timer.phase("validation"):
            found = self.validator.measure(self.student)
        self.schedule.observe_validation(step, found.ce_nats if found.kl_nats is None else found.kl_nats)
        if by := self.config.validation.best:
            best = Best.of(self.best, found, by, step)
            if best != self.best and self._keep_best():
                self.best = best
        return found

    def _keep_best(self) -> bool:
        """Whether the best student is now in its folder. A failure ends the run or is only told, as that of a save."""
        with self.timer.phase("export"):
            try:
                self.export_best()
            except ValueError as error:
                if self.config.checkpoint.on_failure == "stop":
                    raise
                self.monitor.note(f"warning: {error}; training goes on, the best student before it stands")
                return False
        return True

    def save(self) -> None:
        """A checkpoint of the steps done. A failure ends the run or is only told, by checkpoint.on_failure."""
        with self.timer.phase("checkpoint"):
            try:
                state = {
                    "config": self.config.to_dict(),
                    "metrics_bytes": collectives.together(self.monitor.position),
                    "loop": self.state_dict(),
                    **self.run_state(),
                }
                self.checkpoints.save(self.done, self.student.engine, self.replay, state)
                self.has_saved = True
                self.signals.kept()
            except ValueError as error:
                if self.config.checkpoint.on_failure == "stop":
                    raise
                self.save_failure = str(error)
                self.monitor.note(f"warning: {error}; training goes on, the older checkpoints stand")

    def state_dict(self) -> dict[str, Any]:
        """What the loop knows beside weights, replay and generators; plain JSON types. Collective."""
        streams = {name: collectives.gather_objects(stream.state_dict()) for name, stream in self._streams()}
        return {
            "streams": streams,
            "done": self.done,
            "initial": self.initial,
            "latest": self.latest,
            "best": self.best,
            "source_counts": self.source_counts,
            "tokens": self.tokens,
            "windows_ahead": self.windows_ahead,
            "schedule": self.schedule.state_dict(),
            "guard": self.guard.state_dict(),
            "seconds": self.timer.totals,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done, self.tokens, self.source_counts = state["done"], state["tokens"], dict(state["source_counts"])
        self.initial, self.latest = Validation(*state["initial"]), Validation(*state["latest"])
        self.windows_ahead = state.get("windows_ahead", 0)
        self.best = Best(*state["best"]) if state.get("best") else None
        self.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["guard"])
        self.timer.totals = dict(state["seconds"])
        for name, stream in self._streams():
            states = state["streams"][name]
            if len(states) != collectives.world():
                raise ValueError(
                    f"{name} is streamed, each rank reads its own documents, and the checkpoint is of {len(states)} "
                    f"ranks, this run of {collectives.world()}; use as many ranks, or start over with resume=never"
                )
            collectives.together(
                lambda stream=stream, states=states: stream.load_state_dict(states, collectives.rank())
            )

    def _streams(self) -> list[tuple[str, TextStream]]:
        named = (("data.source", self.dataset), ("text.source", self.text))
        return [(name, rows) for name, rows in named if isinstance(rows, TextStream)]

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from `checkpoint`, which is checked and of this run."""
        self.load_state_dict(checkpoint.state["loop"])
        checkpoint.load_student(self.student.engine)
        collectives.together(lambda: checkpoint.load_replay(self.replay))
        collectives.together(lambda: checkpoint.load_rng(self.config.seed, self.done))
        checkpoint.close()

    def _staleness(self, step: int, source: Source) -> float | None:
        """Mean age, in steps, of the weights that this rank's rows were generated by."""
        if source is Source.DATASET:
            return None
        if source is Source.GENERATE and self.config.rollout.train_on_fresh:
            return float(step - self.rollout.weights_step)
        return self.replay.staleness(step)

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
            (folder / f"rank-{collectives.rank():05d}.json").write_text(
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
