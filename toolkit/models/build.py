"""Teacher and student, built: loaded, checked, adapted and handed to DeepSpeed, or left whole on each rank."""

from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from toolkit.batch import Example
from toolkit.models import zero
from toolkit.models.ds_config import student_ds_config
from toolkit.models.dtypes import train_in
from toolkit.models.engines import Student, StudentForward, both_logits
from toolkit.models.head import check_logits
from toolkit.models.load import base_name, load_model
from toolkit.models.vocabulary import Vocabulary, check_head
from toolkit.ranks import collectives
from toolkit.seeds import philox
from toolkit.settings import LossConfig, OptimizerConfig, RunConfig


def build_student(config: RunConfig, path: str, dtype: torch.dtype, vocabulary: Vocabulary) -> Student:
    """The model at `path`, with adapters where the settings ask for them, and its optimizer, behind an engine that
    trains it. Collective; raises ValueError as `build_teacher` does."""
    ds_config = student_ds_config(config, name_of(dtype), collectives.world())
    model = collectives.together(lambda: load_model(config.student, path, ds_config, dtype, config.seed))
    # Everything that changes the model's parameters comes before the engine, which makes its own copies of them.
    check_head("student", zero.whole_shape(model.get_output_embeddings().weight)[0], vocabulary)
    if config.student.lora.rank:
        from toolkit.models.lora import add_adapters  # here, as peft takes long to import

        add_adapters(model, config.student.lora, base_name(config.student, path), config.seed)
    if config.student.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train_in(model, dtype)
    module = StudentForward(model, config.loss, vocabulary)
    engine = zero.initialize(module, ds_config, _optimizer(module, config.optimizer, ds_config))
    engine.eval()
    check_engine("student", engine, vocabulary)
    # transformers loads a model in evaluation mode, in which it drops nothing out and keeps all activations.
    engine.train()
    # Each rank drops out other numbers.
    torch.manual_seed(int(philox(config.seed, 0, collectives.rank()).random_raw()))
    return Student(engine, config.optimizer, config.train.steps)


class WholeModel:
    """Stands where an engine of deepspeed would, for a module that is whole on each rank and is not trained."""

    def __init__(self, module: nn.Module):
        self.module = module.eval()

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.module(*args, **named)

    def eval(self) -> None:
        """Nothing to do: it is always in eval mode."""

    train = eval

    def destroy(self) -> None:
        """Nothing to do: it has no hooks and no buckets."""

    def zero_optimization_stage(self) -> int:
        """Nothing is sharded."""
        return 0


def whole_student(model: PreTrainedModel, vocabulary: Vocabulary) -> Student:
    """A model to be measured: whole on each rank, without deepspeed. Raises ValueError as `build_teacher` does."""
    check_head("model", len(model.get_output_embeddings().weight), vocabulary)
    engine = WholeModel(StudentForward(model, LossConfig(), vocabulary))
    check_engine("model", engine, vocabulary)
    return Student(engine, OptimizerConfig(), total_steps=1)


def check_engine(role: str, engine: Any, vocabulary: Vocabulary) -> None:
    """`check_logits` on a few tokens. Collective."""
    ids_T = np.random.default_rng(0).integers(0, vocabulary.size, 8)
    batch = vocabulary.layout.batch([Example(ids_T, 4)], vocabulary.pad_id)
    check_logits(role, engine.module.model, *both_logits(engine, batch), vocabulary)


def _optimizer(module: nn.Module, config: OptimizerConfig, ds_config: dict[str, Any]) -> Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    # Weight decay pulls matrices towards 0; the gain of a norm or a bias has no reason to be there.
    matrices = [p for p in trained if len(zero.whole_shape(p)) > 1]
    others = [p for p in trained if len(zero.whole_shape(p)) <= 1]
    groups = (matrices, config.weight_decay), (others, 0.0)
    parameters = [{"params": group, "weight_decay": decay} for group, decay in groups if group]
    # Plain SGD, or AdamW: deepspeed's where states lie in CPU memory, torch's fused one otherwise.
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr)
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def name_of(dtype: torch.dtype) -> str:
    """What the settings call the precision."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"
