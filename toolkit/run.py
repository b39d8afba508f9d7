"""A run from its config: builds every object, once; trains; measures; exports. `main` is what a recipe calls."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from toolkit import distributed
from toolkit.checkpoint import Checkpoint, Checkpoints, compare, identity, sole_use, write_json
from toolkit.config import NO_DIVERGENCE, SCORES, RunConfig, SamplingSettings
from toolkit.data import Data, PromptDataset, TextStream, references
from toolkit.evaluation import Validator, answer, row_seeds, score
from toolkit.faults import EXIT_LATER, GoOnLater, StepGuard, StopSignals
from toolkit.inputs import cache_identity, load_inputs, load_plain_text, open_cache
from toolkit.loop import DistillationLoop
from toolkit.methods import METHODS, expanded
from toolkit.models import (
    NoTeacher,
    build_student,
    build_teacher,
    check_packing,
    default_cache_dir,
    free,
    materialize,
)
from toolkit.models.ds_config import read_ds_config
from toolkit.models.export import export_student
from toolkit.models.identity import file_hashes
from toolkit.monitor import Monitor, PhaseTimer, monitor_master, peak_rss_gib
from toolkit.overrides import unknown
from toolkit.report import Sample, final_report
from toolkit.rollout.engine import GatheredRollout
from toolkit.rollout.replay import ReplayBuffer
from toolkit.rollout.schedule import Schedule
from toolkit.rollout.vllm import VllmRollout
from toolkit.stages import INIT, Stages, stages_table
from toolkit.teacher_cache import CachedTeacher
from toolkit.teacher_text import teacher_text, text_folder
from toolkit.watchdog import Watchdog

TRAINING_PHASES = ("teacher", "rollout", "student", "optimizer")
OTHER_PHASES = ("teacher_text", "validation", "evaluation", "checkpoint", "export")
CHECKPOINTS, BEST = "checkpoints", "best"
GENERATING = "while the teacher generated; what it wrote is kept"
UNEXPORTED = "after the last step, before the student was exported"


Recipe = RunConfig | Mapping[str, RunConfig] | Stages


def main(recipe: Recipe, arguments: list[str] | None = None) -> dict[str, Any]:
    """Run `recipe` with `section.key=value` arguments (the command line's by default), on every rank. Of a recipe with
    several runs the first argument names one; of one with stages it may, and all are run where it does not.

    Returns the summary (of stages, one for each). Wrong input ends every rank with exit code 2 and one message; a run
    that a signal stopped ends with EXIT_LATER, and the same command goes on with it.
    """
    given = sys.argv[1:] if arguments is None else arguments
    overrides = [text for text in given if not text.startswith("--local_rank")]  # the deepspeed launcher's own
    quiet_libraries()
    with distributed.one_message():
        if {"-h", "--help"} & set(overrides):
            return _help(recipe)
        try:
            with Watchdog(_hang_s(recipe, overrides)) as watchdog:
                distributed.start(watchdog.limit_s)
                is_one = overrides and "=" not in overrides[0] and overrides[0] != INIT
                if isinstance(recipe, Stages) and not is_one:
                    return run_stages(recipe, overrides, watchdog)
                config = distributed.together(lambda: _checked(chosen(recipe, overrides)))
                with sole_use(config.run_dir.parent) if isinstance(recipe, Stages) else nullcontext():
                    return run(config, watchdog)
        except GoOnLater as stopped:
            if distributed.rank() == 0:
                distributed.say(f"{stopped}; the same command goes on from there (exit code {EXIT_LATER})")
            sys.exit(EXIT_LATER)


def run_stages(recipe: Stages, arguments: list[str], watchdog: Watchdog) -> dict[str, dict[str, Any]]:
    """Cut the student, then each run from the student of the one before it; `init` as the first argument only cuts.

    A stage whose result is there is skipped, one that was stopped goes on. Each frees its engines before the next one
    begins. Raises as `run` does.
    """
    only_cut = arguments[:1] == [INIT]

    def checked() -> tuple[Stages, dict[str, RunConfig]]:
        stages = recipe.with_overrides(expanded(arguments[only_cut:]))
        runs = stages.chained()
        for config in runs.values():
            _checked(config)
        return stages, runs

    def say(text: str) -> None:
        if distributed.rank() == 0:
            distributed.say(text)

    stages, runs = distributed.together(checked)
    count, summaries = len(stages.names), {}
    with sole_use(stages.folder):
        distributed.check_shared(stages.folder)
        if stages.is_cut:
            watchdog.progress(INIT)
            if all(config.resume == "never" for config in runs.values()):
                distributed.together(lambda: stages.clear() if distributed.rank() == 0 else None)
            with StopSignals(stages.first.faults.grace_s).watched() as signals:
                found = summaries[INIT] = _cut(stages, any(config.has_teacher for config in runs.values()))
                _stop_if_asked(signals, "after the student was cut")
            say(f"stage 1 of {count}: {INIT}, layers {found['kept_layers']} kept, in {found['student']}")
        for name, config in ({} if only_cut else runs).items():
            say(f"stage {stages.names.index(name) + 1} of {count}: {name}")
            summaries[name] = run(config, watchdog, is_last=name == stages.names[-1])
    say("\n" + stages_table(summaries))
    return summaries


def _cut(stages: Stages, has_teacher: bool) -> dict[str, Any]:
    """The summary of the first student, made where it is not there. Runs from stored answers alone (not `has_teacher`)
    need no teacher once it is. Collective."""
    teacher, cache_dir, path = stages.first.teacher, default_cache_dir(stages.first.cache_dir), ""
    if not has_teacher and distributed.everywhere(stages.is_made):
        return distributed.main_rank_first(lambda: stages.cut(path, None))
    if not teacher.random_weights:
        path = distributed.main_rank_first(lambda: materialize(teacher, cache_dir))
    hashes = file_hashes(path)
    return distributed.main_rank_first(lambda: stages.cut(path, hashes))


def run(config: RunConfig, watchdog: Watchdog, is_last: bool = True) -> dict[str, Any]:
    """Train the student of `config`, write its run folder, print the report; goes on where an earlier start ended.

    Raises ValueError for wrong input, GoOnLater where a signal stopped it.
    """
    try:
        with StopSignals(config.faults.grace_s).watched() as signals, sole_use(config.run_dir):
            summary = _run(config, signals, watchdog)
            if not is_last:  # a signal that came after the last step is not lost with this run
                _stop_if_asked(signals, f"after {config.name}, which is finished")
            return summary
    finally:
        gc.collect()  # engines are in cycles with their hooks
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run(config: RunConfig, signals: StopSignals, watchdog: Watchdog) -> dict[str, Any]:
    started_s = time.monotonic()
    watchdog.progress("loading")
    run_dir, is_main = config.run_dir, distributed.rank() == 0
    cache_dir, dtype, teacher_path, student_path, tokenizer, vocabulary, data = load_inputs(config)
    rows = None if isinstance(data.train, TextStream) else len(data.train)
    config = distributed.together(lambda: config.for_rows(rows))
    text, text_sha256 = distributed.main_rank_first(lambda: load_plain_text(config, tokenizer, cache_dir))
    distributed.check_alike(f"tokens of {config.data.source}", data.sha256)
    distributed.check_alike(f"tokens of {config.text.source}", text_sha256)
    base_path = "" if config.student.random_weights else student_path
    parts = identity(teacher_path, f"{data.sha256} {text_sha256}".strip(), dtype, base_path)
    if config.teacher.cache:
        parts = cache_identity(config, parts, data, tokenizer, vocabulary)
    distributed.check_shared(run_dir)
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, config.checkpoint.keep)
    resumed, notes = _find_start(config, checkpoints, parts)
    if summary := _finished(config, resumed, parts):
        return summary
    cache = open_cache(config) if config.teacher.cache else None
    if config.resume == "never":  # not before all input was found to be good
        checkpoints.clear()
    distributed.together(lambda: _start_folder(config, resumed) if is_main else None)

    teacher = build_teacher(config, teacher_path, dtype, vocabulary) if config.has_teacher else NoTeacher()
    measured = CachedTeacher(cache, temperature=1.0) if cache and not config.has_teacher else teacher
    student = build_student(config, student_path, dtype, vocabulary)
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
    rollout = student_rollout
    if settings.engine == "vllm":
        watchdog.progress("vLLM server")
        rollout = VllmRollout(config, student, tokenizer, vocabulary)
        rollout.start()
    timer = PhaseTimer(sync=torch.cuda.synchronize if torch.cuda.is_available() else None, watch=watchdog.progress)
    deepspeed_monitor = monitor_master(read_ds_config(config.student.ds_config), run_dir, distributed.rank())
    saved = {} if resumed is None else resumed.state
    done, keep_bytes = (0, None) if resumed is None else (saved["loop"]["done"], saved["metrics_bytes"])
    kept: dict[str, Any] = {"identity": parts, "before": saved.get("before"), "wall_time_s": 0.0}

    def run_state() -> dict[str, Any]:
        return kept | {"wall_time_s": saved.get("wall_time_s", 0.0) + time.monotonic() - started_s}

    with Monitor(
        run_dir, config.train.steps, distributed.rank(), deepspeed_monitor, start_step=done, keep_bytes=keep_bytes
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

                def between_files() -> None:
                    watchdog.progress("teacher_text")
                    _stop_if_asked(signals, GENERATING)

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
                settings.capacity, distributed.rank(), distributed.world(), config.seed, settings.max_age_steps
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

    wall_time_s = run_state()["wall_time_s"]
    phases = {name: timer.totals.get(name, 0.0) for name in (*TRAINING_PHASES, *OTHER_PHASES)}
    train_time_s = sum(timer.totals.values()) - sum(phases[name] for name in OTHER_PHASES)
    phases["other"] = wall_time_s - sum(phases.values())
    summary = {
        "steps": config.train.steps,
        "tokens": loop.tokens,
        "wall_time_s": wall_time_s,
        "train_time_s": train_time_s,
        "tokens_per_s": loop.tokens / train_time_s,
        "ranks": distributed.world(),
        "precision": str(dtype).removeprefix("torch."),
        "peak_rss_gib": distributed.sum_over_ranks([peak_rss_gib()])[0],
        "validation": {"initial": initial.metrics(), "final": final.metrics()},
        "best": loop.best and {"by": validation.best, **loop.best._asdict(), "student": str(run_dir / BEST)},
        "rouge_l": _rouge_scores(data, initial=before, final=after, **({"teacher": theirs} if theirs else {})),
        "time_share": {name: seconds / wall_time_s for name, seconds in phases.items()},
        "source_counts": loop.source_counts,
        "skipped_steps": loop.guard.skipped,
        "phi_final": schedule.phi,
        "phi_history": schedule.history,
        "data": data.counts,
        "identity": parts,
        "student": str(run_dir / "student"),
    }
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
        written = run_dir / "summary.json.unfinished"  # its presence says that the run is finished
        write_json(written, summary, indent=2)
        written.rename(run_dir / "summary.json")
        distributed.say("\n" + final_report(summary, samples))
    return summary


def chosen(recipe: Recipe, arguments: list[str]) -> RunConfig:
    """The recipe, or the one of its runs or stages that the first argument names, with the other arguments applied.

    Raises ValueError where it names none.
    """
    arguments = expanded(arguments)
    if isinstance(recipe, RunConfig):
        return recipe.with_overrides(arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments and "=" not in arguments[0] else ("", arguments)
    kind, known = ("stage", recipe.runs) if isinstance(recipe, Stages) else ("run", recipe)
    if not name:
        raise ValueError(f"this recipe has several {kind}s; name one first: {', '.join(known)}")
    if name not in known:
        raise unknown(kind, name, known)
    if isinstance(recipe, Stages):
        return recipe.with_overrides(rest).alone(name)
    return recipe[name].with_overrides(rest)


def _help(recipe: Recipe) -> dict[str, Any]:
    """Prints what the recipe says of itself, its runs, and its settings."""
    parts = [(getattr(sys.modules["__main__"], "__doc__", None) or "").strip()]
    parts.append(f"method=NAME stands for the settings of a method: {', '.join(METHODS)}.")
    settings = {"": recipe} if isinstance(recipe, RunConfig) else {}
    if isinstance(recipe, Stages):
        parts.append(
            f"Stages, one after another: {', '.join(recipe.names)}. The name of one before the settings runs it alone. "
            "\nsection.key=value is for all of them, STAGE.section.key=value for one."
        )
        parts.append("Settings of init, to be changed with init.key=value:")
        parts.append(yaml.safe_dump(dataclasses.asdict(recipe.init), sort_keys=False))
        settings = recipe.runs
    elif not settings:
        parts.append(f"Runs, one of which is named before the settings: {', '.join(recipe)}")
    for name, config in settings.items():
        parts.append(f"Settings{f' of {name}' if name else ''}, to be changed with section.key=value:")
        parts.append(yaml.safe_dump(config.to_dict(), sort_keys=False))
    if os.environ.get("RANK", "0") == "0":
        distributed.say("\n\n".join(parts))
    return {}


def _hang_s(recipe: Recipe, arguments: list[str]) -> float:
    """The watchdog's limit before the ranks have joined; settings that are wrong are told later, by one rank."""
    try:
        if not isinstance(recipe, Stages):
            return chosen(recipe, arguments).faults.hang_s
        overrides = expanded([text for text in arguments if "=" in text])
        return max(config.faults.hang_s for config in recipe.with_overrides(overrides).runs.values())
    except ValueError:
        return RunConfig().faults.hang_s


def quiet_libraries() -> None:
    """No warnings about what deepspeed calls in torch, no bars over weight shards: a run's own lines stay readable."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    transformers.utils.logging.disable_progress_bar()


def _checked(config: RunConfig) -> RunConfig:
    config.validate()
    config.accumulation(distributed.world())
    for section in (config.teacher, config.student) if config.has_teacher else (config.student,):
        read_ds_config(section.ds_config)
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
    changes = distributed.together(lambda: compare(found.state, config, parts))
    notes.append(f"goes on from {found.folder}, written by {found.world} ranks")
    return found, notes + [f"changed since then: {change}" for change in changes]


def _finished(config: RunConfig, resumed: Checkpoint | None, parts: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, though its checkpoints may have been deleted."""
    run_dir = config.run_dir
    files = [run_dir / name for name in ("summary.json", "config.yaml", "student/config.json")]
    if config.resume == "never" or not distributed.everywhere(all(file.is_file() for file in files)):
        return None
    summary = distributed.together(lambda: json.loads(files[0].read_text()))
    if resumed is None:
        if "identity" not in summary:
            return None
        saved = {"identity": summary["identity"], "config": yaml.safe_load(files[1].read_text())}
        distributed.together(lambda: compare(saved, config, parts))
    elif resumed.state["loop"]["done"] < config.train.steps:
        return None
    if distributed.rank() == 0:
        distributed.say(f"{files[0]} says that this run is finished; resume=never starts it over")
    return summary


def _stop_if_asked(signals: StopSignals, where: str) -> None:
    if signals.agreed():
        raise GoOnLater(f"stopped by a signal {where}")


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


def _ask(config: RunConfig, data: Data, rollout: GatheredRollout, tokenizer: Any) -> tuple[list[str], list[str]]:
    """(sampled answers to be scored, greedy answers to be shown) to the first validation rows."""
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


def _rouge_scores(data: Data, **answers: tuple[list[str], list[str]]) -> dict[str, float] | None:
    rows = len(answers["final"][0])
    if not rows:
        return None
    found = {name: _scores(data, sampled, "rouge_l")["rouge_l"] for name, (sampled, _) in answers.items()}
    return found | {"rows": rows}


def _micro_batches(config: RunConfig) -> str:
    if config.train.micro_tokens is not None:
        return f"at most {config.train.micro_tokens} tokens a micro-batch"
    world = distributed.world()
    count = config.accumulation(world)
    return f"{count} micro-batch{'es' if count > 1 else ''} of {config.micro_rows(world)} rows a step"


def _introduction(config: RunConfig, data: Data, dtype: torch.dtype, run_dir: Path) -> str:
    left_out = {name: count for name, count in data.counts.items() if count and not name.endswith("_rows")}
    return (
        f"{config.name}: {config.loss.divergence}, schedule {config.schedule.policy}, "
        f"{'streamed' if isinstance(data.train, TextStream) else len(data.train)} training and "
        f"{len(data.validation)} validation rows{f' ({left_out})' if left_out else ''}, "
        f"{_micro_batches(config)}, {distributed.world()} ranks, {str(dtype).removeprefix('torch.')}, folder {run_dir}"
    )
