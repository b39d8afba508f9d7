"""Whether the files of a model fit its configuration, asked of transformers before a weight is read.

Under ZeRO-3 transformers reports no tensor that it leaves out: a file of 24 layers under a configuration of 12 loads
without a word. The same load on torch's meta device, of names and shapes alone, tells all of it, in well under a second
and alike on every rank.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, initialization
from transformers.modeling_utils import load_state_dict
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from toolkit.models.files import weight_files
from toolkit.ranks import collectives
from toolkit.ranks.output import say

NAMED = 4  # names in a message, before "and N more"
#: a model's class, or an auto class that chooses one by the configuration
Kind = type[PreTrainedModel] | type[_BaseAutoModelClass]


def from_config(kind: Kind, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A model of random weights."""
    if issubclass(kind, PreTrainedModel):
        return kind._from_config(config, dtype=dtype)
    return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def blank(kind: Kind, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The same on the meta device: names, shapes and dtypes without numbers."""
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        return from_config(kind, config, dtype, trust_remote_code)


def rehearse(
    kind: type[PreTrainedModel], path: str, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, set]]:
    """The model that transformers would make of the weights in the folder `path`, on the meta device, and its loading
    info. Raises ValueError for weights that it cannot convert, such as experts of which some are missing."""
    stored: dict[str, Tensor] = {}
    for file in weight_files(Path(path), config):
        stored |= load_state_dict(file, map_location="meta")
    with quiet() as report:
        try:
            loaded: Any = kind.from_pretrained(
                None, config=config, state_dict=stored, dtype=dtype, device_map="meta", output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
            return loaded  # a pair, by output_loading_info
        except RuntimeError as error:
            raise ValueError(f"the weights at {path} could not be loaded: {error}\n{''.join(report)}") from error


def check_fit(path: str, model: PreTrainedModel, found: Mapping[str, set], keeps_all_layers: bool = True) -> None:
    """Tells, on rank 0, the names of tensors that transformers leaves out. `found`: its loading info on `model`.
    keeps_all_layers: False where layers were taken off the end on purpose. Raises ValueError for parameters that are
    missing or have another shape, and for layers that are left over: the model would not be that of the files."""
    # Another shape, or a parameter without a value: the model would not be that of the files.
    if wrong := sorted(found.get("mismatched_keys", ())):
        name, stored, wanted = wrong[0]
        raise ValueError(
            f"the weights at {path} have other shapes than the configuration asks for, {len(wrong)} of them: {name} is "
            f"{list(stored)} in the files and {list(wanted)} by config.json; correct it, or copy the files of it"
        )
    unexpected = sorted(found.get("unexpected_keys", ()))
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random numbers in them
        other = f", and hold {_listed(unexpected)}, which it does not ask for" if unexpected else ""
        told = f"the weights at {path} lack {len(missing)} parameters of the configuration, the first is {missing[0]}"
        raise ValueError(f"{told}{other}; copy the missing files, or correct config.json")
    # Tensors that the model has no place for are told of, and whole layers without a place are refused.
    rest = _beside_layers(path, model, unexpected, keeps_all_layers)
    if rest and collectives.rank() == 0:
        say(
            f"warning: the weights at {path} hold {len(rest)} tensors that the {model.config.model_type} model of "
            f"config.json does not have, and they are left out: {_listed(rest)}"
        )


def _beside_layers(path: str, model: PreTrainedModel, unexpected: list[str], keeps_all_layers: bool) -> list[str]:
    """The names that are not of layers past the model's last one. Raises ValueError where there are such layers."""
    # DeepSeek-V3 and GLM-4.5 keep layers for multi-token prediction after the model's own: they are no part of it.
    predicting = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    # How many layers each stack of the model has, by the names of its tensors.
    counts: dict[str, int] = {}
    for name in model.state_dict():
        for stack, number in _numbers(name, model):
            counts[stack] = max(number + 1, counts.get(stack, 0))
    rest = []
    for name in unexpected:
        past = [(stack, number) for stack, number in _numbers(name, model) if number >= counts.get(stack, number + 1)]
        if not past:
            rest.append(name)
            continue
        (stack, number), count = past[0], counts[past[0][0]]
        if keeps_all_layers and number >= count + predicting:
            raise ValueError(
                f"the weights at {path} hold {stack}.{number}, and by config.json the model has {count} of them "
                f"({stack}.0 to {stack}.{count - 1}): the others would be left out. Correct its number of layers, or "
                f"copy the files that belong to it; to leave them out on purpose set num_layers={count} for this model"
            )
    return rest


def _numbers(name: str, model: PreTrainedModel) -> list[tuple[str, int]]:
    """The numbers in a tensor's name, each with what stands before it: "model.layers.3.mlp" has ("layers", 3). Files
    of GPT-2 have names without the "transformer." that the model puts before them."""
    name = name.removeprefix(f"{model.base_model_prefix}.")
    return [(name[: match.start()], int(match[1])) for match in re.finditer(r"\.(\d+)(?=\.)", name)]


def _listed(names: list[str]) -> str:
    """Some of the names; the same name in several layers is one, with their number."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    shown = [name if count == 1 else f"{name} ({count} times)" for name, count in counts.items()]
    more = f" and {len(shown) - NAMED} more" if len(shown) > NAMED else ""
    return ", ".join(shown[:NAMED]) + more


@contextmanager
def quiet() -> Iterator[list[str]]:
    """transformers' own report of a load goes into the list, and no bar is drawn: what matters of it is told once."""
    report = _Report()
    logging_of = transformers.utils.logging
    logger, had_bars = logging_of.get_logger("transformers.modeling_utils"), logging_of.is_progress_bar_enabled()
    propagates, logger.propagate = logger.propagate, False
    logging_of.disable_progress_bar()
    logger.addHandler(report)
    try:
        yield report.said
    finally:
        logger.removeHandler(report)
        logger.propagate = propagates
        if had_bars:
            logging_of.enable_progress_bar()


class _Report(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))
