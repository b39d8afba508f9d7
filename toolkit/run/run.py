"""One run from its config to its summary: read, build, train, measure, export."""

import gc
import itertools
import time
from collections.abc import Sequence

import torch

from toolkit.batch import Example
from toolkit.data import PromptDataset, TextStream
from toolkit.models import zero
from toolkit.ranks import collectives
from toolkit.ranks.output import say
from toolkit.ranks.signals import StopSignals
from toolkit.ranks.watchdog import Watchdog
from toolkit.run.build import Parts, build
from toolkit.run.checkpoint import Checkpoints
from toolkit.run.inputs import RunInputs, load_run_inputs, open_cache
from toolkit.run.loop import DistillationLoop
from toolkit.run.report import final_report, samples
from toolkit.run.sharding import settle_sharding
from toolkit.run.start import find_start, finished, prepare_folder
from toolkit.run.summary import STUDENT, SUMMARY, Summary, summarize
from toolkit.settings import RunConfig
from toolkit.storage.lock import sole_use
from toolkit.storage.manifest import write_json
from toolkit.teachers.cache import TeacherCache
from toolkit.teachers.live import NoTeacher
from toolkit.teachers.own_text import teacher_text, text_folder

CHECKPOINTS, STARTS = "checkpoints", "starts_in_vain"


def run(config: RunConfig, watchdog: Watchdog, is_last: bool = True) -> Summary:
    """Train the student of `config`, write its run folder, print the report; goes on where an earlier start ended.

    is_last: False where other runs of this process come after it. Collective.
    Raises ValueError for wrong input, GoOnLater where a signal stopped it.
    """
    try:
        with StopSignals(config.faults.grace_s).watched() as signals, sole_use(config.run_dir):
            signals.count_start(config.run_dir / STARTS)
            summary = _run(config, signals, watchdog)
            signals.kept()
            if not is_last:  # a signal that came after the last step is not lost with this run
                signals.stop_if_asked(f"after {config.name}, which is finished")
            return summary
    finally:
        gc.collect()  # engines are in cycles with their hooks
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run(config: RunConfig, signals: StopSignals, watchdog: Watchdog) -> Summary:
    started_s, is_main = time.monotonic(), collectives.rank() == 0

    # Read all input, and find out where to begin. Nothing is deleted or built before all of it was found to be good.
    watchdog.progress("loading")
    config, inputs = load_run_inputs(config)
    collectives.check_shared(config.run_dir)
    checkpoints = Checkpoints(config.run_dir / CHECKPOINTS, config.checkpoint.keep)
    start = find_start(config, checkpoints, inputs.identity)
    if summary := finished(config, start, inputs.identity):
        return summary
    config, plan = settle_sharding(start.config, inputs.teacher_path, inputs.student_path)
    cache = open_cache(config) if config.teacher.cache else None
    if config.resume == "never":
        checkpoints.clear()
    collectives.together(lambda: prepare_folder(config, start) if is_main else None)

    # Train, from the first step or from the checkpoint on.
    parts = build(config, inputs, cache, start.state, watchdog)
    held_out, timer = parts.held_out, parts.timer
    with parts.monitor:
        for note in (plan.why, *_introduction(config, inputs, cache), *start.notes, *parts.notes):
            parts.monitor.note(note)
        dataset = _in_order(training_rows(parts, inputs, signals), config.seed)
        text = None if inputs.text is None else _in_order(inputs.text, config.seed)
        loop = DistillationLoop(
            parts=parts, state=start.state, dataset=dataset, text=text, signals=signals, checkpoints=checkpoints,
            identity=inputs.identity, started_s=started_s,
        )  # fmt: skip
        if start.checkpoint is not None:
            with timer.phase("checkpoint"):
                loop.resume(start.checkpoint)
        else:
            with timer.phase("evaluation"):
                start.state.before = held_out.ask(parts.student_rollout)
        loop.run()

        # Ask the models the same questions again, and write the student. A signal may still come in between.
        unexported = "after the last step, before the student was exported"
        assert start.state.before is not None, "the student is asked before its first step"
        with timer.phase("evaluation"):
            answers = {"initial": start.state.before, "final": held_out.ask(parts.student_rollout)}
            loop.stop_if_asked(unexported)
            if parts.teacher_rollout is not None:
                answers["teacher"] = held_out.ask(parts.teacher_rollout)
        loop.stop_if_asked(unexported)
        with timer.phase("export"):
            parts.export(STUDENT)
        timer.take()
    zero.release(m.engine for m in (parts.teacher, parts.student) if not isinstance(m, NoTeacher))

    # Sum up. The summary's presence says that the run is finished.
    summary = summarize(config, start.state, inputs.data, held_out, answers, inputs.identity, loop.wall_time_s, plan)
    if is_main:
        write_json(config.run_dir / SUMMARY, summary, durable=True, indent=2)
        say("\n" + final_report(summary, samples(inputs.data, answers)))
    return summary


def training_rows(parts: Parts, inputs: RunInputs, signals: StopSignals) -> Sequence[Example] | TextStream:
    """The data's rows, or their prompts with the teacher's own text where data.responses asks for it; that is made now,
    as far as it is not kept from an earlier start. Collective; raises ValueError, and GoOnLater between two files."""
    config, rows = parts.config, inputs.data.train
    if config.data.responses != "teacher":
        return rows
    files = itertools.count()

    def between_files() -> None:
        parts.watchdog.progress("teacher_text")
        if next(files):
            signals.kept()
        signals.stop_if_asked("while the teacher generated; what it wrote is kept")

    assert parts.teacher_rollout is not None and not isinstance(rows, TextStream), "settings are checked before"
    with parts.timer.phase("teacher_text"):
        folder = text_folder(inputs.cache_dir, inputs.identity, config)
        return teacher_text(rows, parts.teacher_rollout, config, folder, between_files)


def _in_order(rows: Sequence[Example] | TextStream, seed: int) -> PromptDataset | TextStream:
    """What deals out the rows of each step: a stream has its own order."""
    return rows if isinstance(rows, TextStream) else PromptDataset(rows, seed)


def _introduction(config: RunConfig, inputs: RunInputs, cache: TeacherCache | None) -> list[str]:
    """The first lines of a run: what it trains by which settings."""
    data, world = inputs.data, collectives.world()
    left_out = {name: count for name, count in data.counts.items() if count and not name.endswith("_rows")}
    count, rows = config.accumulation(world), config.rows_per_micro_batch(world)
    micro_batches = f"{count} micro-batch{'es' if count > 1 else ''} of {rows} rows a step"
    if config.train.tokens_per_micro_batch is not None:
        micro_batches = f"at most {config.train.tokens_per_micro_batch} tokens a micro-batch"
    lines = [
        f"{config.name}: {config.loss.divergence}, schedule {config.schedule.policy}, "
        f"{'streamed' if isinstance(data.train, TextStream) else len(data.train)} training and "
        f"{len(data.validation)} validation rows{f' ({left_out})' if left_out else ''}, "
        f"{micro_batches}, {world} ranks, {inputs.identity['precision']}, folder {config.run_dir}"
    ]
    if cache is not None:
        lines.append(
            f"teacher cache {cache.folder}: {cache.form} of {cache.manifest['positions']} positions, computed in "
            f"{cache.identity['precision']}; {'a' if config.has_teacher else 'no'} teacher is loaded beside it"
        )
    return lines
