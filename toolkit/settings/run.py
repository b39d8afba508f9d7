"""RunConfig: every setting of a run, in sections; `section.key=value` changes one from the command line.

Each setting has one owner. What is sharded, offloaded or communicated, and how, belongs to the DeepSpeed JSON
files in ds_configs/; everything else, batch, precision, optimizer and clipping included, belongs here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolkit.settings.data import DataConfig, TextConfig
from toolkit.settings.loss import NO_DIVERGENCE, LossConfig
from toolkit.settings.model import ModelConfig
from toolkit.settings.rollout import RolloutConfig
from toolkit.settings.schedule import ScheduleConfig
from toolkit.settings.section import Section
from toolkit.settings.setting import setting
from toolkit.settings.training import CheckpointConfig, FaultsConfig, OptimizerConfig, TrainConfig
from toolkit.settings.validation import PRECISIONS, ValidationConfig

RESUME = ("auto", "never")


@dataclass(frozen=True)
class RunConfig(Section):
    """A whole run; its folder is output_dir/name."""

    # fmt: off
    name: str = setting("run", "Name of the run's folder.", may_change=True)
    seed: int = setting(10, "Seed of data order, schedule, sampling and random weights.", least=0, below=2**64)
    precision: str = setting("auto",
        "auto is bf16 where the device multiplies it in hardware, else fp32.", choices=PRECISIONS, may_change=True)
    output_dir: str = setting("runs", "Folder of all runs.", may_change=True)
    cache_dir: str = setting("",
        "Folder of converted models, prepared data and generated text.", means={"": "~/.cache/distillation-toolkit"},
        may_change=True)
    resume: str = setting("auto",
        "auto goes on from the newest whole checkpoint in the run's folder; never starts over and deletes them.",
        choices=RESUME, may_change=True)
    teacher: ModelConfig = ModelConfig(ds_config="ds_configs/teacher_zero3.json")
    student: ModelConfig = ModelConfig(ds_config="ds_configs/student_zero3.json")
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    rollout: RolloutConfig = RolloutConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    # fmt: on

    def validate(self, section: str = "") -> None:
        """Raises ValueError for the first setting that cannot work: by itself, then beside those of other sections."""
        super().validate(section)
        if not self.name or self.name in (".", "..") or "/" in self.name:
            raise ValueError(f"name = {self.name!r} has to be the name of one folder below output_dir")

        # Each section is checked by itself, then beside the others.
        for name, part in self.sections.items():
            if name != "teacher" or self.has_teacher:
                part.validate(name)
        for part in self.sections.values():
            part.check_with(self)
        if self.train.epochs is None:
            self.for_rows(None)._check_warmup()

    def _check_warmup(self) -> None:
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        if warmup >= steps:
            raise ValueError(f"optimizer.warmup_steps = {warmup} leaves nothing of train.steps = {steps}; shorten it")

    def for_rows(self, rows: int | None) -> RunConfig:
        """With train.steps for this many training rows (None: a stream), where train.epochs or train.tokens decides.

        Raises ValueError where the warm-up is as long as that.
        """
        if self.train.tokens is not None:
            steps = math.ceil(self.train.tokens / (self.train.rows_per_step * self.data.max_length))
        elif self.train.epochs is not None and rows is not None:
            steps = max(1, round(self.train.epochs * rows / self.train.rows_per_step))
        else:
            return self
        config = dataclasses.replace(self, train=dataclasses.replace(self.train, steps=steps))
        config._check_warmup()
        return config

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is loaded. One is always needed but for loss.divergence = "none", and where a cache answers
        for every step."""
        if self.teacher.cache and (self.schedule.policy == "off" or self.loss.divergence == NO_DIVERGENCE):
            return False
        return self.loss.divergence != NO_DIVERGENCE or bool(self.teacher.path) or self.teacher.random_weights

    @property
    def max_new_tokens(self) -> int:
        """Longest generated response, in tokens."""
        return self.rollout.max_new_tokens or self.data.max_length - self.data.max_prompt_length

    def rows_per_micro_batch(self, world: int) -> int:
        """Rows of one micro-batch on one rank: the most, up to train.rows_per_micro_batch, that divide each
        rank's share of the batch, and of the plain text beside it.

        Raises ValueError where ranks have no equal shares."""
        shares = []
        for name, rows in (("train.rows_per_step", self.train.rows_per_step), ("text.rows_per_step", self.text_rows)):
            if rows % world:
                raise ValueError(f"{name} = {rows} is not a multiple of the {world} ranks; change one of them")
            shares.append(rows // world)
        both = math.gcd(*shares)
        return max(rows for rows in range(1, min(both, self.train.rows_per_micro_batch) + 1) if both % rows == 0)

    def accumulation(self, world: int) -> int:
        """Micro-batches of one optimizer step on one rank, those of text.source included; 1 where
        train.tokens_per_micro_batch leaves their number open. Raises ValueError where a batch does not divide."""
        rows_per_micro_batch = self.rows_per_micro_batch(world)
        if self.train.tokens_per_micro_batch is not None:
            return 1
        return (self.train.rows_per_step + self.text_rows) // (rows_per_micro_batch * world)

    @property
    def generates(self) -> bool:
        """Whether prompts are answered in this run."""
        return self.schedule.policy != "off" or self.data.responses == "teacher" or self.asks_models

    @property
    def asks_models(self) -> bool:
        """Whether validation prompts are answered, by the student and its teacher."""
        return bool(self.validation.scored_rows or self.validation.samples)

    @property
    def text_rows(self) -> int:
        """Blocks of plain text learned beside the distillation in one step, over all ranks."""
        return (self.text.rows_per_step or self.train.rows_per_step) if self.text.source else 0

    @property
    def packs(self) -> bool:
        """Whether rows hold several texts that must not see each other."""
        return self.data.packing or self.data.kind == "text" or bool(self.text.source)

    def save(self, path: Path) -> None:
        """Write the config as YAML; `from_dict` gives an equal one back."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The config that `to_dict` was taken from. Raises ValueError for unknown settings and wrong types."""
        return cls().with_settings(values)


@functools.cache
def free_settings() -> frozenset[str]:
    """Full keys of the settings that may change from one start of a run to the next."""
    return frozenset(entry.key for entry in RunConfig().entries() if entry.setting.may_change)
