"""The trained student as a plain Hugging Face folder, with adapters merged into it."""

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.models import zero
from toolkit.models.engines import Student
from toolkit.models.portable import make_portable
from toolkit.models.tokenizer import check_saved
from toolkit.ranks import collectives
from toolkit.storage.appear import emptied, new_folder, unfinished_name

Result = TypeVar("Result")
Changes = dict[str, tuple[object, object]]  # (old, new) of a setting, by its name


def export_student(
    student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path, untie_head: bool = False
) -> None:
    """Rank 0 writes safetensors, configuration and tokenizer; parameters are gathered one at a time, by all ranks.

    `folder` appears when it is whole, in place of an older export. With LoRA the weights are the merged ones, and
    `folder`/adapter is what peft loads onto the base. untie_head: where the head shares its weights with the input
    embeddings, write it as a tensor of its own, and say so in config.json. Raises ValueError, on every rank, if writing
    fails. Collective.
    """
    model, is_writer = student.model, collectives.rank() == 0
    weights: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    # Every rank gathers, and rank 0 keeps a copy on the CPU. An adapted layer's weight has its adapter merged in.
    layers = lora.adapted(model) if (lora := _lora(model)) else {}
    for name, parameter in model.named_parameters():  # tied parameters are named once
        with lora.merged_weight(layers[name]) if name in layers else _gathered(parameter) as weight:
            if is_writer:
                found = adapter if lora and lora.is_adapter(name) else weights
                found[name] = weight.detach().to("cpu", copy=True)
    # Buffers that are not in a state dict are made anew by the model's own code.
    persistent = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    weights |= {name: tensor.cpu() for name, tensor in model.named_buffers() if name in persistent}
    ties = _ties_of_head(model) if untie_head else {}

    def write() -> None:
        weights.update({name: weights[written].clone() for name, written in ties.items()})
        plain = {lora.plain_name(name): weight for name, weight in weights.items()} if lora else weights
        with new_folder(folder, durable=True) as unfinished:
            _write(model, tokenizer, unfinished, plain, adapter, has_own_head=bool(ties))

    _on_main_rank(write, folder)


def rehearse_export(student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Rank 0 writes what `export_student` will write, but no weights, and deletes it. So a configuration, tokenizer or
    adapter that cannot be written is told before the first step, and not after the last one. Collective. Returns what
    the user should know of the exports. Raises ValueError, on every rank, if writing fails."""

    def write() -> Changes:
        unfinished = unfinished_name(folder)
        try:
            return _write(student.model, tokenizer, emptied(unfinished), {}, {})
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    changes = _on_main_rank(write, folder)
    told = ", ".join(f"{name} = {old!r} becomes {new!r}" for name, (old, new) in changes.items())
    intro = "generation settings of the student that transformers ignores are changed in its exports"
    return [f"{intro}: {told}"] if told else []


def _on_main_rank(write: Callable[[], Result], folder: Path) -> Result:
    """What `write` returns on rank 0. Raises ValueError, on every rank, if it fails. Collective."""
    try:
        return collectives.from_main_rank(write)
    except ValueError as error:
        raise collectives.Told(f"the student could not be written to {folder}: {error}") from error


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor],
    adapter: dict[str, Tensor], has_own_head: bool = False,
) -> Changes:  # fmt: skip
    """Fills the empty `folder` with these weights by name; returns what `_savable` changed. adapter: LoRA's weights.
    has_own_head: the weights of a tied model hold its head a second time."""
    # What the configuration says of the exported model, and not of the one in training.
    config = copy.deepcopy(model.config)
    config.use_cache = True
    if has_own_head:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    # A shell without storage: save_pretrained needs a model's class and configuration, the tensors are given.
    with torch.device("meta"):
        shell = type(model)(config)
    nn.Module.to(shell, next(model.parameters()).dtype)  # config.json names this dtype
    shell.generation_config, changes = _savable(model.generation_config, tokenizer)
    shell.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if lora := _lora(model):
        lora.save_adapter(model, adapter, folder / "adapter")
    make_portable(folder)
    check_saved(folder, tokenizer)
    return changes


def _savable(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[GenerationConfig, Changes]:
    """A copy in which a text ends at the tokenizer's EOS too: the token that the student has learned to end with.

    transformers loads settings that contradict each other with a mere warning, and does not save them in such a copy.
    They are mended: a temperature or top_p that says nothing of sampling is meant for it, a negative pad_token_id is
    the tokenizer's own, and the others, which have no effect, go. Returns also what was mended.
    Raises ValueError for settings that are wrong alone.
    """
    settings, found, default = copy.deepcopy(settings), copy.deepcopy(settings), GenerationConfig()
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        settings.eos_token_id = [*(end for end in ends if end is not None), tokenizer.eos_token_id]
    # Settings of sampling without do_sample are meant for sampling, if that resolves anything.
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
    """The other names of a tied head's weight, each with the name under which named_parameters() lists it."""
    head = model.get_output_embeddings()
    if head is None:
        return {}
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is head.weight]
    return dict.fromkeys(names[1:], names[0])


@contextmanager
def _gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    with zero.gathered([parameter]):
        yield parameter


def _lora(model: PreTrainedModel) -> Any:
    """The module that knows adapters, where there are any: peft takes long to import."""
    if not hasattr(model, "peft_config"):
        return None
    from toolkit.models import lora

    return lora
