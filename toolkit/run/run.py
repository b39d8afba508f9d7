"""A run from its config: builds every object, once; trains; measures; exports."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from toolkit.data import Data, PromptDataset, TextStream, references
from toolkit.evaluation import Validation, Validator, answer, row_seeds, score
from toolkit.models import NoTeacher, build_student, build_teacher, check_packing, free
from toolkit.models.ds_config import read_ds_config, student_ds_config, teacher_ds_config
from toolkit.models.export import export_student, rehearse_export
from toolkit.ranks import collectives
from toolkit.ranks.memory import peak_rss_gib
from toolkit.ranks.output import say
from toolkit.ranks.signals import StopSignals
from toolkit.ranks.watchdog import Watchdog
from toolkit.rollout.check import check_generation
from toolkit.rollout.local import GatheredRollout
from toolkit.rollout.replay import ReplayBuffer, local_capacity
from toolkit.rollout.schedule import Schedule
from toolkit.rollout.vllm import VllmRollout
from toolkit.run.checkpoint import Checkpoint, Checkpoints, compare, identity
from toolkit.run.guard import StepGuard
from toolkit.run.inputs import cache_identity, load_inputs, load_plain_text, open_cache
from toolkit.run.loop import DistillationLoop
from toolkit.run.monitor import Monitor, monitor_master
from toolkit.run.report import Sample, final_report
from toolkit.run.timer import PhaseTimer
from toolkit.settings import NO_DIVERGENCE, SCORES, RunConfig, SamplingSettings
from toolkit.storage.lock import sole_use
from toolkit.storage.manifest import write_json
from toolkit.teachers.cache import CachedTeacher
from toolkit.teachers.own_text import teacher_text, text_folder

TRAINING_PHASES = ("teacher", "rollout", "student", "optimizer")
OTHER_PHASES = ("teacher_text", "validation", "evaluation", "checkpoint", "export")
CHECKPOINTS, BEST, STARTS = "checkpoints", "best", "starts_in_vain"
GENERATING = "while the teacher generated; what it wrote is kept"
UNEXPORTED = "after the last step, before the student was exported"
#: sampled ones, to be scored; greedy ones, to be shown
Answers = tuple[list[str], list[str]]


def run(config: RunConfig, watchdog: Watchdog, is_last: bool = True) -> dict[str, Any]:
    """Train the student of `config`, write its run folder, print the report; goes on where an earlier start ended.

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


