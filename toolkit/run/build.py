"""Builds everything that a run works with from its config, once; the only place that does."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from toolkit.evaluation import Validator
from toolkit.models import Student, Vocabulary, build_student, check_packing
from toolkit.models.ds_config import student_ds_config, teacher_ds_config
from toolkit.models.export import export_student, rehearse_export
from toolkit.ranks import collectives
from toolkit.ranks.watchdog import Watchdog
from toolkit.rollout.check import check_generation
from toolkit.rollout.local import GatheredRollout, Rollout
from toolkit.rollout.replay import ReplayBuffer, local_capacity
from toolkit.rollout.schedule import Schedule, Source
from toolkit.rollout.vllm import VllmRollout
from toolkit.run.held_out import HeldOutPrompts
from toolkit.run.inputs import RunInputs
from toolkit.run.monitor import Monitor, monitor_master
from toolkit.run.state import LoopState
from toolkit.run.timer import PhaseTimer
from toolkit.settings import NO_DIVERGENCE, SCORES, RunConfig
from toolkit.settings.ds_files import check_sharding, read_ds_config
from toolkit.teachers.cache import CachedTeacher, TeacherCache
from toolkit.teachers.live import NoTeacher, Teacher, build_teacher

#: who says in a training step, or in a validation, what the student is to learn
AnyTeacher = Teacher | NoTeacher | CachedTeacher


@dataclass(frozen=True)
class Parts:
    """What a run works with. What changes from step to step is in LoopState, the replay buffer and the models."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    student: Student
    teacher: Teacher | NoTeacher  # the one that is loaded
    teachers: Mapping[Source, AnyTeacher]  # the one that a training step asks, by where its rows come from
    student_rollout: GatheredRollout
    teacher_rollout: GatheredRollout | None
    rollout: Rollout  # makes the student text of training steps: student_rollout, or a server's
    schedule: Schedule
    replay: ReplayBuffer
    validator: Validator
    held_out: HeldOutPrompts
    timer: PhaseTimer
    watchdog: Watchdog
    monitor: Monitor  # opened; it has to be closed
    notes: list[str]  # what the user should know of what was built

    def export(self, folder: str) -> None:
        """Write the student as it is to this folder of the run's. Collective; raises ValueError as `export_student`."""
        export_student(self.student, self.tokenizer, self.config.run_dir / folder)


def checked(config: RunConfig) -> RunConfig:
    """`config`, as far as it can be checked without its models and data. Raises ValueError."""
    config.validate()
    student_ds_config(config, "bf16", collectives.world())
    if config.has_teacher:
        teacher_ds_config(config, "bf16")
        check_sharding("teacher", config.teacher.ds_config, config.teacher.sharding)
    if config.schedule.policy != "off":
        local_capacity(config.rollout.capacity, 0, collectives.world())
    check_sharding("student", config.student.ds_config, config.student.sharding)
    return config


def build(
    config: RunConfig, inputs: RunInputs, cache: TeacherCache | None, state: LoopState, watchdog: Watchdog
) -> Parts:
    """Builds all parts of a run that is at `state`. The student has its weights from before training; those of a
    checkpoint are loaded later, by `DistillationLoop.resume`. Collective.

    Raises ValueError on every rank for models that do not fit the settings, the data, or what is asked of them.
    """
    vocabulary, tokenizer, run_dir = inputs.vocabulary, inputs.tokenizer, config.run_dir
    # Before the models are loaded: a service that is not installed is told in seconds.
    sections = read_ds_config(config.student.ds_config)
    deepspeed_monitor = collectives.together(lambda: monitor_master(sections, run_dir, collectives.rank()))

    # The two engines. The student can be written to the run's folder, which is tried now and not after hours.
    paths, dtype = (inputs.teacher_path, inputs.student_path), inputs.dtype
    teacher = build_teacher(config, paths[0], dtype, vocabulary) if config.has_teacher else NoTeacher()
    student = build_student(config, paths[1], dtype, vocabulary)
    notes = rehearse_export(student, tokenizer, run_dir / "student")
    for role, built in (("student", student), ("teacher", teacher)):
        if not isinstance(built, NoTeacher):
            watchdog.count_passes(built.model)
            if config.packs:
                check_packing(role, built.engine, vocabulary)

    # Who answers in a training step and in a validation: the teacher, its stored answers, or nobody.
    is_fine_tuning = config.loss.divergence == NO_DIVERGENCE
    teachers: dict[Source, AnyTeacher] = dict.fromkeys(Source, NoTeacher() if is_fine_tuning else teacher)
    validates: AnyTeacher = teacher
    if cache and not is_fine_tuning:
        teachers[Source.DATASET] = CachedTeacher(cache, config.loss.temperature)
    if cache and not config.has_teacher:
        validates = CachedTeacher(cache, temperature=1.0)

    student_rollout, teacher_rollout = _rollouts(config, student, teacher, vocabulary)
    rollout: Rollout = student_rollout
    if config.rollout.engine == "vllm":
        watchdog.progress("vLLM server")
        rollout = VllmRollout(config, student, tokenizer, vocabulary)
        rollout.start()

    # A validation may choose the best student by a score of its answers.
    held_out = HeldOutPrompts(config, inputs.data, tokenizer)
    by, limits = config.validation.best, config.rollout

    def scores() -> dict[str, float]:
        return {by: held_out.score(by, held_out.sample(student_rollout))}

    return Parts(
        config=config, tokenizer=tokenizer, vocabulary=vocabulary, student=student, teacher=teacher, teachers=teachers,
        student_rollout=student_rollout, teacher_rollout=teacher_rollout, rollout=rollout,
        schedule=Schedule(config.schedule, config.seed, config.train.steps, state.schedule),
        replay=ReplayBuffer(
            limits.capacity, collectives.rank(), collectives.world(), config.seed, limits.max_age_steps
        ),
        validator=Validator(
            list(inputs.data.validation[: config.validation.rows]), config.validation.rows_per_pass, vocabulary.pad_id,
            validates, scores if by in SCORES else None, vocabulary.layout,
        ),
        held_out=held_out,
        timer=PhaseTimer(
            sync=torch.cuda.synchronize if torch.cuda.is_available() else None, watch=watchdog.progress,
            totals=state.seconds,
        ),
        watchdog=watchdog,
        monitor=Monitor(
            run_dir, config.train.steps, collectives.rank(), deepspeed_monitor, start_step=state.done,
            keep_bytes=state.metrics_bytes,
        ),
        notes=notes,
    )  # fmt: skip


def _rollouts(
    config: RunConfig, student: Student, teacher: Teacher | NoTeacher, vocabulary: Vocabulary
) -> tuple[GatheredRollout, GatheredRollout | None]:
    """What makes the models of this machine speak; of each that will have to, it is checked that it can. Collective."""
    limits = config.rollout.rows_at_once, config.rollout.cache_mib, config.rollout.gather
    student_rollout = GatheredRollout(student.engine, vocabulary, *limits)
    if config.generates:
        check_generation("student", student_rollout)
    if isinstance(teacher, NoTeacher):
        return student_rollout, None
    teacher_rollout = GatheredRollout(teacher.engine, vocabulary, *limits)
    if config.asks_models or config.data.responses == "teacher":
        check_generation("teacher", teacher_rollout)
    return student_rollout, teacher_rollout
