"""The trained student as a plain Hugging Face folder."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import deepspeed
import torch
from transformers import PreTrainedTokenizerBase

from toolkit import distributed
from toolkit.faults import to_disk
from toolkit.models.engines import Student


def export_student(student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Rank 0 writes safetensors, configuration and tokenizer; parameters are gathered one at a time, by all ranks.

    `folder` appears by rename when it is whole, in place of an older export. Raises ValueError, on every rank, if
    writing fails.
    """
    model, weights = student.model, {}
    is_writer = distributed.rank() == 0
    for name, parameter in model.named_parameters():  # tied parameters are named once
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            if is_writer:
                weights[name] = parameter.detach().to("cpu", copy=True)
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
            shell = type(model)(config)
        shell.generation_config = model.generation_config
        shell.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        to_disk(*unfinished.iterdir(), unfinished)
        old = folder.with_name(folder.name + ".deleting")  # a kill may not leave half an export under its name
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
        to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    distributed.together(write)
