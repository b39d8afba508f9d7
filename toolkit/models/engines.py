"""Teacher and student behind DeepSpeed engines. Neither makes logits of a whole batch.

Shapes: N response positions of a micro-batch, Ht and Hs hidden sizes of teacher and student, V head rows.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from toolkit.batch import Example, TokenBatch
from toolkit.divergences import (
    CROSS_ENTROPY,
    Divergence,
    FusedLoss,
    Head,
    Hidden,
    Objective,
    TopKTeacher,
    default_budget_mib,
    fused_linear_divergence,
)
from toolkit.models.ds_config import student_ds_config, teacher_ds_config
from toolkit.models.dtypes import keeping_frozen, train_in
from toolkit.models.head import check_logits, head_dtype, head_of, logits_of, stack_of
from toolkit.models.load import base_name, load_model
from toolkit.models.vocabulary import Vocabulary, check_head
from toolkit.ranks import collectives
from toolkit.ranks.memory import Halving
from toolkit.seeds import philox
from toolkit.settings import NO_DIVERGENCE, LossConfig, OptimizerConfig, RunConfig

#: families whose code takes position ids but makes no mask of them, so that packed texts would see each other
MAKES_NO_PACKED_MASK = {"opt"}


#: the teacher's answer to a micro-batch: hidden_NT, the stored top k of its N positions, or None where it is not asked
Signal = Tensor | TopKTeacher | None


def objective_of(loss: LossConfig, *, on_student_text: bool = False, progress: float = 0.0) -> Objective:
    """What the configured loss minimises, at `progress` from 0 to 1 through the run."""
    name = loss.student_text_divergence if on_student_text and loss.student_text_divergence else loss.divergence
    weight = loss.student_text_cross_entropy_weight if on_student_text else loss.cross_entropy_weight
    if name == NO_DIVERGENCE:
        return Objective(None, cross_entropy_weight=weight, temperature=loss.temperature)
    alpha = loss.alpha if loss.alpha_end is None else loss.alpha + (loss.alpha_end - loss.alpha) * progress
    return Objective(
        Divergence(name, alpha=alpha, beta=loss.beta, head_mass=loss.head_mass), cross_entropy_weight=weight,
        temperature=loss.temperature, alpha_per_sequence=loss.alpha_per_sequence,
    )  # fmt: skip


class LossSums(NamedTuple):
    """Sums over a micro-batch's response tokens, detached, except `loss`, which is weighted and carries gradients.
    divergence_nats and agreements are 0 where there was no signal."""

    loss: Tensor
    divergence_nats: Tensor
    cross_entropy_nats: Tensor
    agreements: Tensor


def build_teacher(config: RunConfig, path: str, dtype: torch.dtype, vocabulary: Vocabulary) -> Teacher:
    ds_config = teacher_ds_config(config, _name(dtype))
    model = collectives.together(lambda: load_model(config.teacher, path, ds_config, dtype, config.seed))
    check_head("teacher", _rows(model.get_output_embeddings().weight), vocabulary)
    model.requires_grad_(False)
    split_where_memory_runs_out(model)
    with keeping_frozen(model):
        engine, *_ = deepspeed.initialize(model=_TeacherForward(model), config=ds_config)
    engine.eval()
    _check("teacher", engine, vocabulary)
    return Teacher(engine, config.teacher.pass_rows, config.train.batch_rows // collectives.world())


def build_student(config: RunConfig, path: str, dtype: torch.dtype, vocabulary: Vocabulary) -> Student:
    ds_config = student_ds_config(config, _name(dtype), collectives.world())
    model = collectives.together(lambda: load_model(config.student, path, ds_config, dtype, config.seed))
    check_head("student", _rows(model.get_output_embeddings().weight), vocabulary)
    if config.student.lora.rank:
        from toolkit.models.lora import add_adapters  # peft takes long to import

        add_adapters(model, config.student.lora, base_name(config.student, path), config.seed)
    if config.student.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train_in(model, dtype)
    module = _StudentForward(model, config.loss, vocabulary)
    optimizer = _optimizer(module, config.optimizer, ds_config)
    with keeping_frozen(model):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
    engine.eval()
    _check("student", engine, vocabulary)
    engine.train()  # transformers loads a model in evaluation mode: without dropout and gradient checkpointing
    torch.manual_seed(int(philox(config.seed, 0, collectives.rank()).random_raw()))  # dropout is each rank's own
    return Student(engine, config.optimizer, config.train.steps)


def free(*models: Teacher | Student | NoTeacher) -> None:
    """Undo what would hold the engines' memory after their last use: with deepspeed 0.19 that are gradient buckets, the
    modules of its last forward pass, and caches of methods. The garbage collector finds the rest."""
    for engine in (model.engine for model in models if not isinstance(model, NoTeacher)):
        engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    # hpZ's group of ranks, which deepspeed makes once in a process: the next zero.Init would be refused.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    for found in gc.get_objects():  # type(): isinstance asks objects that warn when they are touched
        if type(found) is functools._lru_cache_wrapper and found.__module__.startswith("deepspeed."):
            found.cache_clear()


class WholeModel:
    """Stands where an engine of deepspeed would, for a module that is whole on each rank and is not trained."""

    def __init__(self, module: nn.Module):
        self.module = module.eval()

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.module(*args, **named)

    def eval(self) -> None:
        """It is always in eval mode."""

    train = eval

    def zero_optimization_stage(self) -> int:
        return 0


def whole_student(model: PreTrainedModel, vocabulary: Vocabulary) -> Student:
    """A model to be measured: whole on each rank, without deepspeed."""
    check_head("model", len(model.get_output_embeddings().weight), vocabulary)
    engine = WholeModel(_StudentForward(model, LossConfig(), vocabulary))
    _check("model", engine, vocabulary)
    return Student(engine, OptimizerConfig(), total_steps=1)


def whole_teacher(model: PreTrainedModel, vocabulary: Vocabulary) -> Teacher:
    """A model that others are measured against: whole on each rank, without deepspeed."""
    check_head("teacher", len(model.get_output_embeddings().weight), vocabulary)
    engine = WholeModel(_TeacherForward(model))
    _check("teacher", engine, vocabulary)
    return Teacher(engine)


class Teacher:
    """The frozen model that is imitated. It answers with hidden states at response positions, Ht numbers a token."""

    kind = "live"

    def __init__(self, engine: Any, pass_rows: int | None = None, window_rows: int = 1):
        self.engine, self.pass_rows, self.window_rows = engine, pass_rows, window_rows

    @property
    def model(self) -> PreTrainedModel:
        return self.engine.module.model

    @torch.no_grad()
    def signals(self, window: list[TokenBatch]) -> list[Signal]:
        """For each micro-batch its hidden_NT, in the order of `targets_N`. Every rank has as many micro-batches in its
        window, so every rank makes as many passes, and enters as many all-gathers."""
        # Of settings, not of the batches at hand: micro-batches may have other numbers of rows on other ranks.
        per_pass = max(1, (self.pass_rows or self.window_rows) * len(window) // self.window_rows)
        found: list[Signal] = []
        for start in range(0, len(window), per_pass):
            part = window[start : start + per_pass]
            joined = TokenBatch.concatenate(part)
            hidden_NT = self.engine(joined)
            found += hidden_NT.split([batch.num_targets for batch in part])
        return found

    @contextmanager
    def head(self) -> Iterator[Head]:
        """The gathered output projection, once for a whole window: no tile loop communicates."""
        parameters = list(self.model.get_output_embeddings().parameters())
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
            head = head_of(self.model)
            # .data: a partitioned parameter handed to another engine's forward would be released by its hooks.
            bias_V = None if head.bias_V is None else head.bias_V.data
            yield replace(head, weight_VH=head.weight_VH.data, bias_V=bias_V)


class NoTeacher:
    """In the place of a teacher where a run trains on the cross entropy with its data alone."""

    kind = None

    def signals(self, window: list[TokenBatch]) -> list[Signal]:
        return [None] * len(window)

    @contextmanager
    def head(self) -> Iterator[None]:
        yield None


class Student:
    """The model that learns. Its engine computes the loss inside `forward`, where DeepSpeed gathers what it needs."""

    def __init__(self, engine: Any, optimizer: OptimizerConfig, total_steps: int):
        self.engine, self.optimizer_config, self.total_steps = engine, optimizer, total_steps

    @property
    def model(self) -> PreTrainedModel:
        return self.engine.module.model

    def loss(self, batch: TokenBatch, signal: Signal, teacher_head: Head | None, objective: Objective,
             token_weight: float = 1.0) -> LossSums:  # fmt: skip
        """`loss` is token_weight times the sum of `objective` over the batch's response tokens, or of their cross
        entropies where there is no signal. `teacher_head`: where the signal is hidden states."""
        # deepspeed's ZeRO-3 hooks look for tensors in tuples, lists and dicts among the arguments, to run its backward
        # hooks by them. Those of dataclasses they leave alone, as is right here: no gradient goes there.
        return self.engine(batch, signal, teacher_head, objective, token_weight)

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


@torch.no_grad()
def both_logits(engine: Any, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """[N, V] at the positions that predict response tokens: as the model's own forward makes them, and as everything
    here does. Collective."""
    return engine(batch.to(engine.module.model.device), answer="logits")


@torch.no_grad()
def hidden_states(engine: Any, batch: TokenBatch) -> Tensor:
    """hidden_NH at the positions that predict response tokens. Collective."""
    return engine(batch.to(engine.module.model.device), answer="hidden")


def _check(role: str, engine: Any, vocabulary: Vocabulary) -> None:
    """`check_logits` on a few tokens. Collective."""
    ids_T = np.random.default_rng(0).integers(0, vocabulary.size, 8)
    start = vocabulary.decoder_start_id
    batch = TokenBatch.from_examples([Example(ids_T, 4)], vocabulary.pad_id, decoder_start_id=start)
    check_logits(role, engine.module.model, *both_logits(engine, batch), vocabulary)


def _both_logits(model: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    own_BTV = model(**batch.model_inputs(), use_cache=False).logits
    return own_BTV[batch.predicts_BT], logits_of(model, response_hidden(model, batch))


class _TeacherForward(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch, answer: str = "hidden") -> Tensor | tuple[Tensor, Tensor]:
        return _both_logits(self.model, batch) if answer == "logits" else response_hidden(self.model, batch)


class _StudentForward(nn.Module):
    def __init__(self, model: PreTrainedModel, loss: LossConfig, vocabulary: Vocabulary):
        super().__init__()
        self.model, self.vocabulary = model, vocabulary
        self.tiles = Halving("the loss", "MiB of tiles", loss.memory_budget_mib, least=1)

    def forward(self, batch: TokenBatch, signal: Signal = None, teacher_head: Head | None = None,
                objective: Objective = CROSS_ENTROPY, token_weight: float = 1.0, answer: str = "loss",
                ) -> LossSums | Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        if answer == "logits":
            return _both_logits(self.model, batch)
        hidden_NS = response_hidden(self.model, batch)
        head = head_of(self.model)  # read here: deepspeed gathers it as an external parameter, for backward as well
        if answer == "hidden":  # not before: deepspeed knows passes by their modules, and expects what one has gathered
            return hidden_NS
        if isinstance(signal, Tensor):
            assert teacher_head is not None, "hidden states come with the head that makes logits of them"
            teacher: Hidden | TopKTeacher | None = Hidden(signal, teacher_head)
        else:
            teacher = signal
        weights_N = hidden_NS.new_full((len(hidden_NS),), token_weight, dtype=torch.float32)

        def work(budget_mib: float | None) -> FusedLoss:
            return fused_linear_divergence(
                CROSS_ENTROPY if teacher is None else objective, student=Hidden(hidden_NS, head), teacher=teacher,
                targets_N=batch.targets_N, weights_N=weights_N, sequence_lengths_B=batch.predicts_BT.sum(1),
                valid_vocab=self.vocabulary.size, memory_budget_mib=budget_mib,
            )  # fmt: skip

        # Around the operation and not the forward pass: nothing in it communicates, so one rank may repeat it alone.
        out = self.tiles.run(work, whole=default_budget_mib(hidden_NS.device))
        return LossSums(out.loss, out.divergence_N.sum(), out.cross_entropy_N.sum(), out.agreement_N.sum())


def response_hidden(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """hidden_NH at the positions that predict response tokens, in the order of `batch.targets_N`."""
    inputs = batch.model_inputs()
    if batch.encoder_ids_BS is not None:
        # The stacks one by one: an encoder-decoder model is its own base model, and would run its head.
        mask_BS = inputs["attention_mask"]
        encoded_BSH = model.encoder(input_ids=inputs["input_ids"], attention_mask=mask_BS).last_hidden_state
        hidden_BTH = model.decoder(
            input_ids=inputs["decoder_input_ids"], attention_mask=inputs["decoder_attention_mask"],
            encoder_hidden_states=encoded_BSH, encoder_attention_mask=mask_BS, use_cache=False,
        ).last_hidden_state  # fmt: skip
        return hidden_BTH[batch.predicts_BT]
    if batch.position_ids_BT is not None and model.config.model_type in MAKES_NO_PACKED_MASK:
        like_BT1 = batch.input_ids_BT.new_empty((*batch.input_ids_BT.shape, 1), dtype=model.dtype)
        inputs["attention_mask"] = create_causal_mask(
            model.config, like_BT1, attention_mask=None, cache=None, position_ids=batch.position_ids_BT
        )
    elif batch.position_ids_BT is not None and "flash" in (model.config._attn_implementation or ""):
        # transformers finds the texts for flash attention in a single row only; positions start over in each row too
        inputs = {name: tensor_BT.reshape(1, -1) for name, tensor_BT in inputs.items()}
    hidden_BTH = stack_of(model)(**inputs, use_cache=False).last_hidden_state
    hidden_NH = hidden_BTH.reshape(*batch.predicts_BT.shape, -1)[batch.predicts_BT]
    return hidden_NH.to(head_dtype(model))  # Mamba's come in fp32, whatever its head is


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
            # T5's position bias is one for all rows, and comes back beside the hidden states.
            return tuple(
                torch.cat(same) if torch.is_tensor(same[0]) and len(same[0]) == int(size) else same[0]
                for same in zip(*outs, strict=True)
            )

        return halving.run(work, whole=rows)

    return run


def _optimizer(module: nn.Module, config: OptimizerConfig, ds_config: dict) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    # Weight decay pulls matrices towards 0; the gain of a norm or a bias has no reason to be there.
    groups = [[p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]]
    groups.append([p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1])
    parameters = [
        {"params": group, "weight_decay": decay}
        for group, decay in zip(groups, (config.weight_decay, 0.0), strict=True) if group
    ]  # fmt: skip
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr)
    settings = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _rows(weight: Tensor) -> int:
    return getattr(weight, "ds_shape", weight.shape)[0]


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"
