"""Every setting of a run, an evaluation or a cut student: sections with defaults, meanings and bounds, and `key=value`.

Imports `divergences` alone, for what a divergence may be given."""

from toolkit.settings.data import PYTHON_DOCS, TEMPLATE_NAMES, DataConfig, TextConfig
from toolkit.settings.loss import NO_DIVERGENCE, LossConfig
from toolkit.settings.model import DEPTHS, WIDTHS, InitConfig, LoraConfig, ModelConfig
from toolkit.settings.rollout import RolloutConfig, SamplingSettings
from toolkit.settings.run import RunConfig, free_settings
from toolkit.settings.schedule import POLICIES, ScheduleConfig
from toolkit.settings.training import CheckpointConfig, FaultsConfig, OptimizerConfig, TrainConfig
from toolkit.settings.validation import PRECISIONS, SCORES, EvaluationConfig, ValidationConfig

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
    "EvaluationConfig",
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
    "free_settings",
]
