"""The `train`, `optimizer`, `checkpoint` and `faults` sections: how long, in what portions, by which updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.settings.section import Section
from toolkit.settings.setting import setting

if TYPE_CHECKING:
    from toolkit.settings.run import RunConfig

OPTIMIZERS = ("adamw", "sgd")
ON_FAILURE = ("continue", "stop")


@dataclass(frozen=True)
class TrainConfig(Section):
    """How long training is, and in what portions rows are computed. Of steps, epochs and tokens the one that was set
    last decides the length."""

    # fmt: off
    steps: int = setting(100, "Optimizer steps.", unit="steps", least=1)
    epochs: float | None = setting(None, "Passes over the training rows.", above=0, means={None: "steps decide"})
    tokens: float | None = setting(None,
        "Tokens of plain text, with data.kind=text; all of its rows are data.max_length long.", unit="tokens", above=0,
        means={None: "steps decide"})
    rows_per_step: int = setting(8,
        "Sequences of one optimizer step, a multiple of the number of ranks.", unit="rows of all ranks", least=1,
        formerly="batch_rows")
    rows_per_micro_batch: int = setting(4,
        "Most rows of one micro-batch, which is what a rank computes at once; a smaller number is taken where this one "
        "does not divide a rank's rows of a step.", unit="rows of one rank", least=1, may_change=True,
        formerly="micro_rows")
    tokens_per_micro_batch: int | None = setting(None,
        "Most tokens of one micro-batch, padding included. In place of train.rows_per_micro_batch, a rank's rows of a "
        "step become as few micro-batches as this bound allows, and their number changes from step to step.",
        unit="tokens of one rank", least=1, means={None: "train.rows_per_micro_batch decides"}, may_change=True,
        formerly="micro_tokens")
    # fmt: on

    def validate(self, section: str = "train") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
        if self.epochs is not None and self.tokens is not None:
            raise ValueError(f"{section}.epochs = {self.epochs}, {section}.tokens = {self.tokens}; set one to null")

    def after(self, name: str) -> dict[str, None]:
        """Of steps, epochs and tokens, those that no longer count once `name` is set."""
        others = {"steps": ("epochs", "tokens"), "epochs": ("tokens",), "tokens": ("epochs",)}
        return dict.fromkeys(others.get(name, ()))

    def check_with(self, run: RunConfig) -> None:
        """A length has to be known, and a micro-batch holds one row at least. Raises ValueError."""
        if run.data.streaming and self.epochs is not None:
            raise ValueError(
                f"train.epochs = {self.epochs} counts passes over rows, whose number is not known with data.streaming "
                "= true; set train.steps and leave train.epochs at null"
            )
        if self.tokens is not None and run.data.kind != "text":
            raise ValueError(
                f"train.tokens = {self.tokens:g} counts tokens of plain text, but data.kind = {run.data.kind!r}; set "
                "train.steps or train.epochs"
            )
        # One row has to fit into a micro-batch.
        lengths = {"data": run.data.max_length} | ({"text": run.text.max_length} if run.text.source else {})
        for name, length in lengths.items():
            if self.tokens_per_micro_batch is not None and self.tokens_per_micro_batch < length:
                raise ValueError(
                    f"train.tokens_per_micro_batch = {self.tokens_per_micro_batch} is less than one row of "
                    f"{name}.max_length = {length} tokens; raise the first or lower the second"
                )


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW or plain SGD, with decoupled weight decay, and a learning rate that follows a cosine after a warm-up."""

    # fmt: off
    name: str = setting("adamw", "The optimizer.", choices=OPTIMIZERS)
    lr: float = setting(5e-4, "Learning rate after the warm-up, where the cosine begins.", above=0)
    min_lr: float = setting(1e-7, "Learning rate at the end of the run.", least=0)
    warmup_steps: int = setting(0, "Steps in which the learning rate rises from 0.", unit="steps", least=0)
    weight_decay: float = setting(1e-2, "Decoupled weight decay.", least=0)
    betas: tuple[float, ...] = setting((0.9, 0.999), "Two decay rates, of AdamW's mean and of its variance.")
    eps: float = setting(1e-8, "Added to the denominator of AdamW.")
    max_grad_norm: float = setting(1.0,
        "Gradients are scaled down to this norm where theirs is larger.", least=0, means={0: "no clipping"})
    # fmt: on

    def validate(self, section: str = "optimizer") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
        if self.min_lr > self.lr:
            raise ValueError(f"{section}.min_lr = {self.min_lr} is above {section}.lr = {self.lr}; lower it")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"{section}.betas = {self.betas}; give two numbers in [0, 1)")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """When a run saves what it needs to go on."""

    # fmt: off
    every_steps: int = setting(100,
        "Steps between two checkpoints. The end of training and a signal make one in any case.", unit="steps", least=0,
        means={0: "only these"}, may_change=True)
    keep: int = setting(2, "Newest checkpoints that stay.", least=1, may_change=True)
    on_failure: str = setting("continue",
        "What a save that fails, on a full disk for instance, does to the run; also the export of the best student.",
        choices=ON_FAILURE, may_change=True)
    # fmt: on


@dataclass(frozen=True)
class FaultsConfig(Section):
    """What a run puts up with before it skips a step, or ends."""

    # fmt: off
    max_skipped_steps: int = setting(3,
        "A step whose loss or gradient is not finite is skipped; so many in a row end the run.", unit="steps", least=1,
        may_change=True)
    spike_factor: float | None = setting(None,
        "A step is skipped as well where its loss is above this many times the median of recent losses.", above=1,
        means={None: "no step is skipped for its size"}, may_change=True)
    spike_window: int = setting(50,
        "Recent losses whose median spike_factor multiplies.", unit="steps", least=1, may_change=True)
    hang_s: float = setting(1800.0,
        "Where no rank shows progress for so long, the one that is behind is reported and the job is ended. Has to be "
        "longer than loading a model, any of its passes, a save or an export.", unit="s", above=0, may_change=True)
    grace_s: float = setting(600.0,
        "A signal ends the run after so long even where no step has ended.", unit="s", above=0, may_change=True)
    # fmt: on
