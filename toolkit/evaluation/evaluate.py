"""`python -m toolkit evaluate`: several models answer one data set and are scored in one table; answers are kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.batch import Example, RowLayout
from toolkit.data import end_with_turns, load_rows, references, tokenize_rows
from toolkit.data.sources import Row
from toolkit.evaluation.answers import answer, row_seeds, score_rows
from toolkit.evaluation.metrics import METRICS, metric, spread
from toolkit.evaluation.protocols import PROTOCOLS
from toolkit.evaluation.records import Records, refuse_changes
from toolkit.evaluation.validation import Validator
from toolkit.models import (
    Vocabulary,
    choose_dtype,
    default_cache_dir,
    generation_ends,
    load_model,
    load_tokenizer,
    row_layout,
    shared_layout,
    shared_vocabulary,
    whole_student,
)
from toolkit.models.identity import file_hashes
from toolkit.pruning.made import materialize
from toolkit.ranks import collectives
from toolkit.ranks.watchdog import Watchdog
from toolkit.rollout.check import check_generation
from toolkit.rollout.local import GatheredRollout
from toolkit.settings import EvaluationConfig, ModelConfig
from toolkit.settings.overrides import unknown
from toolkit.storage.lock import sole_use
from toolkit.tables import format_table
from toolkit.teachers.live import whole_teacher

KL = "kl"  # measured on the data's own responses, without generation


def evaluate(
    models: Sequence[str],
    data: str,
    out: Path,
    *,
    metric: str,
    seeds: str,
    protocol: str,
    teacher: str,
    settings: Sequence[str],
) -> dict[str, Any]:
    """The summary; on rank 0 it is printed as a table and written beside the answers. Collective.

    models: folders or hub names. data: a file or a name. out: a .jsonl file or a folder. metric, seeds:
    comma-separated. teacher: "" is none. settings: `key=value` over those of the protocol. Raises ValueError for wrong
    input.
    """
    # What is asked for, and the rows, checked before any model is loaded.
    request = collectives.together(
        lambda: Request.of(data, settings, metric=metric, seeds=seeds, protocol=protocol, teacher=teacher)
    )
    collectives.together(lambda: _unique("--model", models))
    records, source = Records(out.expanduser()), request.config.data
    rows, skipped = collectives.main_rank_first(lambda: load_rows(source, source.source, is_validation=True))
    made_with = request.settings(rows, skipped)
    # One job at a time writes there; it goes on from what an earlier one has left.
    alone = sole_use(records.lock.parent, name=records.lock.name, instead="give --out another name")
    with alone, Watchdog(request.config.hang_s) as watchdog:
        watchdog.progress("loading")
        summary = collectives.from_main_rank(lambda: records.open(made_with))
        loaded = _Loaded.load(teacher, request.config) if teacher else None
        evaluation = Evaluation(request, rows, records, summary, loaded, watchdog)
        for name in models:
            watchdog.progress(f"model {name}")
            evaluation.measure(name)
    if collectives.rank() == 0:
        print("\n" + table(summary, models, request), flush=True)
    return summary


@dataclass(frozen=True)
class Request:
    """What is asked for, checked."""

    config: EvaluationConfig
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, data: str, settings: Sequence[str], *, metric: str, seeds: str, protocol: str, teacher: str) -> Request:
        """The arguments of `evaluate`. Raises ValueError for the first one that cannot work."""
        if protocol not in PROTOCOLS:
            raise unknown("--protocol", protocol, PROTOCOLS)
        base = PROTOCOLS[protocol]
        config = replace(base, data=replace(base.data, source=data)).with_overrides(settings)
        config.validate()
        metrics = _unique("--metric", metric.split(","))
        for name in metrics:
            if name not in METRICS and name != KL:
                raise unknown("--metric", name, [*METRICS, KL])
        if (KL in metrics) != bool(teacher):
            raise ValueError(f"--metric {metric} with --teacher {teacher!r}: kl and a teacher go together")
        try:
            numbers = tuple(int(seed) for seed in _unique("--seeds", seeds.split(",")))
        except ValueError as error:
            raise ValueError(f"--seeds {seeds}: {error}; write them as in 10,20,30") from error
        if min(numbers) < 0:
            raise ValueError(f"--seeds {seeds}: {min(numbers)} is below 0")
        return cls(config, metrics, numbers)

    @property
    def generated(self) -> list[str]:
        """The metrics that need answers."""
        return [name for name in self.metrics if name != KL]

    def settings(self, rows: list[Row], skipped: int) -> dict[str, Any]:
        """What an answer depends on beside its model, seed and row."""
        data = self.config.data
        text = json.dumps([[row["prompt"], row["input"], references(row)] for row in rows])
        dtype = choose_dtype(self.config.precision, collectives.device())
        return {
            "rows": len(rows),
            "skipped_rows": skipped,
            "rows_sha256": hashlib.sha256(text.encode()).hexdigest(),
            **{name: getattr(data, name) for name in ("template", "max_length", "max_prompt_length")},
            "max_new_tokens": self.config.new_tokens,
            "precision": str(dtype).removeprefix("torch."),
            # Only where they are set, so that answers which are older than these settings are gone on with.
            **{name: value for name in ("template_args", "system") if (value := getattr(data, name))},
        } | asdict(self.config.sampling)


@dataclass(frozen=True)
class _Loaded:
    """A model with what belongs to it. ends: ids that end its answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    layout: RowLayout
    ends: list[int]

    @classmethod
    def load(cls, name: str, config: EvaluationConfig) -> _Loaded:
        """The model of a folder or hub name, on this rank's device. Collective."""
        given = ModelConfig(path=name, tokenizer=config.tokenizer, trust_remote_code=config.trust_remote_code)
        path = collectives.main_rank_first(lambda: materialize(given, default_cache_dir(config.cache_dir)))
        tokenizer = collectives.main_rank_first(lambda: load_tokenizer(given, path))
        end_with_turns(tokenizer, config.data.template)
        dtype = choose_dtype(config.precision, collectives.device())
        model = collectives.main_rank_first(lambda: load_model(given, path, None, dtype))
        nn.Module.to(model, collectives.device())
        files = json.dumps(sorted(file_hashes(path).items()))
        sha256 = hashlib.sha256(files.encode()).hexdigest()
        return cls(model, tokenizer, sha256, row_layout(given, path), generation_ends(path))

    def vocabulary(self, teacher: _Loaded | None) -> Vocabulary:
        """What this model and the teacher, if there is one, have to share."""
        theirs = teacher or self
        layout = shared_layout(theirs.layout, self.layout)
        shared = shared_vocabulary(theirs.tokenizer, self.tokenizer, [*theirs.ends, *self.ends])
        return shared._replace(layout=layout)


