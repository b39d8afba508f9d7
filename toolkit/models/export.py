"""The trained student as a plain Hugging Face folder, with adapters merged into it."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.models.engines import Student
from toolkit.models.portable import make_portable
from toolkit.models.tokenizer import check_saved
from toolkit.ranks import collectives
from toolkit.storage.appear import to_disk

Result = TypeVar("Result")


def export_student(
    student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path, untie_head: bool = False
) -> None:
    """Rank 0 writes safetensors, configuration and tokenizer; parameters are gathered one at a time, by all ranks.

    `folder` appears by rename when it is whole, in place of an older export. With LoRA the weights are the merged ones,
    and `folder`/adapter is what peft loads onto the base. untie_head: where the head shares its weights with the input
    embeddings, write it as a tensor of its own, and say so in config.json. Raises ValueError, on every rank, if writing
    fails.
    """
    model, weights, adapter = student.model, {}, {}
    is_writer = collectives.rank() == 0
    layers = lora.adapted(model) if (lora := _lora(model)) else {}
    for name, parameter in model.named_parameters():  # tied parameters are named once
        with lora.merged_weight(layers[name]) if name in layers else _gathered(parameter) as weight:
            if is_writer:
                found = adapter if lora and lora.is_adapter(name) else weights
                found[name] = weight.detach().to("cpu", copy=True)
    persistent = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    weights |= {name: tensor.cpu() for name, tensor in model.named_buffers() if name in persistent}
    ties = _ties_of_head(model) if untie_head else {}

    def write(unfinished: Path) -> None:
        weights.update({name: weights[written].clone() for name, written in ties.items()})
        plain = {lora.plain_name(name): weight for name, weight in weights.items()} if lora else weights
        _write(model, tokenizer, unfinished, plain, adapter, has_own_head=bool(ties))
        to_disk(*unfinished.rglob("*"), unfinished)
        old = folder.with_name(folder.name + ".deleting")  # a kill may not leave half an export under its name
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
        to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    _in_new_folder(folder, write)


def rehearse_export(student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Rank 0 writes what `export_student` will write, but no weights, and deletes it. So a configuration, tokenizer or
    adapter that cannot be written is told before the first step, and not after the last one. Collective.

    Returns what the user should know of the exports. Raises ValueError, on every rank, if writing fails.
    """

    def write(unfinished: Path) -> list[str]:
        changes = _write(student.model, tokenizer, unfinished, {}, {})
        shutil.rmtree(unfinished)
        if not changes:
            return []
        told = ", ".join(f"{name} = {old!r} becomes {new!r}" for name, (old, new) in changes.items())
        return [f"generation settings of the student that transformers ignores are changed in its exports: {told}"]

    return _in_new_folder(folder, write)


def _in_new_folder(folder: Path, write: Callable[[Path], Result]) -> Result:
    """What `write` returns on rank 0. It fills a new folder beside `folder`, which goes if that fails. Collective."""
    unfinished = folder.with_name(folder.name + ".unfinished")

    def work() -> Result:
        shutil.rmtree(unfinished, ignore_errors=True)
        return write(unfinished)

    try:
        return collectives.from_main_rank(work)
    except ValueError as error:
        if collectives.rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise collectives.Told(f"the student could not be written to {folder}: {error}") from error


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor],
    adapter: dict[str, Tensor],
    has_own_head: bool = False,
) -> dict[str, tuple[Any, Any]]:
    """A folder with these weights; returns what `_savable` changed. adapter: weights of LoRA, where there is any.
    has_own_head: the weights of a tied model hold its head a second time."""
    config = copy.deepcopy(model.config)
    config.use_cache = True
    if has_own_head:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    # A shell without storage: save_pretrained needs a model's class and configuration, the tensors are given.
    with torch.device("meta"):
        shell = type(model)(config).to(next(model.parameters()).dtype)  # which config.json will name
    shell.generation_config, changes = _savable(model.generation_config, tokenizer)
    shell.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if lora := _lora(model):
        lora.save_adapter(model, adapter, folder / "adapter")
    make_portable(folder)
    check_saved(folder, tokenizer)
    return changes


def _savable(
    settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[GenerationConfig, dict[str, tuple[Any, Any]]]:
    """A copy in which a text ends at the tokenizer's EOS too: the token that the student has learned to end with.

    transformers loads settings that contradict each other with a mere warning, and does not save them in such a copy.
    They are mended: a temperature or top_p that says nothing of sampling is meant for it, a negative pad_token_id is
    the tokenizer's own, and the others, which have no effect, go. Returns also what was mended, (old, new) by name.
    Raises ValueError for settings that are wrong alone.
    """
    settings, found, default = copy.deepcopy(settings), copy.deepcopy(settings), GenerationConfig()
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        settings.eos_token_id = [*(end for end in ends if end is not None), tokenizer.eos_token_id]
    if settings.do_sample is None and (contradictions := _contradictions(settings)):
        settings.do_sample = True
        if _contradictions(settings) == contradictions:
            settings.do_sample = None
    for name in _contradictions(settings):
        setattr(settings, name, tokenizer.pad_token_id if name == "pad_token_id" else getattr(default, name))
    settings.validate(strict=True)
    changed = {name: (getattr(found, name), value) for name, value in vars(settings).items() if name != "eos_token_id"}
    return settings, {name: (old, new) for name, (old, new) in changed.items() if old != new}


def _contradictions(settings: GenerationConfig) -> list[str]:
    """The settings for whose sake transformers would not save these. Raises ValueError for settings wrong alone."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        if names := re.findall(r"^- `(\w+)`: ", str(error), re.MULTILINE):
            return names
        raise
    return []


def _ties_of_head(model: PreTrainedModel) -> dict[str, str]:
    """The further names of the head's weight, each with the name that named_parameters() gives it; none if not tied."""
    head = model.get_output_embeddings()
    if head is None:
        return {}
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is head.weight]
    return dict.fromkeys(names[1:], names[0])


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
