"""The `teacher` and `student` sections: which model, what is changed in it before training, how it is sharded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.settings.loss import NO_DIVERGENCE
from toolkit.settings.overrides import unknown
from toolkit.settings.section import Section
from toolkit.settings.setting import setting

if TYPE_CHECKING:
    from toolkit.settings.run import RunConfig

DEPTHS = ("importance", "greedy", "even", "random")
WIDTHS = ("importance", "even", "random")
SHARDING = ("auto", "sharded", "resident")
AS_IN_THE_TEACHER = {None: "as many as the model at path has"}


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters that are trained in place of the student's weights: W x + alpha / rank * B A x."""

    # fmt: off
    rank: int = setting(0, "Rank of the adapters.", least=0, means={0: "no adapters, all weights are trained"})
    alpha: float = setting(64.0, "The adapters' output is multiplied by alpha / rank.", above=0)
    dropout: float = setting(0.0, "Share of an adapter's input that is dropped in training.", least=0, below=1)
    target_modules: tuple[str, ...] = setting((),
        "Linear layers that get an adapter, by the last part of their names.",
        means={(): "every linear layer but the output projection"})
    adapter: str = setting("",
        "peft folder whose adapters are trained on; its rank and target modules have to be those set here.",
        means={"": "new adapters, A at random and B zero"})
    # fmt: on

    def validate(self, section: str = "lora") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
        if self.adapter and not self.rank:
            raise ValueError(f"{section}.adapter = {self.adapter!r} needs {section}.rank, which is 0; set the same")


@dataclass(frozen=True)
class InitConfig(Section):
    """A smaller model that is cut out of the one at `path`, made once and kept in the cache folder."""

    # fmt: off
    layers: int | None = setting(None, "Layers that stay.", least=1, means=AS_IN_THE_TEACHER)
    hidden: int | None = setting(None, "Width of the hidden states.", least=1, means=AS_IN_THE_TEACHER)
    heads: int | None = setting(None, "Attention heads; a head keeps its size.", least=1, means=AS_IN_THE_TEACHER)
    kv_heads: int | None = setting(None, "Heads of keys and values.", least=1, means=AS_IN_THE_TEACHER)
    mlp: int | None = setting(None, "Width between the two matrices of an MLP.", least=1, means=AS_IN_THE_TEACHER)
    depth: str = setting("importance",
        "Which layers stay. importance: all but the block of layers without which the model's next-token distribution "
        "changes least. greedy: layers are taken out one after another by the same measure. even, random, or a list of "
        "layers, as 0,1,9.")
    width: str = setting("importance",
        "Which hidden units, heads and MLP channels stay. importance: those with the largest activations.",
        choices=WIDTHS)
    keep_scale: bool = setting(True,
        "Norm weights are scaled to make up for the hidden units that the norms no longer see.")
    data: str = setting("",
        "Calibration text that importance is measured on: a .txt file, or anything that data.source takes.",
        means={"": "the run's own data"})
    rows: int = setting(16, "Rows of calibration text.", unit="rows", least=1)
    row_tokens: int = setting(256, "Length of a row of calibration text.", unit="tokens", least=1)
    seed: int = setting(0, "Seed of random choices.", least=0)
    # fmt: on

    @property
    def wanted(self) -> bool:
        """Whether anything is cut at all."""
        sizes = self.layers, self.hidden, self.heads, self.kv_heads, self.mlp
        return any(size is not None for size in sizes) or self.depth not in DEPTHS

    def validate(self, section: str = "init") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
        if self.depth not in DEPTHS and not re.fullmatch(r"\d+(, ?\d+)*", self.depth):
            raise unknown(f"{section}.depth (or a list of layers, as 0,1,9)", self.depth, DEPTHS)


