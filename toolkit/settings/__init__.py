"""Every setting of a run, an evaluation or a cut student: sections with defaults, meanings and bounds, and `key=value`.

Imports `divergences` alone, for what a divergence may be given."""

# ruff: noqa: F401 - the names imported here are what the room offers

from toolkit.settings.data import PYTHON_DOCS, TEMPLATE_NAMES, DataConfig, TextConfig
from toolkit.settings.loss import NO_DIVERGENCE, LossConfig
from toolkit.settings.model import DEPTHS, WIDTHS, InitConfig, LoraConfig, ModelConfig
from toolkit.settings.rollout import RolloutConfig, SamplingSettings
from toolkit.settings.run import RunConfig, free_settings
from toolkit.settings.schedule import POLICIES, ScheduleConfig
from toolkit.settings.training import CheckpointConfig, FaultsConfig, OptimizerConfig, TrainConfig
from toolkit.settings.validation import PRECISIONS, SCORES, EvaluationConfig, ValidationConfig
