"""A run from its config: builds every object, once; trains; measures; exports. `main` is what a recipe calls."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from toolkit import distributed
from toolkit.checkpoint import Checkpoint, Checkpoints, compare, identity
from toolkit.config import RunConfig
from toolkit.data import Data, PromptDataset, load_data
from toolkit.evaluation import Validator, answer, rouge_l
from toolkit.faults import EXIT_LATER, GoOnLater, StepGuard, StopSignals, Watchdog
from toolkit.loop import DistillationLoop
from toolkit.models import Vocabulary, build_student, build_teacher, load_tokenizer, materialize, shared_vocabulary
from toolkit.models.ds_config import read_ds_config
from toolkit.models.export import export_student
from toolkit.models.load import cache_folder
from toolkit.monitor import Monitor, PhaseTimer, monitor_master, peak_rss_gib
from toolkit.report import Sample, final_report
from toolkit.rollout.engine import GatheredRollout
from toolkit.rollout.replay import ReplayBuffer
from toolkit.rollout.schedule import Schedule

TRAINING_PHASES = ("teacher", "rollout", "student", "optimizer")
OTHER_PHASES = ("validation", "evaluation", "checkpoint", "export")
CHECKPOINTS = "checkpoints"


def main(recipe: RunConfig, arguments: list[str] | None = None) -> dict[str, Any]:
    """Run `recipe` with `section.key=value` arguments (the command line's by default), on every rank.

    Returns the summary. Wrong input ends every rank with exit code 2 and one message; a run that a signal stopped ends
    with EXIT_LATER, and the same command goes on with it.
    """
    given = sys.argv[1:] if arguments is None else arguments
    overrides = [text for text in given if not text.startswith("--local_rank")]  # the deepspeed launcher's own
    _quiet_libraries()
    try:
        with Watchdog(_hang_s(recipe, overrides)) as watchdog:
            distributed.start()
            return run(distributed.together(lambda: _checked(recipe, overrides)), watchdog)
    except GoOnLater as stopped:
        if distributed.rank() == 0:
            print(f"{stopped}; the same command goes on from there (exit code {EXIT_LATER})", flush=True)
        sys.exit(EXIT_LATER)
    except ValueError as error:
        if distributed.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if os.environ.get("DISTILL_TRACEBACK"):
            raise
        sys.exit(2)
    finally:
        distributed.stop()


def run(config: RunConfig, watchdog: Watchdog) -> dict[str, Any]:
    """Train the student of `config`, write its run folder, print the report; goes on where an earlier start ended.

    Raises ValueError for wrong input, GoOnLater where a signal stopped it.
    """
    with StopSignals(config.faults.grace_s).watched() as signals:
        return _run(config, signals, watchdog)


def _run(config: RunConfig, signals: StopSignals, watchdog: Watchdog) -> dict[str, Any]:
    started_s = time.monotonic()
    watchdog.progress("loading")
    run_dir, is_main = config.run_dir, distributed.rank() == 0
    cache_dir = cache_folder(config.cache_dir)
    dtype = choose_dtype(config.precision, distributed.device())

    teacher_path = distributed.main_rank_first(lambda: materialize(config.teacher, cache_dir))
    student_path = distributed.main_rank_first(lambda: materialize(config.student, cache_dir, config.data))
    tokenizer, vocabulary = distributed.together(lambda: _tokenizer(config, teacher_path, student_path))
    data = distributed.main_rank_first(lambda: _load_data(config, tokenizer))
    parts = identity(teacher_path, data, dtype)
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, config.checkpoint.keep)
    resumed, notes = _find_start(config, checkpoints, parts)
    if resumed is not None and (summary := _finished(config, resumed)):
        return summary
    distributed.together(lambda: _start_folder(config, resumed) if is_main else None)

    teacher = build_teacher(config, teacher_path, dtype, vocabulary)
    student = build_student(config, student_path, dtype, vocabulary)
    schedule = Schedule(config.schedule, config.seed, config.train.steps)
    settings = config.rollout
    validation = config.validation
    limits = settings.batch_rows, settings.cache_mib, settings.gather
    student_rollout = GatheredRollout(student.engine, vocabulary, *limits)
    teacher_rollout = GatheredRollout(teacher.engine, vocabulary, *limits)
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
        for note in notes:
            monitor.note(note)
        loop = DistillationLoop(
            config=config,
            vocabulary=vocabulary,
            dataset=PromptDataset(data.train, config.seed),
            teacher=teacher,
            student=student,
            schedule=schedule,
            replay=ReplayBuffer(
                settings.capacity, distributed.rank(), distributed.world(), config.seed, settings.max_age_steps
            ),
            rollout=student_rollout,
            validator=Validator(data.validation[: validation.rows], validation.batch_rows, vocabulary.pad_id),
            monitor=monitor,
            timer=timer,
            checkpoints=checkpoints,
            signals=signals,
            guard=StepGuard(config.faults),
            run_state=run_state,
            watch=watchdog.progress,
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
            _stop_if_asked(signals)
            theirs = _ask(config, data, teacher_rollout, tokenizer)
        _stop_if_asked(signals)
        with timer.phase("export"):
            export_student(student, tokenizer, run_dir / "student")
        timer.take()

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
        "validation": {"initial": initial._asdict(), "final": final._asdict()},
        "rouge_l": _rouge_scores(config, data, before, after, theirs),
        "time_share": {name: seconds / wall_time_s for name, seconds in phases.items()},
        "source_counts": loop.source_counts,
        "skipped_steps": loop.guard.skipped,
        "phi_final": schedule.phi,
        "phi_history": schedule.history,
        "data": data.counts,
        "student": str(run_dir / "student"),
    }
    samples = [
        Sample(
            data.validation_rows[i]["prompt"],
            data.validation_rows[i]["response"],
            theirs[1][i],
            before[1][i],
            after[1][i],
        )
        for i in range(len(after[1]))
    ]
    if is_main:
        written = run_dir / "summary.json.unfinished"  # its presence says that the run is finished
        written.write_text(json.dumps(summary, indent=2))
        written.rename(run_dir / "summary.json")
        print("\n" + final_report(summary, samples), flush=True)
    return summary


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where the device multiplies it in hardware: elsewhere it is many times slower than fp32."""
    if precision == "auto":
        if device.type == "cpu":
            has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        else:
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _hang_s(recipe: RunConfig, overrides: list[str]) -> float:
    """The watchdog's limit before the ranks have joined; settings that are wrong are told later, by one rank."""
    try:
        return recipe.with_overrides(overrides).faults.hang_s
    except ValueError:
        return recipe.faults.hang_s


def _quiet_libraries() -> None:
    """No warnings about what deepspeed calls in torch, no bars over weight shards: a run's own lines stay readable."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    transformers.utils.logging.disable_progress_bar()


def _checked(recipe: RunConfig, overrides: list[str]) -> RunConfig:
    config = recipe.with_overrides(overrides)
    config.validate()
    config.accumulation(distributed.world())
    for section in (config.teacher, config.student):
        read_ds_config(section.ds_config)
    return config


def _tokenizer(config: RunConfig, teacher_path: str, student_path: str) -> tuple[Any, Vocabulary]:
    """The student's tokenizer, the teacher's where it has none of its own, and what the two share."""
    teacher = load_tokenizer(config.teacher, teacher_path)
    has_own = config.student.tokenizer or student_path
    student = load_tokenizer(config.student, student_path) if has_own else teacher
    return student, shared_vocabulary(teacher, student)


def _load_data(config: RunConfig, tokenizer: Any) -> Data:
    data = load_data(config.data, tokenizer, config.seed)
    if len(data.train) < config.train.batch_rows:
        raise ValueError(
            f"{config.data.source} leaves {len(data.train)} training rows, fewer than train.batch_rows = "
            f"{config.train.batch_rows} ({distributed.world()} ranks); use more data, fewer ranks or a smaller batch"
        )
    return data


def _find_start(
    config: RunConfig, checkpoints: Checkpoints, parts: dict[str, Any]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, None for a run from the start, and what the user should know of the choice."""
    if config.resume == "never":
        checkpoints.clear()
        return None, []
    found, passed_over = checkpoints.newest()
    notes = [f"warning: {text}; an older checkpoint is used" for text in passed_over]
    if found is None:
        return None, notes
    changes = distributed.together(lambda: compare(found.state, config, parts))
    notes.append(f"goes on from {found.folder}, written by {found.world} ranks")
    return found, notes + [f"changed since then: {change}" for change in changes]


def _finished(config: RunConfig, resumed: Checkpoint) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    file = config.run_dir / "summary.json"
    if resumed.state["loop"]["done"] < config.train.steps or not file.is_file():
        return None
    if distributed.rank() == 0:
        print(f"{file} says that this run is finished; resume=never starts it over", flush=True)
    return distributed.together(lambda: json.loads(file.read_text()))


def _stop_if_asked(signals: StopSignals) -> None:
    if signals.agreed():
        raise GoOnLater("stopped by a signal after the last step, before the student was exported")


def _start_folder(config: RunConfig, resumed: Checkpoint | None) -> None:
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "summary.json").unlink(missing_ok=True)
    if resumed is None:
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(run_dir / "skipped", ignore_errors=True)
    config.save(run_dir / "config.yaml")


