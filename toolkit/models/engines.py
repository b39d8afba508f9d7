"""Teacher and student behind DeepSpeed engines. Neither makes logits of a whole batch.

Shapes: N response positions of a micro-batch, Ht and Hs hidden sizes of teacher and student, V head rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from toolkit import distributed
from toolkit.batch import TokenBatch
from toolkit.config import LossConfig, OptimizerConfig, RunConfig
from toolkit.divergences import Divergence, default_budget_mib, fused_linear_divergence
from toolkit.faults import Halving
from toolkit.models.ds_config import student_ds_config, teacher_ds_config
from toolkit.models.load import load_model
from toolkit.models.vocabulary import Vocabulary, check_head


class Head(NamedTuple):
    """A gathered output projection, and what its model does to logits after it."""

    weight_VH: Tensor
    bias_V: Tensor | None
    logit_scale: float
    soft_cap: float | None


class LossSums(NamedTuple):
    """Sums over a micro-batch's response tokens, detached, except `loss`, which is weighted and carries gradients."""

    loss: Tensor
    divergence_nats: Tensor
    cross_entropy_nats: Tensor
    agreements: Tensor


def build_teacher(config: RunConfig, path: str, dtype: torch.dtype, vocabulary: Vocabulary) -> Teacher:
    ds_config = teacher_ds_config(config, _name(dtype))
    model = load_model(config.teacher, path, ds_config, dtype, config.seed)
    check_head("teacher", _rows(model.get_output_embeddings().weight), vocabulary)
    model.requires_grad_(False)
    split_where_memory_runs_out(model)
    engine, *_ = deepspeed.initialize(model=_TeacherForward(model), config=ds_config)
    engine.eval()
    return Teacher(engine, config.teacher.pass_rows)


def build_student(config: RunConfig, path: str, dtype: torch.dtype, vocabulary: Vocabulary) -> Student:
    ds_config = student_ds_config(config, _name(dtype), distributed.world())
    model = load_model(config.student, path, ds_config, dtype, config.seed)
    check_head("student", _rows(model.get_output_embeddings().weight), vocabulary)
    if config.student.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = _StudentForward(model, config.loss, vocabulary)
    optimizer = _optimizer(module, config.optimizer, ds_config)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
    return Student(engine, config.optimizer, config.train.steps)


class WholeModel:
    """Stands where an engine of deepspeed would, for a module that is whole on each rank and is not trained."""

    def __init__(self, module: nn.Module):
        self.module = module.eval()

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def eval(self) -> None:
        """It is always in eval mode."""

    train = eval

    def zero_optimization_stage(self) -> int:
        return 0


def whole_student(model: PreTrainedModel, vocabulary: Vocabulary) -> Student:
    """A model to be measured: whole on each rank, without deepspeed."""
    check_head("model", len(model.get_output_embeddings().weight), vocabulary)
    return Student(WholeModel(_StudentForward(model, LossConfig(), vocabulary)), OptimizerConfig(), total_steps=1)


def whole_teacher(model: PreTrainedModel, vocabulary: Vocabulary) -> Teacher:
    """A model that others are measured against: whole on each rank, without deepspeed."""
    check_head("teacher", len(model.get_output_embeddings().weight), vocabulary)
    return Teacher(WholeModel(_TeacherForward(model)))


