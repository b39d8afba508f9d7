"""What engines run: the passes of teacher and student, and the student's loss. None makes logits of a whole batch.

Shapes: N response positions of a micro-batch, Ht and Hs hidden sizes of teacher and student, V head rows.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from toolkit.batch import DecoderOnly, EncoderDecoder, RowLayout, TokenBatch, layout_of
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
from toolkit.models import zero
from toolkit.models.attention import as_transformers_does
from toolkit.models.head import head_dtype, head_of, logits_of, stack_of
from toolkit.models.vocabulary import Vocabulary
from toolkit.ranks.memory import Halving
from toolkit.settings import NO_DIVERGENCE, LossConfig, OptimizerConfig

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


class Student:
    """The model that learns. Its engine computes the loss inside `forward`, where DeepSpeed gathers what it needs."""

    def __init__(self, engine: Any, optimizer: OptimizerConfig, total_steps: int):
        self.engine, self.optimizer_config, self.total_steps = engine, optimizer, total_steps

    @property
    def model(self) -> PreTrainedModel:
        """The language model inside of the engine's module."""
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
        """Give the optimizer `learning_rate(step)`, and return it."""
        rate = self.learning_rate(step)
        for group in zero.inner_optimizer(self.engine).param_groups:
            group["lr"] = rate
        return rate


@torch.no_grad()
def both_logits(engine: Any, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """[N, V] at the positions that predict response tokens: as the model's own forward makes them, and as everything
    here does. Collective."""
    return engine(batch.to(engine.module.model.device), answer="logits")


@contextmanager
def evaluation_mode(engine: Any) -> Iterator[None]:
    """Inside, the engine's module is in eval mode; afterwards it is in the mode that it had."""
    was_training = engine.module.training
    engine.module.eval()
    try:
        yield
    finally:
        engine.module.train(was_training)


@torch.no_grad()
def hidden_states(engine: Any, batch: TokenBatch) -> Tensor:
    """hidden_NH at the positions that predict response tokens. Collective."""
    return engine(batch.to(engine.module.model.device), answer="hidden")


def _both_logits(model: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    with as_transformers_does():
        own_BTV = model(**batch.model_inputs(), use_cache=False).logits
    return own_BTV[batch.predicts_BT], logits_of(model, response_hidden(model, batch))


class TeacherForward(nn.Module):
    """What a teacher's engine runs."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch, answer: str = "hidden") -> Tensor | tuple[Tensor, Tensor]:
        """answer: "hidden" gives hidden_NT, "logits" what `both_logits` says."""
        return _both_logits(self.model, batch) if answer == "logits" else response_hidden(self.model, batch)


class StudentForward(nn.Module):
    """What a student's engine runs: the model and the loss. So ZeRO-3 gathers the head for as long as the loss needs
    it, and again in the backward pass."""

    def __init__(self, model: PreTrainedModel, loss: LossConfig, vocabulary: Vocabulary):
        super().__init__()
        self.model, self.vocabulary = model, vocabulary
        self.tiles = Halving("the loss", "MiB of tiles", loss.memory_budget_mib, least=1)

    def forward(self, batch: TokenBatch, signal: Signal = None, teacher_head: Head | None = None,
                objective: Objective = CROSS_ENTROPY, token_weight: float = 1.0, answer: str = "loss",
                ) -> LossSums | Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """answer: "loss" gives what `Student.loss` says, "hidden" hidden_NS, "logits" what `both_logits` says."""
        if answer == "logits":
            return _both_logits(self.model, batch)
        hidden_NS, head = response_hidden(self.model, batch), head_of(self.model)
        # Not before the head: ZeRO-3 learns from a pass what the next one through the same modules is going to gather.
        if answer == "hidden":
            return hidden_NS
        # Hidden states become logits by the teacher's head; a stored top k and no signal are taken as they are.
        teacher = Hidden(signal, cast(Head, teacher_head)) if isinstance(signal, Tensor) else signal
        weights_N = hidden_NS.new_full((len(hidden_NS),), token_weight, dtype=torch.float32)

        def work(budget_mib: float | None) -> FusedLoss:
            return fused_linear_divergence(
                CROSS_ENTROPY if teacher is None else objective, student=Hidden(hidden_NS, head), teacher=teacher,
                targets_N=batch.targets_N, weights_N=weights_N, sequence_lengths_B=batch.predicts_BT.sum(1),
                valid_vocab=self.vocabulary.size, memory_budget_mib=budget_mib,
            )  # fmt: skip

        # A rank that runs out of memory repeats the operation in smaller tiles, alone. It may, as nothing inside of
        # the operation communicates; the forward pass before it does, and is not repeated.
        out = self.tiles.run(work, whole=default_budget_mib(hidden_NS.device))
        return LossSums(out.loss, out.divergence_N.sum(), out.cross_entropy_N.sum(), out.agreement_N.sum())


def response_hidden(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """hidden_NH at the positions that predict response tokens, in the order of `batch.targets_N`."""
    hidden_BTH = HIDDEN_STATES[type(layout_of(model.config))](model, batch)
    return hidden_BTH[batch.predicts_BT].to(head_dtype(model))  # Mamba's come in fp32, whatever its head is


def _of_one_stack(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """hidden_BTH."""
    inputs = batch.model_inputs()
    if batch.position_ids_BT is not None and model.config.model_type in MAKES_NO_PACKED_MASK:
        like_BT1 = batch.input_ids_BT.new_empty((*batch.input_ids_BT.shape, 1), dtype=model.dtype)
        inputs["attention_mask"] = create_causal_mask(
            model.config, like_BT1, attention_mask=None, cache=None, position_ids=batch.position_ids_BT
        )
    elif batch.position_ids_BT is not None and "flash" in (model.config._attn_implementation or ""):
        # transformers finds the texts for flash attention in a single row only. Positions start over in each row too.
        inputs = {name: tensor_BT.reshape(1, -1) for name, tensor_BT in inputs.items()}
    hidden_BTH = stack_of(model)(**inputs, use_cache=False).last_hidden_state
    return hidden_BTH.reshape(*batch.predicts_BT.shape, -1)


def _of_encoder_and_decoder(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """hidden_BTH of the decoder. The stacks run one by one: the model is its own base model, and would run its head."""
    stacks: Any = model
    # The encoder reads the prompts, and the decoder what it made of them and the responses.
    inputs = batch.model_inputs()
    mask_BS = inputs["attention_mask"]
    encoded_BSH = stacks.encoder(input_ids=inputs["input_ids"], attention_mask=mask_BS).last_hidden_state
    return stacks.decoder(
        input_ids=inputs["decoder_input_ids"], attention_mask=inputs["decoder_attention_mask"],
        encoder_hidden_states=encoded_BSH, encoder_attention_mask=mask_BS, use_cache=False,
    ).last_hidden_state  # fmt: skip


#: layout of rows -> how a model of it makes hidden states of a batch
HIDDEN_STATES: dict[type[RowLayout], Callable[[PreTrainedModel, TokenBatch], Tensor]] = {
    DecoderOnly: _of_one_stack,
    EncoderDecoder: _of_encoder_and_decoder,
}