def _run(config: RunConfig, signals: StopSignals, watchdog: Watchdog) -> dict[str, Any]:
    started_s = time.monotonic()
    watchdog.progress("loading")
    run_dir, is_main = config.run_dir, collectives.rank() == 0
    cache_dir, dtype, teacher_path, student_path, tokenizer, vocabulary, data = load_inputs(config)
    rows = None if isinstance(data.train, TextStream) else len(data.train)
    config = collectives.together(lambda: config.for_rows(rows))
    text, text_sha256 = collectives.main_rank_first(lambda: load_plain_text(config, tokenizer, cache_dir))
    collectives.check_alike(f"tokens of {config.data.source}", data.sha256)
    collectives.check_alike(f"tokens of {config.text.source}", text_sha256)
    base_path = "" if config.student.random_weights else student_path
    parts = identity(teacher_path, f"{data.sha256} {text_sha256}".strip(), dtype, base_path)
    if config.teacher.cache:
        parts = cache_identity(config, parts, data, tokenizer, vocabulary)
    collectives.check_shared(run_dir)
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, config.checkpoint.keep)
    resumed, notes = _find_start(config, checkpoints, parts)
    if summary := _finished(config, resumed, parts):
        return summary
    cache = open_cache(config) if config.teacher.cache else None
    if config.resume == "never":  # not before all input was found to be good
        checkpoints.clear()
    collectives.together(lambda: _start_folder(config, resumed) if is_main else None)
    # Before the models are loaded: a service that is not installed is told in seconds.
    sections = read_ds_config(config.student.ds_config)
    deepspeed_monitor = collectives.together(lambda: monitor_master(sections, run_dir, collectives.rank()))

    teacher = build_teacher(config, teacher_path, dtype, vocabulary) if config.has_teacher else NoTeacher()
    measured = CachedTeacher(cache, temperature=1.0) if cache and not config.has_teacher else teacher
    student = build_student(config, student_path, dtype, vocabulary)
    notes += rehearse_export(student, tokenizer, run_dir / "student")
    for built in (teacher, student) if config.has_teacher else (student,):
        watchdog.count_passes(built.model)
    if config.packs:
        check_packing(teacher, student, vocabulary)
    is_fine_tuning = config.loss.divergence == NO_DIVERGENCE
    schedule = Schedule(config.schedule, config.seed, config.train.steps)
    settings = config.rollout
    validation = config.validation
    limits = settings.batch_rows, settings.cache_mib, settings.gather
    student_rollout = GatheredRollout(student.engine, vocabulary, *limits)
    teacher_rollout = GatheredRollout(teacher.engine, vocabulary, *limits) if config.has_teacher else None
    if config.generates:
        check_generation("student", student_rollout)
    if teacher_rollout and (config.asks_models or config.data.responses == "teacher"):
        check_generation("teacher", teacher_rollout)
    rollout = student_rollout
    if settings.engine == "vllm":
        watchdog.progress("vLLM server")
        rollout = VllmRollout(config, student, tokenizer, vocabulary)
        rollout.start()
    timer = PhaseTimer(sync=torch.cuda.synchronize if torch.cuda.is_available() else None, watch=watchdog.progress)
    saved = {} if resumed is None else resumed.state
    done, keep_bytes = (0, None) if resumed is None else (saved["loop"]["done"], saved["metrics_bytes"])
    kept: dict[str, Any] = {"identity": parts, "before": saved.get("before"), "wall_time_s": 0.0}

    def run_state() -> dict[str, Any]:
        return kept | {"wall_time_s": saved.get("wall_time_s", 0.0) + time.monotonic() - started_s}

    with Monitor(
        run_dir, config.train.steps, collectives.rank(), deepspeed_monitor, start_step=done, keep_bytes=keep_bytes
    ) as monitor:
        monitor.note(_introduction(config, data, dtype, run_dir))
        if cache is not None:
            monitor.note(
                f"teacher cache {cache.folder}: {cache.form} of {cache.manifest['positions']} positions, computed in "
                f"{cache.identity['precision']}; {'a' if config.has_teacher else 'no'} teacher is loaded beside it"
            )
        for note in notes:
            monitor.note(note)
        train = data.train
        if config.data.responses == "teacher":
            with timer.phase("teacher_text"):
                folder = text_folder(cache_dir, parts, config)

                files = itertools.count()

                def between_files() -> None:
                    watchdog.progress("teacher_text")
                    if next(files):
                        signals.kept()
                    signals.stop_if_asked(GENERATING)

                train = teacher_text(train, teacher_rollout, config, folder, between_files)
        loop = DistillationLoop(
            config=config,
            vocabulary=vocabulary,
            dataset=_in_order(train, config.seed),
            text=_in_order(text, config.seed),
            teacher=NoTeacher() if is_fine_tuning else teacher,
            cached=CachedTeacher(cache, config.loss.temperature) if cache and not is_fine_tuning else None,
            student=student,
            schedule=schedule,
            replay=ReplayBuffer(
                settings.capacity, collectives.rank(), collectives.world(), config.seed, settings.max_age_steps
            ),
            rollout=rollout,
            validator=Validator(
                data.validation[: validation.rows],
                validation.batch_rows,
                vocabulary.pad_id,
                measured,
                (lambda: _scores(data, _sampled(config, data, student_rollout, tokenizer), validation.best))
                if validation.best in SCORES
                else None,
                vocabulary.decoder_start_id,
            ),
            monitor=monitor,
            timer=timer,
            checkpoints=checkpoints,
            signals=signals,
            guard=StepGuard(config.faults),
            run_state=run_state,
            watch=watchdog.progress,
            export_best=lambda: export_student(student, tokenizer, run_dir / BEST),
        )
        if resumed is not None:
            with timer.phase("checkpoint"):
                loop.resume(resumed)
        else:
            with timer.phase("evaluation"):
                kept["before"] = _ask(config, data, student_rollout, tokenizer)
        before = kept["before"]
        initial, final = loop.run()
        with timer.phase("evaluation"):
            after = _ask(config, data, student_rollout, tokenizer)
            loop.stop_if_asked(UNEXPORTED)
            theirs = _ask(config, data, teacher_rollout, tokenizer) if teacher_rollout else None
        loop.stop_if_asked(UNEXPORTED)
        with timer.phase("export"):
            export_student(student, tokenizer, run_dir / "student")
        timer.take()
    free(teacher, student)

    answers = {"initial": before, "final": after, **({"teacher": theirs} if theirs else {})}
    wall_time_s = run_state()["wall_time_s"]
    summary = _summary(loop, data, {"initial": initial, "final": final}, answers, dtype, wall_time_s)
    summary |= {"identity": parts, "student": str(run_dir / "student")}
    samples = [
        Sample(
            data.validation_rows[i]["prompt"],
            data.validation_rows[i]["response"],
            theirs[1][i] if theirs else None,
            before[1][i],
            after[1][i],
        )
        for i in range(len(after[1]))
    ]
    if is_main:
        write_json(run_dir / "summary.json", summary, durable=True, indent=2)  # says that the run is finished
        say("\n" + final_report(summary, samples))
    return summary


