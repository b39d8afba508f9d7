"""A student made in stages by one command: cut out of its teacher, then trained by one run after another."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from toolkit.run.summary import STUDENT, SUMMARY
from toolkit.settings import DataConfig, InitConfig, ModelConfig, RunConfig
from toolkit.settings.overrides import unknown
from toolkit.storage.appear import made_once, remove
from toolkit.storage.differences import differences, refuse
from toolkit.storage.manifest import read_json
from toolkit.tables import format_table

INIT, RANDOM_TEACHER = "init", "random_teacher"
SETTINGS = "config.yaml"
#: of the calibration text, what decides which it is
TEXT_SETTINGS = (
    "kind", "source", "subset", "split", "text_field", "prompt_field", "response_field", "input_field",
    "messages_field", "template", "template_args", "system", "prefix",
)  # fmt: skip


@dataclass(frozen=True)
class Stages:
    """Each run starts from the student that the one before it exported, the first from `init`: a part of its teacher.

    runs: stage -> run; all have one output_dir and name, and that folder holds one for each stage. Their student.path
    is empty; where the first run's is set, by the command line for instance, nothing is cut.
    """

    init: InitConfig
    runs: Mapping[str, RunConfig]

    @property
    def names(self) -> list[str]:
        """All stages in their order, the cut among them."""
        return [*([INIT] if self.is_cut else []), *self.runs]

    @property
    def first(self) -> RunConfig:
        """The run that begins with the cut student."""
        return next(iter(self.runs.values()))

    @property
    def is_cut(self) -> bool:
        """Whether the first student is cut out of a teacher; else the first run's student.path names it."""
        return not self.first.student.path

    @property
    def folder(self) -> Path:
        """The folder that holds those of the stages."""
        return self.first.run_dir

    def with_overrides(self, overrides: list[str]) -> Stages:
        """`STAGE.section.key=value` is for one run, `init.key=value` for the cut, `section.key=value` for all runs."""
        init, runs = self.init, dict(self.runs)
        for text in overrides:
            stage, _, rest = text.partition("=")[0].partition(".")
            own = text.partition(".")[2]
            if stage == INIT:
                init = init.with_overrides([own])
            elif stage in runs:
                runs[stage] = runs[stage].with_overrides([own])
            elif rest and stage not in RunConfig.__dataclass_fields__:
                raise unknown("config key", stage, [INIT, *runs, *RunConfig.__dataclass_fields__])
            else:
                runs = {name: config.with_overrides([text]) for name, config in runs.items()}
        return Stages(init, runs)

    def placed(self) -> dict[str, RunConfig]:
        """The runs with their own folders and with the models that the stages before them leave there."""
        found, start = {}, str(self.folder / INIT / STUDENT)
        for name, config in self.runs.items():
            if config.run_dir != self.folder:
                raise ValueError(
                    f"the folder of stage {name} is {config.run_dir}, that of the first is {self.folder}; set "
                    "output_dir and name for all of them"
                )
            teacher = config.teacher
            if teacher.random_weights and self.is_cut:  # `cut` writes them down, and all stages read them
                written = str(self.folder / RANDOM_TEACHER)
                teacher = replace(teacher, path=written, tokenizer="", random_weights=False, num_layers=None)
            student = replace(config.student, path=config.student.path or start)
            found[name] = replace(config, output_dir=str(self.folder), name=name, teacher=teacher, student=student)
            start = str(found[name].run_dir / STUDENT)
        return found

    def chained(self) -> dict[str, RunConfig]:
        """The runs of `placed`, to be made one after another. Raises ValueError for what would break the chain."""
        self.init.validate(INIT)
        if self.is_cut and not self.init.wanted:
            raise ValueError("init.layers, hidden, heads, kv_heads and mlp are all null; say what the student keeps")
        # A stage that starts from the one before it has no student of its own.
        names = list(self.runs)
        for name in names if self.is_cut else names[1:]:
            student = self.runs[name].student
            for key, value in (
                ("path", student.path),
                ("random_weights", student.random_weights),
                ("num_layers", student.num_layers),
                ("drop_layers", list(student.drop_layers)),
                ("init", "set" if student.init.wanted else None),
                ("lora.adapter", student.lora.adapter),
            ):
                if value:
                    raise ValueError(
                        f"student.{key} = {value!r} in stage {name}, which starts from what the stage before it made; "
                        f"write {names[0]}.student.path for another first student"
                        + (f" (and {names[0]}.student.{key} for it alone)" if key != "path" else "")
                        + ", or name one stage first to run it alone"
                    )
        return self.placed()

    def alone(self, name: str) -> RunConfig:
        """One run, from a student that is there. Raises ValueError where it is not."""
        if name not in self.runs:
            raise unknown("stage", name, self.names)
        config = self.placed()[name]
        if not self.runs[name].student.path and not Path(config.student.path).with_name(SUMMARY).is_file():
            before = self.names[self.names.index(name) - 1]
            raise ValueError(
                f"{config.student.path}, what stage {name} starts from, is not there or not finished; run the stage "
                f"{before} first, or name a folder with student.path"
            )
        return config

    def clear(self) -> None:
        """Delete what `cut` made."""
        for name in (INIT, RANDOM_TEACHER):
            remove(self.folder / name)

    @property
    def is_made(self) -> bool:
        """Whether the first student is cut."""
        return (self.folder / INIT / SUMMARY).is_file()

    def cut(self, path: str, hashes: Mapping[str, str] | None) -> dict[str, Any]:
        """Make the first student, where it is not there yet; returns its summary. No communication; rank 0 goes first.

        path, hashes: of the teacher, from `materialize` and `file_hashes`; not used for one of random weights. Without
        hashes nothing is asked about the teacher of a student that is there. Raises ValueError for sizes that cannot
        be, and where the student that is there was made with other settings.
        """
        # Here, as recipes are read by commands that make no model.
        from toolkit.pruning.made import calibration_data, prune_model

        # The settings that the student depends on are written beside it.
        config, data = self.first, calibration_data(self.first.data, self.init)
        settings = {
            INIT: {key: value for key, value in dataclasses.asdict(self.init).items() if key != "data"},
            "calibration": {key: getattr(data, key) for key in TEXT_SETTINGS},
        } | ({} if hashes is None else {"teacher": _identity(config.teacher, config.seed, hashes)})

        def make(folder: Path) -> None:
            started_s = time.monotonic()
            teacher, source = config.teacher, path
            if teacher.random_weights:
                drawn = self.folder / RANDOM_TEACHER
                remove(drawn)  # it may be of other settings
                source = str(made_once(drawn, lambda made: _write_random(config.teacher, config.seed, made)))
                teacher = ModelConfig(path=source)
            student = folder / STUDENT
            student.mkdir()
            record = prune_model(teacher, source, self.init, data, student)
            found = {name: record.get("calibration", {}).get(name) for name in ("kl_nats", "top1_agreement")}
            summary = {
                "wall_time_s": time.monotonic() - started_s, "validation": {"final": found},
                "kept_layers": record["kept"]["layers"], "student": str(self.folder / INIT / STUDENT),
            }  # fmt: skip
            (folder / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False))
            (folder / SUMMARY).write_text(json.dumps(summary, indent=2))

        # A student that is there already has to be of the same settings.
        made = made_once(self.folder / INIT, make)
        before, defaults = yaml.safe_load((made / SETTINGS).read_text()), dataclasses.asdict(DataConfig())
        changed: list[str] = []
        for part, now in settings.items():
            # A setting that is newer than the student had its default when that was made.
            then = {key: defaults.get(key) for key in now} | before.get(part, {})
            changed += differences(then, now, part + ".{} was {!r}, is {!r}").values()
        refuse(
            f"the student in {made} was made with other settings",
            changed,
            "set these back, choose another name (name=...), or delete the folder",
        )
        return read_json(made / SUMMARY)


