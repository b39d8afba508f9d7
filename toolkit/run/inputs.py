"""What a run reads before it builds an engine: models, tokenizer, data, plain text, the teacher's stored answers;
each is checked on one rank and refused on all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from toolkit import models
from toolkit.batch import Example, round_up
from toolkit.data import Data, TextStream, end_with_turns, load_data, load_text
from toolkit.data.store import longest
from toolkit.divergences import Divergence
from toolkit.models import Vocabulary, load_tokenizer
from toolkit.models.files import source_folder
from toolkit.models.identity import RunIdentity
from toolkit.models.load import resolve
from toolkit.pruning.made import materialize
from toolkit.ranks import collectives
from toolkit.run.checkpoint import identity
from toolkit.run.summary import SUMMARY
from toolkit.settings import NO_DIVERGENCE, RunConfig
from toolkit.storage.manifest import read_json
from toolkit.teachers.cache import TeacherCache, identity_of


@dataclass(frozen=True)
class Inputs:
    """What a command reads of a recipe's settings before it builds an engine."""

    cache_dir: Path
    dtype: torch.dtype
    teacher_path: str  # "" where no teacher is named, or none is loaded and none of its files are here
    student_path: str
    tokenizer: PreTrainedTokenizerBase  # the student's
    vocabulary: Vocabulary
    data: Data


@dataclass(frozen=True)
class RunInputs(Inputs):
    """What a run reads beside that."""

    text: Sequence[Example] | TextStream | None  # plain text that is learned beside the distillation
    identity: RunIdentity  # what makes the run this one, beside its settings


def load_inputs(config: RunConfig) -> Inputs:
    """Models' folders, tokenizer, vocabulary and data. Collective.

    Raises ValueError on every rank for a model, a tokenizer or data that cannot be used.
    """
    # The cache folder has to be one for all ranks, or each node makes all of it for itself, every rank at once.
    cache_dir = models.default_cache_dir(config.cache_dir)
    collectives.together(lambda: cache_dir.mkdir(parents=True, exist_ok=True) if collectives.rank() == 0 else None)
    collectives.check_shared(cache_dir)

    # The models come first, since the data is read with their tokenizers.
    teacher_path = ""
    if config.has_teacher:
        teacher_path = collectives.main_rank_first(lambda: materialize(config.teacher, cache_dir))
    elif config.teacher.cache and config.teacher.path:
        teacher_path = collectives.main_rank_first(lambda: _what_is_here(config, cache_dir))
    student_path = collectives.main_rank_first(lambda: materialize(config.student, cache_dir, config.data))
    tokenizer, vocabulary = collectives.together(lambda: _tokenizer(config, teacher_path, student_path))
    data = collectives.main_rank_first(lambda: _load_data(config, tokenizer, vocabulary, cache_dir))
    collectives.together(lambda: _check_positions(config, data, teacher_path, student_path))
    dtype = models.choose_dtype(config.precision, collectives.device())
    return Inputs(cache_dir, dtype, teacher_path, student_path, tokenizer, vocabulary, data)


def load_run_inputs(config: RunConfig) -> tuple[RunConfig, RunInputs]:
    """What a run reads, and `config` with the number of steps that its rows make. Collective; raises as `load_inputs`.

    Raises ValueError where ranks have read different data under the same name, too.
    """
    inputs = load_inputs(config)
    data, train = inputs.data, inputs.data.train
    rows = None if isinstance(train, TextStream) else len(train)
    config = collectives.together(lambda: config.for_rows(rows))
    # Plain text may be learned beside the data. All ranks have to have read the same of both.
    text, text_sha256 = collectives.main_rank_first(lambda: load_plain_text(config, inputs.tokenizer, inputs.cache_dir))
    collectives.check_alike(f"tokens of {config.data.source}", data.sha256)
    collectives.check_alike(f"tokens of {config.text.source}", text_sha256)

    # A later start compares what its run is made of with this identity.
    base_path = "" if config.student.random_weights else inputs.student_path
    parts = identity(inputs.teacher_path, f"{data.sha256} {text_sha256}".strip(), inputs.dtype, base_path)
    if config.teacher.cache:
        parts = cache_identity(config, parts, data, inputs.tokenizer, inputs.vocabulary)
    return config, RunInputs(**vars(inputs), text=text, identity=parts)


def _what_is_here(config: RunConfig, cache_dir: Path) -> str:
    """The folder of a teacher that is not loaded, "" where it is not here. Its files are compared with the cache's, so
    far as there are any; none is fetched but the tokenizer, for a student without one of its own."""
    teacher = config.teacher
    asks_tokenizer = not (config.student.path or config.student.tokenizer or teacher.tokenizer)
    try:
        path = resolve(teacher.path)
        is_here = Path(path).exists()
        if path.endswith(".gguf") or teacher.drop_layers or teacher.init.wanted:  # a folder that is made of it
            return materialize(teacher, cache_dir) if is_here or asks_tokenizer else ""
        return path if is_here else str(source_folder(path, with_weights=False, may_fetch=asks_tokenizer))
    except (OSError, ValueError) as error:
        if asks_tokenizer:
            raise ValueError(
                f"the student has no tokenizer of its own, and that of the teacher {teacher.path} could not be had: "
                f"{error}; set student.tokenizer"
            ) from error
        return ""


