"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: W x + alpha / rank * B A x, of which A and B alone are trained.

The adapters are put into the model in place: it keeps its class and its parts, so that generation, the loss and the
checkpoints find what they find in any model. Adapter matrices have the base's dtype; the optimizer holds them in fp32.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from toolkit.batch import layout_of
from toolkit.models import zero
from toolkit.ranks import collectives
from toolkit.settings import LoraConfig
from toolkit.settings.overrides import unknown
from toolkit.storage.differences import differences, refuse

NAME = "default"  # peft's own name for the only adapter
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
#: what `init_lora_weights` may have been: others change the base's weights beside the adapter's
PLAIN_STARTS = (True, False, "gaussian")


def add_adapters(model: PreTrainedModel, config: LoraConfig, base_path: str, seed: int) -> None:
    """Freeze `model` and put trainable adapters into it, alike on all ranks: A at random from `seed`, B zero, or both
    from the peft folder `config.adapter`. To be called before deepspeed.initialize, which partitions them as well.
    Raises ValueError for target modules that the model does not have, and for an adapter of another shape."""
    # Every target has to name a linear layer of the model. The head is none: the loss multiplies with it as it is.
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    linear = {name: part for name, part in modules.items() if isinstance(part, nn.Linear | Conv1D) and part is not head}
    for target in config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise unknown("student.lora.target_modules", target, known)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft asks for an int, and multiplies by any number
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) or "all-linear",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in linear.values()),
        task_type=layout_of(model.config).task_type,
        base_model_name_or_path=base_path or None,
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2 has both kinds, peft sets it for each
        peft.inject_adapter_in_model(settings, model)
    for name, part in model.named_modules():
        if isinstance(part, BaseTunerLayer) and not isinstance(part, Linear):
            names = ", ".join(sorted({layer.rpartition(".")[2] for layer in linear}))
            raise ValueError(
                f"student.lora.target_modules = {list(config.target_modules)} reaches {name} of this "
                f"{model.config.model_type} model, where peft would adapt experts or a router, which are no linear "
                f"layers: such adapters are not merged here. Name the attention's layers alone, of {names}"
            )
    if config.adapter:
        _load(model, config.adapter)


def adapted(model: nn.Module) -> dict[str, Linear]:
    """The adapted layers by the full name of their frozen weight; none in a model without adapters."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, Linear)}
    return {f"{name}.base_layer.weight": layer for name, layer in layers.items()}


@contextmanager
def merged_weight(layer: Linear) -> Iterator[Tensor]:
    """The gathered W + alpha / rank * B A of one layer, computed in fp32, in the dtype of W. Collective."""
    parts = layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME]
    weight, a_RI, b_OR = (cast(nn.Parameter, part.weight) for part in parts)
    with zero.gathered([weight, a_RI, b_OR]), torch.no_grad():
        change_OI = layer.scaling[NAME] * (b_OR.float() @ a_RI.float())
        change = change_OI.T if isinstance(layer.base_layer, Conv1D) else change_OI
        yield (weight.float() + change).to(weight.dtype)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is one of an adapter's."""
    return f".{NAME}.weight" in name and (".lora_A." in name or ".lora_B." in name)


def plain_name(name: str) -> str:
    """What the frozen parameter `name` is called in a model without adapters."""
    return name.replace(".base_layer.", ".")


def save_adapter(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """A folder that PeftModel.from_pretrained puts on the base. weights: the adapter's, by their names in `model`."""
    folder.mkdir(parents=True)
    named = {_name_in_file(name): weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    _settings(model).save_pretrained(str(folder))


def _settings(model: PreTrainedModel) -> peft.LoraConfig:
    return cast(peft.LoraConfig, model.peft_config[NAME])


def _name_in_file(name: str) -> str:
    """What peft calls the adapter's parameter `name` of the model in a file."""
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"


def _load(model: PreTrainedModel, path: str) -> None:
    """Fill the adapters, which are not partitioned yet, from a peft folder."""
    file, settings = Path(path).expanduser() / WEIGHTS, _settings(model)

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            return json.loads((file.parent / SETTINGS).read_bytes()), load_file(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"no adapter at {file.parent}: {error}; student.lora.adapter is a folder that peft saved, with "
                f"{SETTINGS} and {WEIGHTS}"
            ) from error

    theirs, saved = collectives.together(read)
    _refuse_other_settings(file.parent / SETTINGS, theirs, settings)
    own = {_name_in_file(name): parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    # Both have to name the same matrices, each of the same shape.
    for name in sorted(own.keys() | saved.keys()):
        found = tuple(saved[name].shape) if name in saved else None
        wanted = tuple(own[name].shape) if name in own else None
        if found != wanted:
            raise ValueError(
                f"{name} has shape {found} in {file} and {wanted} by student.lora; make rank and target_modules those "
                f"of the adapter (target_modules: {_listed(theirs.get('target_modules'))} there, "
                f"{_listed(settings.target_modules)} by student.lora), or start from the folder that it was merged into"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _refuse_other_settings(file: Path, theirs: dict[str, Any], settings: peft.LoraConfig) -> None:
    """Raises ValueError, with both values, for settings by which the weights would be another change of the base."""
    names = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias")
    ours = {name: getattr(settings, name) for name in names}
    there = {name: theirs.get(name, value) for name, value in ours.items()}
    for name in ("rank_pattern", "alpha_pattern"):
        there[name], ours[name] = theirs.get(name) or {}, {}
    there["init_lora_weights"] = start = theirs.get("init_lora_weights", True)
    ours["init_lora_weights"] = start if start in PLAIN_STARTS else True
    refuse(
        f"{file} is of another adapter than student.lora trains",
        differences(there, ours, "{}: {!r} there, {!r} by student.lora").values(),
        "set student.lora.rank and student.lora.alpha to the adapter's; one that differs in anything else has to be "
        "merged into its base first, and student.path to name the merged folder",
    )


def _listed(modules: Any) -> str:
    return modules if isinstance(modules, str) else ", ".join(sorted(modules or []))
