"""The engine loop: one optimizer step, from prompts to weights, in the order in which it happens."""

import dataclasses
import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit.batch import Example, TokenBatch, make_window
from toolkit.data import PromptDataset, TextStream
from toolkit.evaluation import Best, Validation
from toolkit.models import objective_of, zero
from toolkit.models.identity import RunIdentity
from toolkit.ranks import collectives
from toolkit.ranks.memory import peak_device_gib
from toolkit.ranks.signals import GoOnLater, StopSignals
from toolkit.rollout.local import SeededSampling, sequence_seed
from toolkit.rollout.schedule import Source
from toolkit.run.build import Parts
from toolkit.run.checkpoint import Checkpoint, Checkpoints
from toolkit.run.state import LoopState
from toolkit.run.summary import BEST
from toolkit.run.totals import agree, count_tokens


@dataclass
class DistillationLoop:
    """The steps of a run, with the validations and the checkpoints between them."""

    parts: Parts
    state: LoopState
    dataset: PromptDataset | TextStream
    text: PromptDataset | TextStream | None  # plain text that is learned beside the distillation
    signals: StopSignals
    checkpoints: Checkpoints
    identity: RunIdentity  # kept in each checkpoint
    started_s: float  # when this start of the run began, by time.monotonic
    asked_to_stop: bool = False  # a signal has reached a rank
    has_saved: bool = False  # this start has written a checkpoint
    save_failure: str = ""  # why the last save that failed did

    def run(self) -> None:
        """Take all steps that are left, with a validation before the first and after the last one.

        Raises GoOnLater where a signal asked for it, after a checkpoint of the step that ended; ValueError where too
        many steps in a row were not finite.
        """
        parts, state, config = self.parts, self.state, self.parts.config

        # A run that goes on from a checkpoint has its first validation already.
        if state.initial is None:
            state.initial = state.latest = self.validate(step=0)
        parts.monitor.start()
        last = config.train.steps
        for step in range(state.done, last):
            # The run ends where too many steps in a row were skipped.
            record = self.step(step)
            state.done = step + 1
            self.signals.in_vain = not self.has_saved
            if state.guard.gives_up(config.faults):
                parts.monitor.log_step(record)
                raise ValueError(self._diverged(step))

            # A validation follows now and then, and the record of the step holds it.
            if state.done % config.validation.every_steps == 0 or state.done == last:
                state.latest = self.validate(state.done)
                record["validation"] = state.latest.metrics()
            seconds = parts.timer.take()
            beside = ("validation", "checkpoint", "export")
            step_time_s = sum(seconds.values()) - sum(seconds.get(name, 0.0) for name in beside)
            parts.monitor.log_step(record | {"tokens_per_s": record["tokens"] / step_time_s, "seconds": seconds})

            # A checkpoint follows now and then, and always before the run ends.
            every = config.checkpoint.every_steps
            if self.asked_to_stop or state.done == last or (every and state.done % every == 0):
                self.save()
            if self.asked_to_stop:
                self.go_on_later(f"after step {state.done} of {last}")

    def step(self, step: int) -> dict[str, Any]:
        """Take optimizer step `step`, counted from 0; the returned metrics are of all ranks together. Collective."""
        parts, state, config, engine = self.parts, self.state, self.parts.config, self.parts.student.engine

        # Choose this rank's rows, and lay them into micro-batches. Labels are shifted there, and nowhere else.
        parts.watchdog.progress("data", step + 1)
        source, examples = self.choose_examples(step)
        blocks = config.text_rows // collectives.world()
        text_examples = [] if self.text is None else self._read(self.text, step, blocks)
        window = self._window(examples, config.data.max_length if config.data.packing else None)
        text = self._window(text_examples)

        # A micro-batch's loss is a sum over its tokens, and the step's is their mean over all ranks. The weights divide
        # by tokens, and undo what DeepSpeed divides by.
        counts = count_tokens(window, text)
        shares = zero.loss_divisor(engine)
        token_weights = [shares / counts.targets] * len(window)
        token_weights += [config.text.weight * shares / counts.text_targets for _ in text]
        learning_rate = parts.student.set_learning_rate(step)

        # Ask the teacher about the whole window before the student begins: its weights are gathered once for all of it.
        teacher = parts.teachers[source]
        with parts.timer.phase("teacher"):
            signals = [*teacher.signals(window), *(None for _ in text)]

        # Add up the gradients of the micro-batches; the last one lets deepspeed move the weights.
        is_student_text, progress = source is not Source.DATASET, step / config.train.steps
        objective = objective_of(config.loss, on_student_text=is_student_text, progress=progress)
        measures: list[Tensor] = []
        objection: str | None = None
        with teacher.head() as head:
            for batch, signal, token_weight in zip(window + text, signals, token_weights, strict=True):
                is_last = len(measures) + 1 == len(token_weights)
                with parts.timer.phase("student"):
                    # DeepSpeed would count them itself, but train.tokens_per_micro_batch makes their number vary.
                    zero.begin_micro_batch(engine, is_last=is_last)
                    found = parts.student.loss(batch, signal, head, objective, token_weight)
                    sums = found.divergence_nats, found.cross_entropy_nats, found.agreements
                    measures.append(torch.stack(sums).double())
                    if is_last:
                        # All losses are known and no weight has moved: the ranks settle whether this step is taken.
                        totals = agree(step, measures, len(window), self.signals.received)
                        loss = totals.loss(counts, objective.cross_entropy_weight, config.text.weight)
                        objection = state.guard.objection(loss, config.faults)
                    # A loss that is not a number makes deepspeed leave the step out, on all ranks.
                    engine.backward(found.loss * float("nan") if objection else found.loss)
                with parts.timer.phase("optimizer"):
                    engine.step()

        # Note what happened. Deepspeed has also left the step out where a gradient was not finite on any rank.
        self.asked_to_stop = totals.stop_requests > 0
        taken = zero.was_step_taken(engine)
        state.guard.record(loss, taken, config.faults)
        if not taken:
            self._tell_skipped(step, source, [*examples, *text_examples], objection or "its gradient is not finite")
        state.source_counts[source.value] += 1
        state.tokens += int(counts.tokens + counts.text_tokens)
        return {
            "step": step + 1,
            "loss": loss,
            "kl": totals.divergence_nats / counts.targets,
            "ce": totals.cross_entropy_nats / counts.targets,
            "top1_agreement": totals.agreements / counts.targets,
            "phi": state.schedule.phi,
            "source": source.value,
            "teacher": teacher.kind,
            "rollout_mode": parts.rollout.last.mode if source is Source.GENERATE and parts.rollout.last else None,
            "staleness_steps": self._staleness(step, source),
            **totals.text_metrics(counts),
            "tokens": int(counts.tokens + counts.text_tokens),
            "micro_batches": len(token_weights),
            "response_tokens": int(counts.targets),
            "learning_rate": learning_rate,
            "grad_norm": zero.gradient_norm(engine),
            "skipped_steps": state.guard.skipped,
            "peak_rss_gib": totals.rss_gib,
            "peak_device_gib": peak_device_gib(),
        }

    def choose_examples(self, step: int) -> tuple[Source, list[Example]]:
        """This rank's share of the step's rows, and where they come from: the data, the replay buffer, or the student
        (Algorithm 1, arXiv 2402.03898)."""
        parts, state, settings = self.parts, self.state, self.parts.config.rollout
        rows = parts.config.train.rows_per_step // collectives.world()
        source = parts.schedule.decide(step)

        # An earlier step may have made this one's text: it is in the buffer, behind that of the steps still to come.
        if source is Source.GENERATE and state.windows_ahead:
            state.windows_ahead -= 1
            source = Source.REPLAY
            if settings.train_on_fresh:
                return source, parts.replay.newest(rows, skip=state.windows_ahead * rows)

        # The buffer is filled before it is drawn from. The ranks agree on it: after a resume on another number of ranks
        # their shards may differ.
        if source is Source.REPLAY and not collectives.everywhere(parts.replay.is_ready(rows, step)):
            source = Source.GENERATE

        if source is Source.DATASET:
            return source, self._read(self.dataset, step, rows)
        if source is Source.GENERATE:
            fresh = self.generate(step, rows)
            parts.replay.push(fresh, parts.rollout.weights_step)
            if settings.train_on_fresh:
                return source, fresh[:rows]
        return source, parts.replay.sample(rows, step)

    def generate(self, step: int, rows: int) -> list[Example]:
        """The student's texts after this rank's prompts of the step, and of as many later steps as rollout.windows
        asks for. Each text has a seed of its own."""
        config, rank, world = self.parts.config, collectives.rank(), collectives.world()

        # Each prompt has a seed that follows from its place among the prompts of all ranks.
        prompts, seeds = [], []
        for window in range(config.rollout.windows):
            prompts += [example.prompt for example in self._read(self.dataset, step + window, rows)]
            first = (window * world + rank) * rows
            seeds += [sequence_seed(config.seed, step + 1, row) for row in range(first, first + rows)]
        sampling = SeededSampling.of(config.rollout, config.max_new_tokens, seeds)
        with self.parts.timer.phase("rollout"):
            self.parts.rollout.sync_weights(step)
            texts = self.parts.rollout.complete(prompts, sampling)
        self.state.windows_ahead = config.rollout.windows - 1
        return texts

    def _read(self, rows: PromptDataset | TextStream, step: int, count: int) -> list[Example]:
        """This rank's share. A stream is read from outside, and may fail on one rank alone: all of them end then."""

        def read() -> list[Example]:
            return rows.window_examples(step, collectives.rank(), collectives.world(), count)

        return collectives.together(read) if isinstance(rows, TextStream) else read()

    def _window(self, examples: list[Example], pack_to: int | None = None) -> list[TokenBatch]:
        """The micro-batches of these examples, on this rank's device."""
        if not examples:
            return []
        config, vocabulary = self.parts.config, self.parts.vocabulary
        rows, tokens = config.rows_per_micro_batch(collectives.world()), config.train.tokens_per_micro_batch
        window = make_window(
            examples, rows, vocabulary.pad_id, pack_to=pack_to, layout=vocabulary.layout, micro_tokens=tokens,
            agree=collectives.max_over_ranks,
        )  # fmt: skip
        return [batch.to(collectives.device()) for batch in window]

    def validate(self, step: int) -> Validation:
        """Measure the student, let the schedule move phi, keep the best student. All ranks see the same numbers."""
        parts, state, by = self.parts, self.state, self.parts.config.validation.best
        with parts.timer.phase("validation"):
            found = parts.validator.measure(parts.student)
        parts.schedule.observe_validation(step, found.ce_nats if found.kl_nats is None else found.kl_nats)
        best = Best.of(state.best, found, by, step) if by else None
        if best is not None and best != state.best:
            with parts.timer.phase("export"):
                try:
                    parts.export(BEST)
                    state.best = best
                except ValueError as error:
                    self._may_fail(error, "the best student before it stands")
        return found

    def save(self) -> None:
        """Write a checkpoint of the steps done. A failure ends the run or is only told, by checkpoint.on_failure.
        Collective."""
        parts, state = self.parts, self.state
        with parts.timer.phase("checkpoint"):
            try:
                metrics_bytes = collectives.together(parts.monitor.position)
                now = dataclasses.replace(state, metrics_bytes=metrics_bytes, wall_time_s=self.wall_time_s)
                streams = {name: collectives.gather_objects(rows.state_dict()) for name, rows in self._streams()}
                loop = now.to_json() | {"streams": streams}
                saved = {"config": parts.config.to_dict(), "identity": self.identity, "loop": loop}
                self.checkpoints.save(state.done, parts.student.engine, parts.replay, saved)
                self.has_saved = True
                self.signals.kept()
            except ValueError as error:
                self._may_fail(error, "the older checkpoints stand")
                self.save_failure = str(error)

    def _may_fail(self, error: ValueError, what_is_left: str) -> None:
        """Tells of a write that failed. Raises `error` where checkpoint.on_failure is "stop"."""
        if self.parts.config.checkpoint.on_failure == "stop":
            raise error
        self.parts.monitor.note(f"warning: {error}; training goes on, {what_is_left}")

    def resume(self, checkpoint: Checkpoint) -> None:
        """Load what `checkpoint` holds beside the state, with which this loop was made. Collective.

        Raises ValueError where a stream cannot go on from there, and where the checkpoint is of another student.
        """
        parts = self.parts

        # Each rank goes on in its own documents of a stream.
        for name, rows in self._streams():
            states = checkpoint.state["loop"]["streams"][name]
            if len(states) != collectives.world():
                raise ValueError(
                    f"{name} is a stream of {len(states)} ranks in the checkpoint, and of {collectives.world()} in "
                    "this run; use as many ranks, or start over with resume=never"
                )
            collectives.together(partial(rows.load_state_dict, states, collectives.rank()))
        # Then come weights and optimizer, the replay buffer, and the random generators.
        checkpoint.load_student(parts.student.engine)
        collectives.together(lambda: checkpoint.load_replay(parts.replay))
        collectives.together(lambda: checkpoint.load_rng(parts.config.seed, self.state.done))
        checkpoint.close()

    def _streams(self) -> list[tuple[str, TextStream]]:
        """What is read as a stream, by its setting: places in it are each rank's own, and kept in checkpoints."""
        named = (("data.source", self.dataset), ("text.source", self.text))
        return [(name, rows) for name, rows in named if isinstance(rows, TextStream)]

    @property
    def wall_time_s(self) -> float:
        """Seconds that the run has taken so far, over all its starts."""
        return self.state.wall_time_s + time.monotonic() - self.started_s

    def go_on_later(self, where: str) -> None:
        """Raises GoOnLater: a signal has stopped the run, and the next start goes on from the newest checkpoint.

        Raises ValueError where nothing of what this start did was kept: the next one would only do it again, and a job
        that is requeued would do so for ever.
        """
        if self.save_failure and not self.has_saved:
            raise ValueError(
                f"stopped by a signal {where}, and what was done since the start is lost: {self.save_failure}; make "
                "room there, or change output_dir"
            )
        raise GoOnLater(f"stopped by a signal {where}")

    def stop_if_asked(self, where: str) -> None:
        """As `go_on_later`, where a signal came after the last step. Collective."""
        if self.signals.agreed():
            self.go_on_later(where)

    def _staleness(self, step: int, source: Source) -> float | None:
        """Mean age, in steps, of the weights that generated this rank's rows; None for rows of the data."""
        if source is Source.DATASET:
            return None
        if source is Source.GENERATE and self.parts.config.rollout.train_on_fresh:
            return float(step - self.parts.rollout.weights_step)
        return self.parts.replay.staleness(step)

    def _tell_skipped(self, step: int, source: Source, examples: list[Example], reason: str) -> None:
        """Say that a step was not taken, and write its rows to a file: they are what has to be looked at."""
        guard, folder = self.state.guard, self.parts.config.run_dir / "skipped" / f"step-{step + 1:08d}"
        counts = f"{guard.skipped_in_row} in a row, {guard.skipped} in all"
        self.parts.monitor.note(f"warning: step {step + 1} is skipped, {reason} ({counts}); its rows are in {folder}")
        rows = [{"prompt_length": e.prompt_length, "tokens": e.tokens.tolist()} for e in examples]
        told = {"step": step + 1, "source": source.value, "reason": reason, "rows": rows}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{collectives.rank():05d}.json").write_text(json.dumps(told))
        except OSError as error:
            self.parts.monitor.note(f"warning: the rows of step {step + 1} could not be written: {error}")

    def _diverged(self, step: int) -> str:
        """Why the run ends after too many skipped steps, and what to do."""
        config, skipped = self.parts.config, self.state.guard.skipped_in_row
        return (
            f"steps up to {step + 1} were skipped, {skipped} in a row (faults.max_skipped_steps = "
            f"{config.faults.max_skipped_steps}), as loss or gradient is not finite: take their rows out, which are in "
            f"{config.run_dir / 'skipped'}, lower optimizer.lr, or set optimizer.max_grad_norm; the last good weights "
            f"are in {self.checkpoints.folder}"
        )