@dataclass(frozen=True)
class Evaluation:
    """One call of `evaluate`: the same on every rank, but only rank 0 touches the files."""

    request: Request
    rows: list[Row]
    records: Records
    summary: dict[str, Any]
    teacher: _Loaded | None
    watchdog: Watchdog

    def measure(self, name: str) -> None:
        """Put the model's numbers into the summary. Collective."""
        request, config, judge = self.request, self.request.config, self.teacher
        # The model has to be the one that gave the answers that are there.
        loaded = _Loaded.load(name, config)
        self.watchdog.count_passes(loaded.model)
        entry = self.summary["models"].setdefault(name, {"sha256": loaded.sha256})
        before, now = ({"sha256 of the model": sha256} for sha256 in (entry["sha256"], loaded.sha256))
        collectives.together(lambda: refuse_changes(f"{self.records.rows} ({name})", before, now))
        vocabulary = collectives.together(lambda: loaded.vocabulary(judge))
        examples = collectives.together(lambda: self._examples(loaded, entry))
        student = collectives.together(lambda: whole_student(loaded.model, vocabulary))
        # Scores need answers.
        if request.generated:
            collectives.together(lambda: _check_room(loaded.model, examples, config.new_tokens))
            rollout = GatheredRollout(student.engine, vocabulary, config.rows_at_once, config.cache_mib)
            check_generation("model", rollout)
            self._generate(name, examples, rollout, loaded.tokenizer)
            entry.setdefault("metrics", {}).update(collectives.from_main_rank(lambda: self._totals(name)))
        # The distance to a teacher is measured on the data's own responses.
        if judge is not None:
            teacher = collectives.together(lambda: whole_teacher(judge.model, vocabulary))
            pad_id, layout = vocabulary.pad_id, vocabulary.layout
            found = Validator(examples, config.rows_per_pass, pad_id, teacher, layout=layout).measure(student)
            score = {"mean": found.kl_nats, "deviation": None, "teacher_sha256": judge.sha256}
            entry.setdefault("metrics", {})[KL] = score
        self._save()

    def _examples(self, loaded: _Loaded, entry: dict[str, Any]) -> list[Example]:
        """All rows in the model's tokens. Raises ValueError where one is left out, or answers are there to others."""
        found = tokenize_rows(self.rows, loaded.tokenizer, self.request.config.data, loaded.layout)
        if lost := len(self.rows) - len(found.rows):
            raise ValueError(
                f"{lost} of {len(self.rows)} rows do not fit ({dict(found.counts)}), and an evaluation "
                'leaves none out; set data.on_long_prompt and data.on_long_response to "truncate", or change the file'
            )
        entry["truncated_prompts"] = found.counts["truncated_prompts"]
        # The tokens themselves: template, prefix, fields, lengths and tokenizer all end in them.
        prompts = b"".join(f"{one.prompt_length} ".encode() + one.prompt.tobytes() for one in found.examples)
        sha256, what = hashlib.sha256(prompts).hexdigest(), "sha256 of the tokenised prompts"
        refuse_changes(f"{self.records.rows}", {what: entry.setdefault("prompts_sha256", sha256)}, {what: sha256})
        return found.examples

    def _generate(
        self, name: str, examples: list[Example], rollout: GatheredRollout, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """The answers that are not there yet, `save_rows` at a time, seed by seed."""
        config, entry, rows = self.request.config, self.summary["models"][name], self.rows
        entry.setdefault("generated_tokens", 0)
        entry.setdefault("generation_s", 0.0)
        # A run that was stopped has left some of them.
        there = collectives.from_main_rank(lambda: set(self.records.of_model(name)))
        wanted = [(seed, row) for seed in self.request.seeds for row in range(len(rows))]
        missing = [place for place in wanted if place not in there]
        for start in range(0, len(missing), config.save_rows):
            # Answer so many, and score them.
            part = missing[start : start + config.save_rows]
            prompts = [examples[row].prompt for _, row in part]
            seeds = [row_seeds(seed, [row])[0] for seed, row in part]
            started_s = time.perf_counter()
            answers = answer(rollout, tokenizer, prompts, config.sampling, config.new_tokens, seeds)
            entry["generation_s"] += time.perf_counter() - started_s
            entry["generated_tokens"] += sum(one.tokens for one in answers)
            texts = [references(rows[row]) for _, row in part]
            scores = score_rows([one.text for one in answers], texts, self.request.generated)
            # Put them into the file.
            lines = [
                {
                    "model": name, "seed": seed, "row": row, "prompt": tokenizer.decode(prompt),
                    "references": ones, "answer": one.text, "tokens": one.tokens, "scores": score,
                }
                for (seed, row), prompt, ones, one, score in zip(part, prompts, texts, answers, scores, strict=True)
            ]  # fmt: skip
            collectives.from_main_rank(partial(self.records.append, lines))
            self._save()
            if collectives.rank() == 0:
                count = len(wanted) - len(missing) + start + len(part)
                print(f"{name}: {count} of {len(wanted)} answers, {_tokens_per_s(entry):,.0f} tokens/s", flush=True)

    def _totals(self, name: str) -> dict[str, Any]:
        """metric -> mean and deviation over the seeds, and each seed's own; from the file."""
        lines, found = self.records.of_model(name), {}
        # Answers that are older than a metric get their scores by it.
        wanted = self.request.generated
        missing = [(line, one) for line in lines.values() for one in wanted if one not in line["scores"]]
        for line, one in missing:
            line["scores"][one] = metric(one).row(line["answer"], line["references"])
        if missing:
            self.records.replace(name, lines.values())
        for one in wanted:
            by_seed = {}
            for seed in self.request.seeds:
                part = [lines[seed, row] for row in range(len(self.rows))]
                texts, given = [line["answer"] for line in part], [line["references"] for line in part]
                by_seed[str(seed)] = metric(one).total(texts, given, [line["scores"][one] for line in part])
            found[one] = spread(list(by_seed.values()))._asdict() | {"by_seed": by_seed}
        return found

    def _save(self) -> None:
        """Write the summary. Collective."""
        collectives.from_main_rank(lambda: self.records.write_summary(self.summary))


def table(summary: dict[str, Any], models: Sequence[str], request: Request) -> str:
    """Models x metrics, mean ± deviation over the seeds."""
    titles = ["KL (nats/token)" if name == KL else metric(name).title for name in request.metrics]
    lines = []
    for model in models:
        entry = summary["models"][model]
        cells = [_cell(entry["metrics"][name], 4 if name == KL else 2) for name in request.metrics]
        lines.append([model, *cells, f"{_tokens_per_s(entry):,.0f}" if entry.get("generation_s") else "-"])
    settings, seeds = summary["settings"], ", ".join(map(str, request.seeds))
    cut = [summary["models"][model]["truncated_prompts"] for model in models]  # tokenizers may differ
    return format_table(["model", *titles, "tokens/s"], lines) + (
        f"\n{settings['rows']} rows ({settings['skipped_rows']} skipped), seeds {seeds}, {settings['precision']}; "
        f"± is the deviation over seeds; {'/'.join(map(str, cut if len(set(cut)) > 1 else cut[:1]))} prompts cut to "
        f"{settings['max_prompt_length']} tokens"
    )


def _cell(score: dict[str, Any], digits: int) -> str:
    deviation = "" if score["deviation"] is None else f" ± {score['deviation']:.{digits}f}"
    return f"{score['mean']:.{digits}f}{deviation}"


def _tokens_per_s(entry: dict[str, Any]) -> float:
    return entry["generated_tokens"] / max(entry["generation_s"], 1e-9)


def _check_room(model: PreTrainedModel, examples: list[Example], new_tokens: int) -> None:
    """Raises ValueError where an answer would not fit behind the longest prompt."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(example.prompt_length for example in examples)
    if room is not None and longest + new_tokens > room:
        raise ValueError(
            f"the longest prompt has {longest} tokens, and with {new_tokens} new ones exceeds the model's {room} "
            "positions; lower data.max_prompt_length or max_new_tokens"
        )


def _unique(what: str, given: Sequence[str]) -> tuple[str, ...]:
    """The names, trimmed. Raises ValueError for one that is empty or comes twice."""
    names = tuple(text.strip() for text in given)
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{what} {','.join(names)}: an empty or a repeated entry; give each once")
    return names