def _ask(config: RunConfig, data: Data, rollout: GatheredRollout, tokenizer: Any) -> tuple[list[str], list[str]]:
    """(sampled answers to be scored, greedy answers to be shown) to the first validation rows."""
    settings, prompts = config.validation, [example.prompt for example in data.validation]
    rouge_rows, samples = prompts[: settings.rouge_rows], prompts[: settings.samples]
    sampled = answer(
        rollout, tokenizer, rouge_rows, config.max_new_tokens, settings.sampling_temperature, config.seed
    ) if rouge_rows else []  # fmt: skip
    return sampled, answer(rollout, tokenizer, samples, config.max_new_tokens, 0.0, config.seed) if samples else []


def _rouge_scores(
    config: RunConfig, data: Data, before: tuple, after: tuple, teacher: tuple
) -> dict[str, float] | None:
    if not after[0]:
        return None
    references = [row["response"] for row in data.validation_rows[: config.validation.rouge_rows]]
    named = {"initial": before, "final": after, "teacher": teacher}
    return {name: rouge_l(answers[0], references) for name, answers in named.items()} | {"rows": len(references)}


def _introduction(config: RunConfig, data: Data, dtype: torch.dtype, run_dir: Path) -> str:
    left_out = {name: count for name, count in data.counts.items() if count and not name.endswith("_rows")}
    return (
        f"{config.name}: {config.loss.divergence}, schedule {config.schedule.policy}, "
        f"{len(data.train)} training and {len(data.validation)} validation rows{f' ({left_out})' if left_out else ''}, "
        f"{distributed.world()} ranks, {str(dtype).removeprefix('torch.')}, folder {run_dir}"
    )
