"""The trained student as a plain Hugging Face folder, with adapters merged into it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit import distributed
from toolkit.faults import to_disk
from toolkit.models.engines import Student


def export_student(student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Rank 0 writes safetensors, configuration and tokenizer; parameters are gathered one at a time, by all ranks.

    `folder` appears by rename when it is whole, in place of an older export. With LoRA the weights are the merged ones,
    and `folder`/adapter is what peft loads onto the base. Raises ValueError, on every rank, if writing fails.
    """
    model, weights, adapter = student.model, {}, {}
    is_writer = distributed.rank() == 0
    layers = lora.adapted(model) if (lora := _lora(model)) else {}
    for name, parameter in model.named_parameters():  # tied parameters are named once
        with lora.merged_weight(layers[name]) if name in layers else _gathered(parameter) as weight:
            if is_writer:
                found = adapter if lora and lora.is_adapter(name) else weights
                found[name] = weight.detach().to("cpu", copy=True)
    persistent = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    weights |= {name: tensor.cpu() for name, tensor in model.named_buffers() if name in persistent}

    def write() -> None:
        if not is_writer:
            return
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        config = copy.deepcopy(model.config)
        config.use_cache = True
        # A shell without storage: save_pretrained needs a model's class and configuration, the tensors are given.
        with torch.device("meta"):
            shell = type(model)(config).to(next(iter(weights.values())).dtype)  # which config.json will name
        shell.generation_config = _ending_with(model.generation_config, tokenizer.eos_token_id)
        plain = {lora.plain_name(name): weight for name, weight in weights.items()} if lora else weights
        shell.save_pretrained(unfinished, state_dict=plain)
        tokenizer.save_pretrained(unfinished)
        if lora:
            lora.save_adapter(model, adapter, unfinished / "adapter")
        to_disk(*unfinished.rglob("*"), unfinished)
        old = folder.with_name(folder.name + ".deleting")  # a kill may not leave half an export under its name
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
        to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    try:
        distributed.together(write)
    except ValueError as error:
        if is_writer:
            shutil.rmtree(folder.with_name(folder.name + ".unfinished"), ignore_errors=True)
        raise distributed.Told(f"the student could not be written to {folder}: {error}") from error


def _ending_with(settings: GenerationConfig, eos_id: int) -> GenerationConfig:
    """A copy in which a text ends at `eos_id` too: the token that the student has learned to end with. Settings that
    transformers has loaded with a mere warning, but would not save, are mended."""
    settings = copy.deepcopy(settings)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if eos_id not in ends:
        settings.eos_token_id = [*(end for end in ends if end is not None), eos_id]
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True  # which a temperature or top_p without it was meant to be
    return settings


@contextmanager
def _gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
        yield parameter


def _lora(model: PreTrainedModel) -> Any:
    """The module that knows adapters, where there are any: peft takes long to import."""
    if not hasattr(model, "peft_config"):
        return None
    from toolkit.models import lora

    return lora