def stages_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each stage: held-out measures where it ended, its time."""
    titles = ["stage", "KL (nats)", "agreement", "perplexity", "ROUGE-L", "tokens", "minutes"]

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = []
    for name, summary in summaries.items():
        final, rouge = summary["validation"]["final"], summary.get("rouge_l") or {}
        rows.append([
            name, text(final["kl_nats"], ".3f"), text(final["top1_agreement"], ".1%"),
            text(final.get("perplexity"), ".2f"), text(rouge.get("final"), ".1f"), text(summary.get("tokens"), ","),
            text(summary["wall_time_s"] / 60, ".1f"),
        ])  # fmt: skip
    return format_table(titles, rows)


def _identity(teacher: ModelConfig, seed: int, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What decides which weights are pruned."""
    if teacher.random_weights:
        of_weights = {"shape": teacher.shape, "path": teacher.path, "num_layers": teacher.num_layers, "seed": seed}
    else:
        of_weights = {f"{name} SHA-256": digest for name, digest in hashes.items()}
    return {"tokenizer": teacher.tokenizer, **of_weights}


def _write_random(teacher: ModelConfig, seed: int, folder: Path) -> None:
    import torch

    from toolkit.models.load import load_model
    from toolkit.models.portable import make_portable
    from toolkit.models.tokenizer import load_tokenizer

    load_model(teacher, teacher.path, None, torch.bfloat16, seed).save_pretrained(folder)
    load_tokenizer(teacher, teacher.path).save_pretrained(folder)
    make_portable(folder)
