"""How answers are asked for: prompts, sampling, seeds. The paper's way and the plain one, by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from toolkit.data.minillm import LAYOUT
from toolkit.settings import PRECISIONS, DataConfig, FaultsConfig, SamplingSettings
from toolkit.settings.overrides import unknown


@dataclass(frozen=True)
class EvaluationConfig:
    """Everything that `key=value` arguments of `evaluate` can change.

    data: its validation part is asked, all of a file; `validation_split` names a hub data set's.
    max_new_tokens: None is data.max_length - data.max_prompt_length.
    tokenizer: "" is each model's own. batch_rows, cache_mib: as in RolloutConfig. kl_batch_rows: rows of one pass on
    one rank. save_rows: answers between two writes of the rows file, over all ranks. hang_s: as in FaultsConfig.
    """

    precision: str = "auto"
    tokenizer: str = ""
    trust_remote_code: bool = False
    cache_dir: str = ""
    max_new_tokens: int | None = None
    batch_rows: int | None = None
    cache_mib: int | None = None
    kl_batch_rows: int = 8
    save_rows: int = 512
    hang_s: float = FaultsConfig.hang_s
    data: DataConfig = DataConfig()
    sampling: SamplingSettings = SamplingSettings()

    def validate(self) -> None:
        """Raises ValueError for the first setting that cannot work."""
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        for name in ("max_new_tokens", "batch_rows", "cache_mib", "kl_batch_rows", "save_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}; it has to be at least 1")
        if not self.hang_s > 0:
            raise ValueError(f"hang_s = {self.hang_s}; it has to be above 0")
        self.data.validate()
        self.sampling.validate()

    @property
    def new_tokens(self) -> int:
        """Longest answer, in tokens."""
        return self.max_new_tokens or self.data.max_length - self.data.max_prompt_length


#: "paper": the final evaluation of DistiLLM (arXiv 2402.03898) and MiniLLM, whose generation has a fixed room of 256
#: new tokens after prompts of at most 256. The released scripts leave no_repeat_ngram_size at its default, 6.
PROTOCOLS = {
    "paper": EvaluationConfig(
        data=DataConfig(template="alpaca", max_length=512, max_prompt_length=256, **LAYOUT),
        sampling=SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=6),
    ),
    "plain": EvaluationConfig(),
}


def named_protocol(name: str) -> EvaluationConfig:
    """Raises ValueError for a name not in the table."""
    if name not in PROTOCOLS:
        raise unknown("--protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def settings_table() -> str:
    """A line for each setting of `evaluate`, with its value under each protocol."""
    values = {name: _flat(asdict(config)) for name, config in PROTOCOLS.items()}
    return "\n".join(
        f"  {key:<32} {'   '.join(f'{name}: {found[key]}' for name, found in values.items())}"
        for key in values["plain"]
    )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Sections' settings beside the others, as `section.name`."""
    return {
        f"{key}.{name}" if isinstance(value, dict) else key: inner
        for key, value in settings.items()
        for name, inner in (value.items() if isinstance(value, dict) else [("", value)])
    }
