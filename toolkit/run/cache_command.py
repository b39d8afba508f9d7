"""`python -m toolkit cache-teacher`: a teacher's answers to a recipe's data, for `teacher.cache=DIR` of that recipe."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.data import TextStream
from toolkit.models.identity import file_hashes
from toolkit.ranks import collectives
from toolkit.ranks.output import say
from toolkit.ranks.signals import GoOnLater, StopSignals
from toolkit.ranks.watchdog import Watchdog
from toolkit.run.inputs import load_inputs
from toolkit.run.recipe import chosen, read_recipe
from toolkit.settings import RunConfig
from toolkit.settings.ds_files import read_ds_config
from toolkit.teachers.cache import Form, TeacherCache, build, identity_of, plan
from toolkit.teachers.cache.build import refuse_existing
from toolkit.teachers.live import build_teacher


def cache_teacher(
    recipe: str, settings: Sequence[str], out: Path, *, top_k: int, draws: int, shard_tokens: int
) -> dict[str, Any]:
    """Makes the cache of `recipe` with `settings` in the folder `out`, unless it is there, and returns its manifest.
    Collective.

    top_k, draws: see Form. shard_tokens: response tokens of a file.

    Raises ValueError for wrong input; GoOnLater where a signal stopped it, after the shards in work.
    """
    config, folder = collectives.together(lambda: _config(recipe, settings, shard_tokens)), out.expanduser()
    form = Form(top_k, draws, config.seed if draws else 0)
    with Watchdog(config.faults.hang_s) as watchdog, StopSignals(config.faults.grace_s).watched() as signals:
        return _run(config, form, shard_tokens, folder, watchdog, signals)


def _run(
    config: RunConfig, form: Form, shard_tokens: int, folder: Path, watchdog: Watchdog, signals: StopSignals
) -> dict[str, Any]:
    started_s, is_main = time.monotonic(), collectives.rank() == 0

    # Read what the teacher is to answer. Rank 0 says whether the folder is there: over NFS others may not see it yet.
    watchdog.progress("loading")
    if not collectives.from_main_rank(lambda: TeacherCache.is_in(folder)):
        collectives.together(lambda: refuse_existing(folder))
    inputs = load_inputs(config)
    vocabulary, data, temperature = inputs.vocabulary, inputs.data, config.loss.temperature
    collectives.together(lambda: form.validate(vocabulary.size))
    vocabulary.layout.check_use(cache=True)
    if isinstance(data.train, TextStream):
        raise ValueError("data.streaming = true: a stream's texts are not known; set it to false")

    def identity() -> dict[str, Any]:
        return {
            "form": dataclasses.asdict(form),
            **identity_of(config.teacher, config.seed, file_hashes(inputs.teacher_path), data.sha256, inputs.tokenizer,
                          vocabulary, temperature),
            "teacher_path": inputs.teacher_path,
            "precision": str(inputs.dtype).removeprefix("torch."),
            "batch_rows": config.validation.rows_per_pass,
            "shard_tokens": shard_tokens,
        }  # fmt: skip

    # If the cache is finished already, it has to be the one that was asked for.
    if collectives.from_main_rank(lambda: TeacherCache.is_in(folder)):
        now = identity()
        return collectives.from_main_rank(lambda: _finished(folder, now))

    # Plan the shards, and load the teacher. Validation is at temperature 1, whatever is trained at.
    parts = [(data.train, temperature), (data.validation, 1.0)]
    shards = collectives.together(lambda: plan(parts, vocabulary.pad_id, config.validation.rows_per_pass, shard_tokens))
    teacher = build_teacher(config, inputs.teacher_path, inputs.dtype, vocabulary)
    watchdog.count_passes(teacher.model)

    def between_shards(done: int, count: int, tokens_per_s: float) -> None:
        watchdog.progress("teacher cache", done)
        if signals.agreed():
            raise GoOnLater(f"stopped by a signal after {done} of {count} shards of {folder}")
        if is_main:
            say(f"{done} of {count} shards, {tokens_per_s:,.0f} tokens/s")

    # The teacher's files are all here now, also those of a hub name.
    build(folder, identity(), shards, teacher, vocabulary, form, between_shards)
    manifest = collectives.from_main_rank(lambda: TeacherCache(folder).manifest)
    if is_main:
        say(f"{_summary(folder, form, manifest)}, made in {time.monotonic() - started_s:.1f} s")
    return manifest


def _config(recipe: str, settings: Sequence[str], shard_tokens: int) -> RunConfig:
    config = chosen(read_recipe(recipe), list(settings)).with_overrides(["teacher.cache="])
    if shard_tokens < 1:
        raise ValueError(f"--shard-tokens {shard_tokens}; it has to be at least 1")
    if config.data.responses != "data":
        raise ValueError(f'data.responses = {config.data.responses!r} are not the texts of the data; set it to "data"')
    config.validate()
    config.teacher.validate("teacher")
    read_ds_config(config.teacher.ds_config)
    return config


def _finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    cache = TeacherCache(folder)
    cache.check_belongs(identity)
    say(f"{_summary(folder, cache.form, cache.manifest)}, was finished before")
    return cache.manifest


def _summary(folder: Path, form: Form, manifest: dict[str, Any]) -> str:
    positions, size = manifest["positions"], manifest["bytes"]
    return (
        f"{folder}: {form} of {positions:,} positions in {manifest['texts']:,} texts, {size:,} bytes, "
        f"{size / positions:.1f} a position"
    )