@dataclass(frozen=True)
class ModelConfig(Section):
    """Which model it is, what is changed in it before training, and how DeepSpeed shards it."""

    # fmt: off
    path: str = setting("",
        "Hub name (OWNER/NAME or OWNER/NAME@REVISION), folder, or .gguf file; package:NAME finds the one .gguf file in "
        "an installed Python package.", may_change=True)
    tokenizer: str = setting("",
        "Hub name, folder or sentencepiece .model file.", means={"": "the tokenizer that comes with path"},
        may_change=True)
    random_weights: bool = setting(False,
        "The model starts with random weights, built from `shape` where that is given, else from the configuration at "
        "path, whose weights are not read.")
    shape: dict[str, Any] = setting({},
        "model_type and other fields of a Hugging Face configuration, for random_weights without a path.")
    num_layers: int | None = setting(None,
        "Layers of a model with random_weights.", least=1, means={None: "as the configuration says"})
    drop_layers: tuple[int, ...] = setting((),
        "Numbers of the layers that are left out; the shorter model is made once and kept in the cache folder.")
    init: InitConfig = InitConfig()
    ds_config: str = setting("",
        "DeepSpeed JSON file with the sharding, looked for in the working directory, then in the repository.",
        may_change=True)
    sharding: str = setting("auto",
        "resident: the model is whole on every rank; of the student, gradients and optimizer state are still sharded "
        "(ZeRO-2). sharded: its weights are sharded as ds_config says (ZeRO-3). auto: resident where the memory plan "
        "says that it fits; a ds_config that sets stage3 thresholds, hpZ or offload_param itself is obeyed.",
        choices=SHARDING, may_change=True)
    rows_per_pass: int | None = setting(None,
        "Rows of one forward pass of the teacher, rounded down to whole micro-batches. A pass gathers the sharded "
        "weights once, so lower it only where activations do not fit the memory.", unit="rows of one rank", least=1,
        means={None: "all rows of a rank's step"}, may_change=True,
        formerly="pass_rows")
    gradient_checkpointing: bool = setting(False,
        "The student's activations are computed again in the backward pass, to save memory.", may_change=True)
    trust_remote_code: bool = setting(False, "Python code that comes with the model is run.", may_change=True)
    cache: str = setting("",
        "Of a teacher: folder that `python -m toolkit cache-teacher` made from this run's data. Steps on the data read "
        'its answers; with schedule.policy "off" no teacher is loaded, and the path may stay empty.',
        means={"": "the teacher answers itself"}, may_change=True)
    lora: LoraConfig = LoraConfig()
    # fmt: on

    def validate(self, section: str = "model") -> None:
        """Raises ValueError for the first setting that cannot work; `section` is "teacher" or "student"."""
        super().validate(section)
        if not self.path and not (self.random_weights and self.shape):
            raise ValueError(f"{section}.path is empty; name a model, or set {section}.random_weights=true and shape")
        if not self.ds_config:
            raise ValueError(f"{section}.ds_config is empty; name a file of ds_configs/")
        self._check_layers(section)
        self.init.validate(f"{section}.init")
        if self.init.wanted and (self.random_weights or self.drop_layers):
            other = "random_weights" if self.random_weights else "drop_layers"
            raise ValueError(f"{section}.init cuts out of {section}.path, but {section}.{other} is set too; leave one")
        if self.cache and section != "teacher":
            raise ValueError(f"{section}.cache = {self.cache!r} is for a teacher's answers; set teacher.cache")
        self.lora.validate(f"{section}.lora")
        if self.lora.rank and section != "student":
            raise ValueError(f"{section}.lora.rank = {self.lora.rank}, but only the student is trained; set it there")

    def _check_layers(self, section: str) -> None:
        """Random models are built shorter, real ones lose layers."""
        if self.num_layers is not None and not self.random_weights:
            raise ValueError(
                f"{section}.num_layers = {self.num_layers} is for random weights, but {section}.random_weights is "
                f"false; use {section}.drop_layers"
            )
        if self.drop_layers and self.random_weights:
            raise ValueError(
                f"{section}.drop_layers = {list(self.drop_layers)} takes layers out of real weights, but "
                f"{section}.random_weights is true; use {section}.num_layers"
            )

    def check_with(self, run: RunConfig) -> None:
        """A teacher's stored answers fit fewer losses and data than a teacher that is asked. What the form of the cache
        allows beyond that is known once it is open. Raises ValueError."""
        if not self.cache:
            return
        from toolkit.divergences.top_k import WITH_TOP_K  # imports torch, which settings alone do without

        loss, data, allowed = run.loss, run.data, (*WITH_TOP_K, NO_DIVERGENCE)
        for name, value, fits, needed in (
            ("loss.divergence", loss.divergence, loss.divergence in allowed, f"one of {', '.join(allowed)}"),
            ("loss.alpha_per_sequence", loss.alpha_per_sequence, not loss.alpha_per_sequence, "false"),
            ("data.streaming", data.streaming, not data.streaming, "false: a stream's texts are not known"),
            ("data.responses", data.responses, data.responses == "data", '"data", whose texts are known'),
            ("loss.cross_entropy_weight", loss.cross_entropy_weight,
             loss.temperature == 1 or not loss.cross_entropy_weight, "0 where loss.temperature is not 1"),
        ):  # fmt: skip
            if not fits:
                with_cache = f"{name} = {value!r} with teacher.cache = {self.cache!r}"
                raise ValueError(f'{with_cache}: it has to be {needed}; or set teacher.cache to ""')
