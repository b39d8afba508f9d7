"""Every setting of a run, an evaluation or a cut student: frozen dataclasses in sections, and `key=value` for them.

Imports `divergences` alone, for what a divergence may be given."""

from toolkit.settings.config import (
    DEPTHS,
    NO_DIVERGENCE,
    PRECISIONS,
    SCORES,
    WIDTHS,
    CheckpointConfig,
    FaultsConfig,
    InitConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SamplingSettings,
    TrainConfig,
    ValidationConfig,
)
from toolkit.settings.data import PYTHON_DOCS, TEMPLATE_NAMES, DataConfig, TextConfig
from toolkit.settings.schedule import POLICIES, ScheduleConfig

__all__ = [
    "DEPTHS",
    "NO_DIVERGENCE",
    "POLICIES",
    "PRECISIONS",
    "PYTHON_DOCS",
    "SCORES",
    "TEMPLATE_NAMES",
    "WIDTHS",
    "CheckpointConfig",
    "DataConfig",
    "FaultsConfig",
    "InitConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingSettings",
    "ScheduleConfig",
    "TextConfig",
    "TrainConfig",
    "ValidationConfig",
]
