"""RunConfig: every setting of a run, typed, in sections; `section.key=value` changes one from the command line.

Each setting has one owner. What is sharded, offloaded or communicated, and how, belongs to the DeepSpeed JSON
files in ds_configs/; everything else, batch, precision, optimizer and clipping included, belongs here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from toolkit.settings.data import DataConfig, TextConfig
from toolkit.settings.overrides import plain, unknown, with_overrides, with_value
from toolkit.settings.schedule import ScheduleConfig

RESUME = ("auto", "never")
ON_FAILURE = ("continue", "stop")
PRECISIONS = ("auto", "bf16", "fp32")
OPTIMIZERS = ("adamw", "sgd")
DEPTHS = ("importance", "greedy", "even", "random")
WIDTHS = ("importance", "even", "random")
GATHER_MODES = ("auto", "always", "never")
ROLLOUT_ENGINES = ("local", "vllm")
NO_DIVERGENCE = "none"
WITH_SEQUENCE_ALPHA = ("skl", "srkl")
SCORES = ("rouge_l", "bleu", "chrf", "exact_match")  # of answers: toolkit.evaluation.metrics
BEST_BY = ("", "kl", "ce", *SCORES)


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters of a frozen student: W x + alpha / rank * B A x. Of the student only.

    rank: of the adapters; 0 trains all weights. dropout: of an adapter's input, in training.
    target_modules: last parts of the names of linear layers; none given: every linear layer but the output projection.
    adapter: peft folder to go on from, of the same rank and modules ("": A at random, B zero).
    """

    rank: int = 0
    alpha: float = 64.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    adapter: str = ""

    def validate(self, section: str) -> None:
        _at_least(f"{section}.rank", self.rank, 0)
        _above_zero(f"{section}.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{section}.dropout = {self.dropout} lies outside [0, 1); 0 switches it off")
        if self.adapter and not self.rank:
            raise ValueError(
                f"{section}.adapter = {self.adapter!r} needs {section}.rank, which is 0; set the adapter's"
            )


