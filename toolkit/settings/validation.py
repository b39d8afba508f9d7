"""The `validation` section of a run, and the settings of `python -m toolkit evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.settings.data import DataConfig
from toolkit.settings.rollout import SamplingSettings
from toolkit.settings.section import Section
from toolkit.settings.setting import setting
from toolkit.settings.training import FaultsConfig

if TYPE_CHECKING:
    from toolkit.settings.run import RunConfig

PRECISIONS = ("auto", "bf16", "fp32")
SCORES = ("rouge_l", "bleu", "chrf", "exact_match")  # of answers: toolkit.evaluation.metrics
BEST_BY = ("kl", "ce", *SCORES)


@dataclass(frozen=True)
class ValidationConfig(Section):
    """What is measured on held-out rows, before the first step, now and then, and after the last step."""

    # fmt: off
    every_steps: int = setting(50, "Steps between two validations.", unit="steps", least=1)
    rows: int | None = setting(None, "Validation rows that are used.", unit="rows", least=1, means={None: "all rows"})
    rows_per_pass: int = setting(8,
        "Rows of one forward pass of a validation.", unit="rows of one rank", least=1, may_change=True,
        formerly="batch_rows")
    scored_rows: int = setting(0,
        "Validation rows whose prompts are answered by sampling and scored with ROUGE-L, before and after training.",
        unit="rows", least=0, means={0: "none"},
        formerly="rouge_rows")
    sampling_temperature: float = setting(1.0, "Temperature at which these answers are sampled.", least=0)
    samples: int = setting(0,
        "Greedy answers of teacher and student that are printed beside each other at the end.", unit="rows", least=0)
    best: str = setting("",
        "The best student so far is exported to RUN/best after a validation, the one before training included: by the "
        "lowest kl or ce (cross entropy with the data), or by the highest score of the others, for which "
        "validation.scored_rows rows are answered at each validation.", choices=BEST_BY, means={"": "never"})
    # fmt: on

    def validate(self, section: str = "validation") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
        if self.best in SCORES and not self.scored_rows:
            raise ValueError(f"{section}.best = {self.best} with {section}.scored_rows = 0; say how many to answer")

    def check_with(self, run: RunConfig) -> None:
        """A KL needs a teacher. Raises ValueError."""
        if self.best == "kl" and not run.has_teacher and not run.teacher.cache:
            raise ValueError('validation.best = "kl" without a teacher; name teacher.path, or use "ce" or a score')


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """What `key=value` arguments of `python -m toolkit evaluate` can change."""

    # fmt: off
    precision: str = setting("auto",
        "auto is bf16 where the device multiplies it in hardware, else fp32.", choices=PRECISIONS)
    tokenizer: str = setting("", "Hub name, folder or sentencepiece .model file.", means={"": "each model's own"})
    trust_remote_code: bool = setting(False, "Python code that comes with a model is run.")
    cache_dir: str = setting("", "Folder of converted models.", means={"": "~/.cache/distillation-toolkit"})
    max_new_tokens: int | None = setting(None,
        "Longest answer.", unit="tokens", least=1, means={None: "data.max_length - data.max_prompt_length"})
    rows_at_once: int | None = setting(None,
        "Answers that are generated at the same time.", unit="rows of one rank", least=1,
        means={None: "as many as the key-value cache holds"},
        formerly="batch_rows")
    cache_mib: int | None = setting(None,
        "Bound on the memory of the key-value cache of a rank; one row is always computed.", unit="MiB", least=1,
        means={None: "half of the free memory"})
    rows_per_pass: int = setting(8, "Rows of one forward pass that measures KL.", unit="rows of one rank", least=1,
        formerly="kl_batch_rows")
    save_rows: int = setting(512,
        "Answers between two writes of the file of answers.", unit="rows of all ranks", least=1)
    hang_s: float = setting(FaultsConfig.hang_s, "As faults.hang_s of a run.", unit="s", above=0)
    data: DataConfig = DataConfig()
    sampling: SamplingSettings = SamplingSettings()
    # fmt: on

    def validate(self, section: str = "") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
        self.data.validate("data")
        self.sampling.validate("sampling")

    @property
    def new_tokens(self) -> int:
        """Longest answer, in tokens."""
        return self.max_new_tokens or self.data.max_length - self.data.max_prompt_length