def _tokenizer(config: RunConfig, teacher_path: str, student_path: str) -> tuple[PreTrainedTokenizerBase, Vocabulary]:
    """The student's tokenizer, the teacher's where it has none of its own, and what the two share."""
    # A teacher whose answers are stored is asked for its tokenizer only where the student has none.
    has_own = bool(config.student.tokenizer or student_path)
    asks_teacher = config.has_teacher or (config.teacher.cache and not has_own)
    teacher = load_tokenizer(config.teacher, teacher_path) if asks_teacher else None
    student = load_tokenizer(config.student, student_path) if has_own or teacher is None else teacher
    for tokenizer in (teacher or student, student):
        end_with_turns(tokenizer, config.data.template if config.data.kind == "instructions" else "")

    # Rows are laid out alike for both models, and their vocabularies are one.
    layout = models.row_layout(config.student, student_path)
    theirs = models.row_layout(config.teacher, teacher_path) if config.has_teacher else layout
    layout.check_use(packing=config.packs)
    ends = [end for path in {teacher_path, student_path} for end in models.generation_ends(path)]
    vocabulary = models.shared_vocabulary(teacher or student, student, ends)
    return student, vocabulary._replace(layout=models.shared_layout(theirs, layout))


def _load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, cache_dir: Path) -> Data:
    data = load_data(config.data, tokenizer, config.seed, cache_dir / "tokens", vocabulary.layout)
    if isinstance(data.train, TextStream):
        data.train.check(collectives.rank(), collectives.world())  # now, not at the first step
    elif len(data.train) < config.train.rows_per_step:
        raise ValueError(
            f"{config.data.source} leaves {len(data.train)} training rows, fewer than train.rows_per_step = "
            f"{config.train.rows_per_step} ({collectives.world()} ranks); use more data, fewer ranks or a smaller batch"
        )
    return data


def _check_positions(config: RunConfig, data: Data, teacher_path: str, student_path: str) -> None:
    """Of the longest text that a run can meet: of the data, generated, or plain."""
    # The longest row counts, of the data and of plain text. A stream may bring rows of any length that is allowed.
    parts = [part for part in (data.train, data.validation) if not isinstance(part, TextStream)]
    rows, prompts = (max(lengths) for lengths in zip(*map(longest, parts), strict=True))
    if len(parts) < 2:
        rows = config.data.max_length
    if config.text.source:
        rows = max(rows, config.text.max_length)

    # Batches are padded to a multiple of 8, and generated text comes after the longest prompt.
    padded = round_up(rows, 8)
    if config.generates:
        padded = max(padded, prompts + config.max_new_tokens)
    if config.has_teacher:
        models.check_positions("teacher", config.teacher, teacher_path, padded)
    models.check_positions("student", config.student, student_path, padded)


def load_plain_text(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
) -> tuple[Sequence[Example] | TextStream | None, str]:
    """The blocks or the stream of text.source, and the SHA-256 of its tokens; (None, "") where it is empty. No
    communication. Raises ValueError for fewer blocks than a step takes."""
    text, sha256 = load_text(config.text, tokenizer, config.data.cache_dir, cache_dir / "tokens")
    if isinstance(text, TextStream):
        text.check(collectives.rank(), collectives.world())
    elif text is not None and len(text) < config.text_rows:
        raise ValueError(
            f"{config.text.source} makes {len(text)} blocks of text.max_length = {config.text.max_length} tokens, "
            f"fewer than the {config.text_rows} of a step (text.rows_per_step); use more text or a smaller batch"
        )
    return text, sha256


def cache_identity(
    config: RunConfig, parts: RunIdentity, data: Data, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> RunIdentity:
    """The run's identity `parts`, with what the cache says of its teacher. Only the manifest is read, and checked to be
    for this run. Where the cache was deleted after the run had finished, the run's summary says it. Collective."""
    folder, summary = Path(config.teacher.cache).expanduser(), config.run_dir / SUMMARY

    def known() -> dict[str, Any]:
        vocabulary.layout.check_use(cache=True)
        cache, loss = TeacherCache(folder), config.loss
        cache.check_belongs(identity_of(
            config.teacher, config.seed, parts["teacher_sha256"], data.sha256, tokenizer, vocabulary, loss.temperature
        ))  # fmt: skip
        if loss.divergence != NO_DIVERGENCE:
            for alpha in (loss.alpha, loss.alpha if loss.alpha_end is None else loss.alpha_end):
                cache.form.check_divergence(Divergence(loss.divergence, alpha=alpha))
        return cache.identity | {"teacher_cache": cache.sha256}

    # If the cache is gone, the summary of the finished run says what it was.
    found: dict[str, Any] = {}
    if config.resume != "never" and not collectives.anywhere(TeacherCache.is_in(folder)):
        saved = collectives.together(lambda: read_json(summary) if summary.is_file() else {})
        found = collectives.gather_objects(saved.get("identity", {}))[0]
    if "teacher_cache" in found:
        found["teacher_sha256"] |= parts["teacher_sha256"]  # files that are here have to be the same ones still
    else:
        found = collectives.together(known)
    names = ["teacher_cache"] if config.has_teacher else ["teacher_cache", "teacher_path", "teacher_sha256"]
    return cast(RunIdentity, parts | {name: found[name] for name in names})


def open_cache(config: RunConfig) -> TeacherCache:
    """The cache, checked to be whole, with its index. Collective."""

    def opened() -> TeacherCache:
        cache = TeacherCache(Path(config.teacher.cache).expanduser())
        cache.check(collectives.rank(), collectives.world())
        cache.read_index()
        return cache

    return collectives.together(opened)