@dataclass(frozen=True)
class InitConfig:
    """A smaller model cut out of the one at `path`, made once and kept in the cache (toolkit.pruning).

    layers, hidden, heads, kv_heads, mlp: sizes of the student; None stays as it is. Heads keep their size.
    depth: which layers stay. "importance": all but the block whose absence changes the teacher's next-token
    distribution least; "greedy": one removed after another by the same measure; "even", "random", or a list: "0,1,9".
    width: which hidden units, heads and channels stay, by "importance" (activations), "even" or "random".
    keep_scale: norm weights make up for the units that the norms no longer see.
    data: calibration text, a .txt file or anything data.source takes; "" is the run's own. rows, row_tokens: of it.
    seed: of random choices.
    """

    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    mlp: int | None = None
    depth: str = "importance"
    width: str = "importance"
    keep_scale: bool = True
    data: str = ""
    rows: int = 16
    row_tokens: int = 256
    seed: int = 0

    @property
    def wanted(self) -> bool:
        sizes = self.layers, self.hidden, self.heads, self.kv_heads, self.mlp
        return any(size is not None for size in sizes) or self.depth not in DEPTHS

    def validate(self, section: str) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "mlp", "rows", "row_tokens"):
            _at_least(f"{section}.{name}", getattr(self, name), 1)
        _at_least(f"{section}.seed", self.seed, 0)
        if self.depth not in DEPTHS and not re.fullmatch(r"\d+(, ?\d+)*", self.depth):
            raise unknown(f"{section}.depth (or a list of layers, as 0,1,9)", self.depth, DEPTHS)
        if self.width not in WIDTHS:
            raise unknown(f"{section}.width", self.width, WIDTHS)


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model, and how DeepSpeed shards it.

    path: hub name (OWNER/NAME, or OWNER/NAME@REVISION), folder, or .gguf file; `package:NAME` finds the one .gguf file
    in an installed package.
    tokenizer: hub name, folder or sentencepiece .model file; "" is the one that comes with `path`.
    random_weights: build from a configuration at random, weights are not looked for: from `shape` where it is
    given (`model_type` and the fields of its Hugging Face configuration), else from the configuration at `path`.
    num_layers: keep this many layers of a randomly built model (None: as configured).
    drop_layers: leave these layers of `path` out; a folder without them is made once and kept in the cache.
    init: cut a smaller model out of `path`: sizes, and how to choose.
    ds_config: DeepSpeed JSON file with the sharding; relative to the repository or the working directory.
    pass_rows: rows in one forward pass of the teacher, in whole micro-batches; None is a rank's whole window, so that
    its all-gathers are paid once per optimizer step. Lower it when the teacher's activations do not fit. With
    train.micro_tokens a pass has as large a share of the micro-batches as pass_rows has of the window's rows.
    gradient_checkpointing: recompute activations in the student's backward pass.
    cache: of the teacher: folder that `python -m toolkit cache-teacher` made of this run's data. Steps on the data read
    it, generated text asks the teacher. Where none is generated (schedule.policy "off") no teacher is loaded, and with
    an empty path the cache alone says whose answers it holds.
    lora: adapters that are trained in the student's place.
    """

    path: str = ""
    tokenizer: str = ""
    random_weights: bool = False
    shape: dict = field(default_factory=dict)
    num_layers: int | None = None
    drop_layers: tuple[int, ...] = ()
    init: InitConfig = InitConfig()
    ds_config: str = ""
    pass_rows: int | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    cache: str = ""
    lora: LoraConfig = LoraConfig()

    def validate(self, section: str) -> None:
        if not self.path and not (self.random_weights and self.shape):
            raise ValueError(
                f"{section}.path is empty; name a model, or set {section}.random_weights=true and {section}.shape"
            )
        if not self.ds_config:
            raise ValueError(f"{section}.ds_config is empty; name a file of ds_configs/")
        if self.num_layers is not None and not self.random_weights:
            raise ValueError(
                f"{section}.num_layers = {self.num_layers} cuts randomly built models only, but "
                f"{section}.random_weights is false; use {section}.drop_layers to take layers out of real weights"
            )
        if self.drop_layers and self.random_weights:
            raise ValueError(
                f"{section}.drop_layers = {list(self.drop_layers)} takes layers out of real weights, but "
                f"{section}.random_weights is true; use {section}.num_layers"
            )
        self.init.validate(f"{section}.init")
        if self.init.wanted and (self.random_weights or self.drop_layers):
            other = "random_weights" if self.random_weights else "drop_layers"
            raise ValueError(
                f"{section}.init cuts a model out of {section}.path, but {section}.{other} is set too; leave one out"
            )
        for name in ("num_layers", "pass_rows"):
            _at_least(f"{section}.{name}", getattr(self, name), 1)
        if self.cache and section != "teacher":
            raise ValueError(
                f"{section}.cache = {self.cache!r}, but only a teacher's answers are kept; set teacher.cache"
            )
        self.lora.validate(f"{section}.lora")
        if self.lora.rank and section != "student":
            raise ValueError(
                f"{section}.lora.rank = {self.lora.rank}, but only the student is trained; set student.lora"
            )


@dataclass(frozen=True)
class LossConfig:
    """What is minimised at each response token, in nats.

    divergence, alpha, beta: see toolkit.divergences; "none" asks no teacher: cross entropy alone, as in supervised
    fine-tuning (a teacher is then needed for validation only, and may be left out).
    student_text_divergence: in place of it where the student's own text is trained on ("": the same one).
    alpha_end: alpha moves to it over the run, in a straight line (TAID: from 0.4 to 1); None: it stays.
    alpha_per_sequence: skl and srkl with an alpha of each text's own, at most `alpha`: smaller where the models differ
    less than in the rest of the micro-batch (DistiLLM-2). So it depends on train.micro_rows and on the number of ranks.
    Not with data.packing, where a row holds several texts. Costs one more product with each head.
    head_mass: akl's. temperature divides both models' logits.
    cross_entropy_weight: of the cross entropy with the data's next token, added to the divergence. Steps on the
    student's own text leave it out.
    student_text_cross_entropy_weight: the same for the student's own text, as if it were data. What the student says is
    then made likelier, right or wrong, and it may collapse to a few phrases as phi rises.
    memory_budget_mib: bound on the logit tiles; None is the operation's default.
    """

    divergence: str = "skl"
    student_text_divergence: str = ""
    alpha: float = 0.1
    alpha_end: float | None = None
    alpha_per_sequence: bool = False
    beta: float = 0.5
    head_mass: float = 0.5
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    student_text_cross_entropy_weight: float = 0.0
    memory_budget_mib: int | None = None

    def validate(self) -> None:
        from toolkit.divergences import Divergence

        names = {self.divergence, self.student_text_divergence or self.divergence} - {NO_DIVERGENCE}
        for name in sorted(names):
            for alpha in (self.alpha, self.alpha if self.alpha_end is None else self.alpha_end):
                Divergence(name, alpha=alpha, beta=self.beta, head_mass=self.head_mass)
        if self.alpha_per_sequence and not (names and names <= set(WITH_SEQUENCE_ALPHA) and self.alpha > 0.01):
            raise ValueError(
                f"loss.alpha_per_sequence is for {' and '.join(WITH_SEQUENCE_ALPHA)} with an alpha above 0.01, but the "
                f"divergences are {sorted(names)} and loss.alpha = {self.alpha}; set it to false, or change these"
            )
        if self.divergence == NO_DIVERGENCE and (self.cross_entropy_weight != 1 or self.student_text_divergence):
            raise ValueError(
                f"loss.divergence = {NO_DIVERGENCE!r} leaves the cross entropy alone, but loss.cross_entropy_weight = "
                f"{self.cross_entropy_weight} and loss.student_text_divergence = {self.student_text_divergence!r}; set "
                'them to 1 and ""'
            )
        _above_zero("loss.temperature", self.temperature)
        _at_least("loss.cross_entropy_weight", self.cross_entropy_weight, 0)
        _at_least("loss.student_text_cross_entropy_weight", self.student_text_cross_entropy_weight, 0)
        _at_least("loss.memory_budget_mib", self.memory_budget_mib, 1)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (or plain SGD) with a cosine from `lr` to `min_lr` after `warmup_steps`; decoupled weight decay."""

    name: str = "adamw"
    lr: float = 5e-4
    min_lr: float = 1e-7
    warmup_steps: int = 0
    weight_decay: float = 1e-2
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    def validate(self) -> None:
        if self.name not in OPTIMIZERS:
            raise unknown("optimizer.name", self.name, OPTIMIZERS)
        _above_zero("optimizer.lr", self.lr)
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr = {self.min_lr} is above optimizer.lr = {self.lr}; lower it")
        for name in ("min_lr", "warmup_steps", "weight_decay", "max_grad_norm"):
            _at_least(f"optimizer.{name}", getattr(self, name), 0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas = {self.betas}; give two numbers in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """How long training is, by the one of these that was set last. steps: optimizer steps. epochs: passes over the
    training rows. tokens: of plain text (data.kind "text"), whose rows are all data.max_length long.
    batch_rows: sequences of one step, over all ranks, and a multiple of their number. micro_rows: of one micro-batch on
    one rank at most; a smaller number is taken where this one does not divide the rank's share. micro_tokens: in its
    place, as few micro-batches as hold at most so many tokens each, padding included; their number changes from step
    to step, and micro_rows is not read."""

    steps: int = 100
    epochs: float | None = None
    tokens: float | None = None
    batch_rows: int = 8
    micro_rows: int = 4
    micro_tokens: int | None = None

    def validate(self) -> None:
        for name in ("steps", "batch_rows", "micro_rows", "micro_tokens"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("epochs", "tokens"):
            if (value := getattr(self, name)) is not None:
                _above_zero(f"train.{name}", value)
        if self.epochs is not None and self.tokens is not None:
            raise ValueError(f"train.epochs = {self.epochs} and train.tokens = {self.tokens}; set one of them to null")

    def after(self, name: str) -> dict[str, None]:
        """What no longer counts once `name` is set."""
        return {
            "steps": {"epochs": None, "tokens": None}, "epochs": {"tokens": None}, "tokens": {"epochs": None}
        }.get(name, {})  # fmt: skip


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. temperature 0 is greedy; top_p = 1, top_k = 0, min_p = 0, repetition_penalty = 1
    and no_repeat_ngram_size = 0 switch their rules off. no_repeat_ngram_size: no n-gram of this many tokens comes a
    second time in prompt and text together."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def validate(self, section: str = "sampling") -> None:
        for name in ("temperature", "top_k", "no_repeat_ngram_size"):
            _at_least(f"{section}.{name}", getattr(self, name), 0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{section}.top_p = {self.top_p} lies outside (0, 1]; 1 switches it off")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"{section}.min_p = {self.min_p} lies outside [0, 1); 0 switches it off")
        _above_zero(f"{section}.repetition_penalty", self.repetition_penalty)


@dataclass(frozen=True)
class RolloutConfig(SamplingSettings):
    """Text generated by the student, and the buffer that keeps it.

    engine: "local", the student itself, or "vllm", a vLLM server at `server` ("http://host:port"; docs/rollout.md).
    sync_every_steps: with a server, text is by weights fewer steps old than this. server_timeout_s: for the server to
    come up, and for each call. weights_dir: where it reads weights, in reach of both ("": vllm/ in the run folder).
    windows: training windows that a GENERATE step makes text for at once; as many GENERATE steps less one then replay.
    capacity: entries of the replay buffer, over all ranks. max_age_steps: older entries are not used (None: no limit).
    train_on_fresh: a GENERATE step trains on the text it just made (the released code) and not on a draw from the
    buffer (Algorithm 1). max_new_tokens: None is data.max_length - data.max_prompt_length.
    batch_rows: rows generated together on one rank; None is as many as the cache holds (64 requests to a server).
    cache_mib: bound on a rank's key-value cache, one row at least; None is half of the free memory.
    gather: "always" the whole student on every rank, "never" (sharded, ranks in step), or "auto": by free memory.
    The other settings are those of SamplingSettings.
    """

    engine: str = "local"
    server: str = ""
    sync_every_steps: int = 1
    server_timeout_s: float = 600.0
    weights_dir: str = ""
    windows: int = 1
    capacity: int = 1000
    max_age_steps: int | None = None
    train_on_fresh: bool = False
    max_new_tokens: int | None = None
    batch_rows: int | None = None
    cache_mib: int | None = None
    gather: str = "auto"

    def validate(self, section: str = "rollout") -> None:
        super().validate(section)
        for name in ("sync_every_steps", "windows", "capacity", "max_age_steps", "max_new_tokens", "batch_rows",
                     "cache_mib"):  # fmt: skip
            _at_least(f"{section}.{name}", getattr(self, name), 1)
        _above_zero(f"{section}.server_timeout_s", self.server_timeout_s)
        if self.engine not in ROLLOUT_ENGINES:
            raise unknown(f"{section}.engine", self.engine, ROLLOUT_ENGINES)
        if self.engine == "vllm" and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", self.server):
            raise ValueError(
                f"{section}.server = {self.server!r} with {section}.engine = vllm; give the server's address, as in "
                "http://localhost:8000"
            )
        if self.engine == "vllm" and self.no_repeat_ngram_size:
            raise ValueError(
                f"{section}.no_repeat_ngram_size = {self.no_repeat_ngram_size} is not known to a vLLM server; set it "
                f'to 0, or {section}.engine to "local"'
            )
        if self.gather not in GATHER_MODES:
            raise unknown("rollout.gather", self.gather, GATHER_MODES)


@dataclass(frozen=True)
class ValidationConfig:
    """every_steps: between two validations, one before the first step and one after the last come on top.
    rows: validation rows used (None: all). batch_rows: rows of one pass on one rank.
    rouge_rows: rows answered by sampling and scored with ROUGE-L, before and after (0: none). sampling_temperature
    is theirs. samples: answers printed beside each other at the end, greedy.
    best: after each validation that is the best so far, the one before training included, the student is exported to
    the folder `best`: by the lowest "kl" or "ce" (cross-entropy with the data), by the highest "rouge_l", "bleu",
    "chrf" or "exact_match", for which `rouge_rows` rows are answered and scored at each validation, or never ("").
    """

    every_steps: int = 50
    rows: int | None = None
    batch_rows: int = 8
    rouge_rows: int = 0
    sampling_temperature: float = 1.0
    samples: int = 0
    best: str = ""

    def validate(self) -> None:
        for name, least in (("every_steps", 1), ("rows", 1), ("batch_rows", 1), ("rouge_rows", 0), ("samples", 0)):
            _at_least(f"validation.{name}", getattr(self, name), least)
        _at_least("validation.sampling_temperature", self.sampling_temperature, 0)
        if self.best not in BEST_BY:
            raise unknown("validation.best", self.best, BEST_BY)
        if self.best in SCORES and not self.rouge_rows:
            raise ValueError(
                f"validation.best = {self.best} with validation.rouge_rows = 0; say how many rows to answer"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """every_steps: between two checkpoints; the end of training and a signal make one in any case (0: only they do).
    keep: newest ones that stay. on_failure: what a save that fails, a full disk for instance, does to the run; so with
    the export of the best student (validation.best)."""

    every_steps: int = 100
    keep: int = 2
    on_failure: str = "continue"

    def validate(self) -> None:
        _at_least("checkpoint.every_steps", self.every_steps, 0)
        _at_least("checkpoint.keep", self.keep, 1)
        if self.on_failure not in ON_FAILURE:
            raise unknown("checkpoint.on_failure", self.on_failure, ON_FAILURE)


@dataclass(frozen=True)
class FaultsConfig:
    """max_skipped_steps: a step whose loss or gradient is not finite is skipped; this many in a row end the run.
    spike_factor: also skip a step whose loss is above this many medians of the last `spike_window` losses
    (None: off). hang_s: where no rank shows progress for this long, the one behind is reported and the job ended;
    longer than loading a model, any pass of it, a save or an export. grace_s: a signal ends the run after this long
    even where no step ended.
    """

    max_skipped_steps: int = 3
    spike_factor: float | None = None
    spike_window: int = 50
    hang_s: float = 1800.0
    grace_s: float = 600.0

    def validate(self) -> None:
        for name in ("max_skipped_steps", "spike_window"):
            _at_least(f"faults.{name}", getattr(self, name), 1)
        for name in ("hang_s", "grace_s"):
            _above_zero(f"faults.{name}", getattr(self, name))
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ValueError(
                f"faults.spike_factor = {self.spike_factor}; it has to be above 1, or null to switch it off"
            )


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `precision` "auto" is bf16 where the device multiplies it in hardware, else fp32.
    The run's folder is output_dir/name; cache_dir keeps converted models ("" is ~/.cache/distillation-toolkit).
    resume: "auto" goes on from the newest whole checkpoint in that folder; "never" starts over and deletes them."""

    name: str = "run"
    seed: int = 10
    precision: str = "auto"
    output_dir: str = "runs"
    cache_dir: str = ""
    resume: str = "auto"
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

    def validate(self) -> None:
        """Raises ValueError for the first setting that cannot work."""
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.resume not in RESUME:
            raise unknown("resume", self.resume, RESUME)
        if not self.name or self.name in (".", "..") or "/" in self.name:
            raise ValueError(f"name = {self.name!r} has to be the name of one folder below output_dir")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed = {self.seed} lies outside [0, 2**64)")
        if self.has_teacher:
            self.teacher.validate("teacher")
        elif self.data.responses == "teacher" and not self.teacher.cache:
            raise ValueError('data.responses = "teacher", but teacher.path is empty; name a teacher, or use "data"')
        self.student.validate("student")
        for section in (self.data, self.text, self.loss, self.train, self.optimizer, self.schedule, self.rollout,
                        self.validation, self.checkpoint, self.faults):  # fmt: skip
            section.validate()
        if self.loss.divergence == NO_DIVERGENCE and self.schedule.policy != "off":
            raise ValueError(
                f'loss.divergence = "{NO_DIVERGENCE}" with schedule.policy = "{self.schedule.policy}": without a '
                "divergence nothing is left to learn from the student's own text but that text itself; set "
                'schedule.policy to "off", or loss.divergence to "skl"'
            )
        made = self.rollout.windows * self.train.batch_rows
        if self.schedule.policy != "off" and made > self.rollout.capacity:
            raise ValueError(
                f"rollout.windows = {self.rollout.windows} of train.batch_rows = {self.train.batch_rows} sequences do "
                f"not fit into rollout.capacity = {self.rollout.capacity}: text would be thrown away unread; raise the "
                f"capacity to {made} or more"
            )
        if self.rollout.engine == "vllm" and self.schedule.policy == "off":
            raise ValueError(
                'rollout.engine = "vllm" with schedule.policy = "off": the student never speaks in training, and a '
                'server would be waited for in vain; set rollout.engine = "local"'
            )
        if self.rollout.engine == "vllm" and self.rollout.server_timeout_s >= self.faults.hang_s:
            raise ValueError(
                f"rollout.server_timeout_s = {self.rollout.server_timeout_s:g} is not below faults.hang_s = "
                f"{self.faults.hang_s:g}: waiting for the server would be taken for a rank that hangs"
            )
        oldest, sync = self.rollout.max_age_steps, self.rollout.sync_every_steps
        draws = not self.rollout.train_on_fresh or self.rollout.windows > 1 or self.schedule.policy == "adaptive"
        if self.rollout.engine == "vllm" and draws and oldest is not None and oldest < sync - 1:
            raise ValueError(
                f"rollout.max_age_steps = {oldest} with rollout.sync_every_steps = {sync}: a server's text may be "
                f"{sync - 1} steps old when it is made; raise the first or lower the second"
            )
        if self.data.kind == "text":
            for name, value, needed in (
                ("schedule.policy", self.schedule.policy, "off"),
                ("validation.rouge_rows", self.validation.rouge_rows, 0),
                ("validation.samples", self.validation.samples, 0),
            ):
                if value != needed:
                    raise ValueError(
                        f'{name} = {value!r} asks for generated answers, but data.kind = "text" has no prompts; set it '
                        f"to {needed!r}"
                    )
        if self.loss.alpha_per_sequence and (self.data.packing or self.data.kind == "text"):
            raise ValueError(
                f"loss.alpha_per_sequence = true with data.packing = {self.data.packing} and data.kind = "
                f"{self.data.kind!r}: a row would hold several texts and have one alpha; set it to false, or use "
                'data.packing=false and data.kind="instructions"'
            )
        if self.teacher.cache:
            self._check_cache()
        if self.validation.best == "kl" and not self.has_teacher and not self.teacher.cache:
            raise ValueError('validation.best = "kl" without a teacher; name teacher.path, or use "ce" or a score')
        if self.data.streaming and self.train.epochs is not None:
            raise ValueError(
                f"train.epochs = {self.train.epochs} counts passes over the rows, but data.streaming = true reads rows "
                "whose number is not known; set train.steps and leave train.epochs at null"
            )
        if self.data.kind == "text" and self.data.responses != "data":
            raise ValueError(
                f'data.responses = {self.data.responses!r} answers prompts, but data.kind = "text" has none; use "data"'
            )
        if self.train.tokens is not None and self.data.kind != "text":
            raise ValueError(
                f"train.tokens = {self.train.tokens:g} counts tokens of plain text, but data.kind = "
                f"{self.data.kind!r}; set train.steps or train.epochs"
            )
        if self.train.epochs is None:
            self.for_rows(None)._check_warmup()
        sections = [("data", self.data)] + ([("text", self.text)] if self.text.source else [])
        for name, section in sections if self.train.micro_tokens else ():
            if self.train.micro_tokens < section.max_length:
                raise ValueError(
                    f"train.micro_tokens = {self.train.micro_tokens} is less than one row of {name}.max_length = "
                    f"{section.max_length} tokens; raise the first or lower the second"
                )

    def _check_cache(self) -> None:
        """What holds for every cache; what its form allows is known once it is open."""
        from toolkit.divergences.top_k import WITH_TOP_K

        loss, allowed = self.loss, (*WITH_TOP_K, NO_DIVERGENCE)
        for name, value, fits, needed in (
            ("loss.divergence", loss.divergence, loss.divergence in allowed, f"one of {', '.join(allowed)}"),
            ("loss.alpha_per_sequence", loss.alpha_per_sequence, not loss.alpha_per_sequence, "false"),
            ("data.streaming", self.data.streaming, not self.data.streaming, "false: a stream's texts are not known"),
            ("data.responses", self.data.responses, self.data.responses == "data", '"data", whose texts are known'),
            ("loss.cross_entropy_weight", loss.cross_entropy_weight,
             loss.temperature == 1 or not loss.cross_entropy_weight, "0 where loss.temperature is not 1"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(
                    f"{name} = {value!r} with teacher.cache = {self.teacher.cache!r}: from stored answers it has to be "
                    f'{needed}; or set teacher.cache to ""'
                )

    def _check_warmup(self) -> None:
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves nothing of train.steps = "
                f"{self.train.steps}; shorten the warm-up"
            )

    def for_rows(self, rows: int | None) -> RunConfig:
        """With train.steps for this many training rows (None: a stream), where train.epochs or train.tokens decides."""
        if self.train.tokens is not None:
            steps = math.ceil(self.train.tokens / (self.train.batch_rows * self.data.max_length))
        elif self.train.epochs is not None:
            steps = max(1, round(self.train.epochs * rows / self.train.batch_rows))
        else:
            return self
        config = dataclasses.replace(self, train=dataclasses.replace(self.train, steps=steps))
        config._check_warmup()
        return config

    @property
    def run_dir(self) -> Path:
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

    def micro_rows(self, world: int) -> int:
        """Rows of one micro-batch on one rank: the most, up to train.micro_rows, that divide each rank's share of the
        batch, and of the plain text beside it. Raises ValueError where ranks have no equal shares."""
        shares = []
        for name, rows in (("train.batch_rows", self.train.batch_rows), ("text.batch_rows", self.text_rows)):
            if rows % world:
                raise ValueError(f"{name} = {rows} is not a multiple of the {world} ranks; change one of them")
            shares.append(rows // world)
        both = math.gcd(*shares)
        return max(rows for rows in range(1, min(both, self.train.micro_rows) + 1) if both % rows == 0)

    def accumulation(self, world: int) -> int:
        """Micro-batches of one optimizer step on one rank, those of text.source included; 1 where train.micro_tokens
        leaves their number open. Raises ValueError where a batch does not divide."""
        micro_rows = self.micro_rows(world)
        if self.train.micro_tokens is not None:
            return 1
        return (self.train.batch_rows + self.text_rows) // (micro_rows * world)

    @property
    def generates(self) -> bool:
        """Whether prompts are answered in this run."""
        return self.schedule.policy != "off" or self.data.responses == "teacher" or self.asks_models

    @property
    def asks_models(self) -> bool:
        """Whether validation prompts are answered, by the student and its teacher."""
        return bool(self.validation.rouge_rows or self.validation.samples)

    @property
    def text_rows(self) -> int:
        """Blocks of plain text learned beside the distillation in one step, over all ranks."""
        return (self.text.batch_rows or self.train.batch_rows) if self.text.source else 0

    @property
    def packs(self) -> bool:
        """Whether rows hold several texts that must not see each other."""
        return self.data.packing or self.data.kind == "text" or bool(self.text.source)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; `from_dict` gives an equal config back."""
        return plain(dataclasses.asdict(self))

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        return cls().with_settings(values)

    def with_settings(self, values: Mapping[str, Any]) -> RunConfig:
        """`{"train.steps": 3, "name": "x"}` applied in order. Unknown keys raise ValueError."""
        config = self
        for key, value in values.items():
            config = with_value(config, key, value)
        return config

    def with_overrides(self, overrides: list[str]) -> RunConfig:
        """`["train.steps=3", "name=x"]` applied in order; values are YAML. Unknown keys raise ValueError."""
        return with_overrides(self, overrides)


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise ValueError(f"{name} = {value}; it has to be at least {least}")


def _above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} = {value}; it has to be above 0")