class Teacher:
    """The frozen model that is imitated. It answers with hidden states at response positions, Ht numbers a token."""

    def __init__(self, engine: Any, pass_rows: int | None = None):
        self.engine, self.pass_rows = engine, pass_rows

    @property
    def model(self) -> PreTrainedModel:
        return self.engine.module.model

    @torch.no_grad()
    def hidden_states(self, window: list[TokenBatch]) -> list[Tensor]:
        """For each micro-batch its hidden_NT, in the order of `targets_N`. Every rank has as many rows in its window,
        so every rank makes as many passes, and enters as many all-gathers."""
        per_pass = max(1, (self.pass_rows or 10**9) // len(window[0].input_ids_BT))
        found: list[Tensor] = []
        for start in range(0, len(window), per_pass):
            part = window[start : start + per_pass]
            joined = TokenBatch.concatenate(part)
            hidden_NT = self.engine(joined.input_ids_BT, joined.attention_mask_BT, joined.predicts_BT)
            found += hidden_NT.split([batch.num_targets for batch in part])
        return found

    @contextmanager
    def head(self) -> Iterator[Head]:
        """The gathered output projection, once for a whole window: no tile loop communicates."""
        projection = self.model.get_output_embeddings()
        parameters = [p for p in (projection.weight, getattr(projection, "bias", None)) if p is not None]
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
            # .data: a partitioned parameter handed to another engine's forward would be released by its hooks.
            weight_VH, bias_V = [*(parameter.data for parameter in parameters), None][:2]
            yield Head(weight_VH, bias_V, *logit_rules(self.model.config))


class Student:
    """The model that learns. Its engine computes the loss inside `forward`, where DeepSpeed gathers what it needs."""

    def __init__(self, engine: Any, optimizer: OptimizerConfig, total_steps: int):
        self.engine, self.optimizer_config, self.total_steps = engine, optimizer, total_steps

    @property
    def model(self) -> PreTrainedModel:
        return self.engine.module.model

    def loss(self, batch: TokenBatch, teacher_hidden_NT: Tensor, teacher_head: Head, token_weight: float = 1.0,
             divergence: Divergence | None = None) -> LossSums:  # fmt: skip
        """`loss` is token_weight times the sum over the batch's response tokens. `divergence`: in place of the
        configured one, for validation."""
        return LossSums(*self.engine(batch, teacher_hidden_NT, tuple(teacher_head), token_weight, divergence))

    def learning_rate(self, step: int) -> float:
        """Of step 0, 1, ...: linear warm-up to `lr`, then a cosine to `min_lr`. A pure function of the step."""
        config = self.optimizer_config
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        progress = (step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps)
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def set_learning_rate(self, step: int) -> float:
        rate = self.learning_rate(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        return rate


class _TeacherForward(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, predicts_BT: Tensor) -> Tensor:
        hidden_BTH = self.model.base_model(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False
        ).last_hidden_state
        return hidden_BTH[predicts_BT]


class _StudentForward(nn.Module):
    def __init__(self, model: PreTrainedModel, loss: LossConfig, vocabulary: Vocabulary):
        super().__init__()
        self.model, self.loss_config, self.vocabulary = model, loss, vocabulary
        self.divergence = Divergence(loss.divergence, alpha=loss.alpha, beta=loss.beta)
        self.tiles = Halving("the loss", "MiB of tiles", loss.memory_budget_mib, least=16)

    def forward(self, batch: TokenBatch, teacher_hidden_NT: Tensor, teacher_head: tuple, token_weight: float,
                divergence: Divergence | None) -> tuple[Tensor, ...]:  # fmt: skip
        hidden_BTH = self.model.base_model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
        ).last_hidden_state
        hidden_NS = hidden_BTH[batch.predicts_BT]
        teacher = Head(*teacher_head)
        projection = self.model.get_output_embeddings()
        scale, soft_cap = logit_rules(self.model.config)
        weight_VS = projection.weight  # read here: deepspeed gathers it as an external parameter, for backward as well
        bias_V = getattr(projection, "bias", None)
        # Around the operation and not the forward pass: nothing in it communicates, so one rank may repeat it alone.
        out = self.tiles.run(lambda budget_mib: fused_linear_divergence(
            divergence or self.divergence,
            hidden_NS,
            weight_VS,
            teacher_hidden_NT,
            teacher.weight_VH,
            weights_N=hidden_NS.new_full((len(hidden_NS),), token_weight, dtype=torch.float32),
            targets_N=batch.targets_N,
            cross_entropy_weight=self.loss_config.cross_entropy_weight if divergence is None else 0.0,
            temperature=self.loss_config.temperature if divergence is None else 1.0,
            valid_vocab=self.vocabulary.size,
            student_bias_V=bias_V,
            teacher_bias_V=teacher.bias_V,
            student_logit_scale=scale,
            teacher_logit_scale=teacher.logit_scale,
            student_soft_cap=soft_cap,
            teacher_soft_cap=teacher.soft_cap,
            memory_budget_mib=budget_mib,
        ), whole=default_budget_mib(hidden_NS.device))  # fmt: skip
        return out.loss, out.divergence_N.sum(), out.cross_entropy_N.sum(), out.agreement_N.sum()


def split_where_memory_runs_out(model: PreTrainedModel) -> None:
    """Lets each decoder layer of a frozen model work on half of its rows, a quarter, ..., once memory runs out.

    ZeRO-3 gathers a layer as a whole then (deepspeed's leaf modules): inside it nothing communicates, and a rank that
    repeats a layer keeps in step with the others. To be called before deepspeed.initialize.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        return
    deepspeed.utils.set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    halving = Halving("the teacher's window", "rows")
    for layer in layers:
        layer.forward = _in_parts(layer.forward, halving)


def _in_parts(forward: Callable[..., Any], halving: Halving) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(hidden_BTH: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = len(hidden_BTH)
        if any(kwargs.get(name) is not None for name in ("past_key_values", "cache")):
            return forward(
                hidden_BTH, *args, **kwargs
            )  # generation: the cache holds all rows, and halves its own batch

        def part(value: Any, start: int, end: int) -> Any:
            if isinstance(value, tuple):
                return tuple(part(item, start, end) for item in value)
            is_per_row = torch.is_tensor(value) and value.dim() >= 2 and len(value) == rows
            return value[start:end] if is_per_row else value

        def work(size: float | None) -> Any:
            if size is None or size >= rows:
                return forward(hidden_BTH, *args, **kwargs)
            outs = []
            for start in range(0, rows, int(size)):
                at = start, min(rows, start + int(size))
                named = {name: part(value, *at) for name, value in kwargs.items()}
                outs.append(forward(part(hidden_BTH, *at), *(part(value, *at) for value in args), **named))
            if torch.is_tensor(outs[0]):
                return torch.cat(outs)
            return tuple(torch.cat(same) if torch.is_tensor(same[0]) else same[0] for same in zip(*outs, strict=True))

        return halving.run(work, whole=rows)

    return run


def logit_rules(config: Any) -> tuple[float, float | None]:
    """(scale, soft cap) of the logits: Cohere multiplies, Granite divides, Gemma-2 caps."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def _optimizer(module: nn.Module, config: OptimizerConfig, ds_config: dict) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
    settings = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": config.weight_decay}
    if ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _rows(weight: Tensor) -> int:
    return getattr(weight, "ds_shape", weight.shape)[0]


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"
