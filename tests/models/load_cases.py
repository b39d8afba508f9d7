"""What the pools' ranks run for the tests of loading. Nothing here is a test."""

import deepspeed
import numpy as np
import torch

from toolkit.batch import Example, TokenBatch
from toolkit.models import Vocabulary, load_model
from toolkit.ranks import collectives
from toolkit.settings import ModelConfig, RunConfig
from toolkit.teachers.live import build_teacher


def zero3_config(dtype):
    return {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def loaded(path, dtype, model=None):
    """(elements of a large parameter held outside its partition, all parameters gathered) after a ZeRO-3 load."""
    found = load_model(model or ModelConfig(path=path), path, zero3_config(dtype), dtype, seed=3)
    local = found.get_output_embeddings().weight.numel()
    with deepspeed.zero.GatheredParameters(list(found.parameters()), modifier_rank=None):
        return local, {name: parameter.detach().clone() for name, parameter in found.named_parameters()}


def load_errors(paths):
    """What a ZeRO-3 load of this rank's own path raises here."""
    try:
        loaded(paths[collectives.rank()], torch.float32)
    except ValueError as error:
        return str(error)


def all_tensors(paths, dtype):
    """By path and name every parameter and buffer of a model after a ZeRO-3 load, gathered."""
    found = {}
    for path in paths:
        model = load_model(ModelConfig(path=path), path, zero3_config(dtype), dtype)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
            named = [*model.named_parameters(), *model.named_buffers()]
            found[path] = {name: tensor.detach().clone() for name, tensor in named}
    return found


def teacher_hidden(overrides, ids):
    """[N, H] of a run's teacher after each token of rows of ids but the last."""
    config = RunConfig().with_overrides(overrides)
    teacher = build_teacher(config, config.teacher.path, torch.bfloat16, Vocabulary(90, (1,), 0))
    return teacher.signals([TokenBatch.from_examples([Example(np.asarray(row), 1) for row in ids], 0)])[0]