def _summary(
    loop: DistillationLoop, data: Data, validation: Mapping[str, Validation], answers: Mapping[str, Answers],
    dtype: torch.dtype, wall_time_s: float,
) -> dict[str, Any]:  # fmt: skip
    """What summary.json says of a run that has taken its steps. Collective."""
    config, seconds = loop.config, loop.timer.totals
    phases = {name: seconds.get(name, 0.0) for name in (*TRAINING_PHASES, *OTHER_PHASES)}
    train_time_s = sum(seconds.values()) - sum(phases[name] for name in OTHER_PHASES)
    phases["other"] = wall_time_s - sum(phases.values())
    best = loop.best
    return {
        "steps": config.train.steps,
        "tokens": loop.tokens,
        "wall_time_s": wall_time_s,
        "train_time_s": train_time_s,
        "tokens_per_s": loop.tokens / train_time_s,
        "ranks": collectives.world(),
        "precision": str(dtype).removeprefix("torch."),
        "peak_rss_gib": collectives.sum_over_ranks([peak_rss_gib()])[0],
        "validation": {name: found.metrics() for name, found in validation.items()},
        "best": best and {"by": config.validation.best, **best._asdict(), "student": str(config.run_dir / BEST)},
        "rouge_l": _rouge_scores(data, answers),
        "time_share": {name: spent_s / wall_time_s for name, spent_s in phases.items()},
        "source_counts": loop.source_counts,
        "skipped_steps": loop.guard.skipped,
        "phi_final": loop.schedule.phi,
        "phi_history": loop.schedule.history,
        "data": data.counts,
    }


def checked(config: RunConfig) -> RunConfig:
    """`config`, as far as it can be checked without its files. Raises ValueError."""
    config.validate()
    student_ds_config(config, "bf16", collectives.world())
    if config.has_teacher:
        teacher_ds_config(config, "bf16")
    if config.schedule.policy != "off":
        local_capacity(config.rollout.capacity, 0, collectives.world())
    return config


def _in_order(rows: Any, seed: int) -> PromptDataset | TextStream | None:
    """A step's rows from examples in memory or files; a stream has its own order."""
    return rows if rows is None or isinstance(rows, TextStream) else PromptDataset(rows, seed)


def _find_start(
    config: RunConfig, checkpoints: Checkpoints, parts: dict[str, Any]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, None for a run from the start, and what the user should know of the choice."""
    if config.resume == "never":
        return None, []
    found, passed_over = checkpoints.newest()
    notes = [f"warning: {text}; an older checkpoint is used" for text in passed_over]
    if found is None:
        return None, notes
    changes = collectives.together(lambda: compare(found.state, config, parts))
    notes.append(f"goes on from {found.folder}, written by {found.world} ranks")
    return found, notes + [f"changed since then: {change}" for change in changes]


def _finished(config: RunConfig, resumed: Checkpoint | None, parts: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, though its checkpoints may have been deleted."""
    run_dir = config.run_dir
    files = [run_dir / name for name in ("summary.json", "config.yaml", "student/config.json")]
    if config.resume == "never" or not collectives.everywhere(all(file.is_file() for file in files)):
        return None
    summary = collectives.together(lambda: json.loads(files[0].read_text()))
    if resumed is None:
        if "identity" not in summary:
            return None
        saved = {"identity": summary["identity"], "config": yaml.safe_load(files[1].read_text())}
        collectives.together(lambda: compare(saved, config, parts))
    elif resumed.state["loop"]["done"] < config.train.steps:
        return None
    if collectives.rank() == 0:
        say(f"{files[0]} says that this run is finished; resume=never starts it over")
    return summary


def _start_folder(config: RunConfig, resumed: Checkpoint | None) -> None:
    """What an earlier run left there goes, unless this one reads it: a student to go on from, its adapter."""
    run_dir = config.run_dir
    models = config.teacher, config.student
    read = [Path(p).expanduser().resolve() for m in models for p in (m.path, m.tokenizer, m.lora.adapter) if p]
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "summary.json").unlink(missing_ok=True)
    if resumed is None:
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(run_dir / "skipped", ignore_errors=True)
        for folder in (run_dir / BEST, run_dir / "student"):
            if not any(path.is_relative_to(folder.resolve()) for path in read):
                shutil.rmtree(folder, ignore_errors=True)
    config.save(run_dir / "config.yaml")


def _ask(config: RunConfig, data: Data, rollout: GatheredRollout, tokenizer: Any) -> Answers:
    """To the first validation rows."""
    samples = _answers(config, data, rollout, tokenizer, config.validation.samples, temperature=0.0)
    return _sampled(config, data, rollout, tokenizer), samples


def _sampled(config: RunConfig, data: Data, rollout: GatheredRollout, tokenizer: Any) -> list[str]:
    settings = config.validation
    return _answers(config, data, rollout, tokenizer, settings.rouge_rows, settings.sampling_temperature)


def _answers(
    config: RunConfig, data: Data, rollout: GatheredRollout, tokenizer: Any, count: int, temperature: float
) -> list[str]:
    prompts = [example.prompt for example in data.validation[:count]]
    sampling, seeds = SamplingSettings(temperature=temperature), row_seeds(config.seed, range(len(prompts)))
    found = answer(rollout, tokenizer, prompts, sampling, config.max_new_tokens, seeds) if prompts else []
    return [one.text for one in found]


def _scores(data: Data, texts: list[str], name: str) -> dict[str, float]:
    return {name: score(name, texts, [references(row) for row in data.validation_rows[: len(texts)]])}


def _rouge_scores(data: Data, answers: Mapping[str, Answers]) -> dict[str, float] | None:
    rows = len(answers["final"][0])
    if not rows:
        return None
    found = {name: _scores(data, sampled, "rouge_l")["rouge_l"] for name, (sampled, _) in answers.items()}
    return found | {"rows": rows}


def _micro_batches(config: RunConfig) -> str:
    if config.train.micro_tokens is not None:
        return f"at most {config.train.micro_tokens} tokens a micro-batch"
    world = collectives.world()
    count = config.accumulation(world)
    return f"{count} micro-batch{'es' if count > 1 else ''} of {config.micro_rows(world)} rows a step"


def _introduction(config: RunConfig, data: Data, dtype: torch.dtype, run_dir: Path) -> str:
    left_out = {name: count for name, count in data.counts.items() if count and not name.endswith("_rows")}
    return (
        f"{config.name}: {config.loss.divergence}, schedule {config.schedule.policy}, "
        f"{'streamed' if isinstance(data.train, TextStream) else len(data.train)} training and "
        f"{len(data.validation)} validation rows{f' ({left_out})' if left_out else ''}, "
        f"{_micro_batches(config)}, {collectives.world()} ranks, {str(dtype).removeprefix('torch.')}, folder {run_dir}"
    )
