"""Read a safetensors folder a tensor at a time, and run its layers one at a time.

What is in memory: embedding and head, one layer's weights, and the hidden states of the calibration text.
Legend: R rows of text, T tokens a row, N = R * T, H hidden units, V head rows.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.divergences import Divergence, Head, Hidden, Objective, fused_linear_divergence
from toolkit.models.files import PICKLED, SAFETENSORS
from toolkit.pruning.families import Family
from toolkit.ranks import heartbeat

TOKENS_A_PASS = 1024
Choice = tuple[int, ...]  # layers to keep, ascending
Watch = Callable[[int, nn.Module], AbstractContextManager[None]]


class Weights:
    """The tensors of a folder of safetensors files, by name; nothing is kept in memory. Of a folder without any, those
    of its pytorch_model*.bin, mapped too and read without running what is pickled in them. Raises ValueError where the
    folder has neither, or a file is damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._pickled: dict[str, Tensor] = {}
        # The index names the files that count: a hub folder may hold a consolidated copy of the same tensors as well.
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            single = folder / "model.safetensors"
            files = [single] if single.is_file() else sorted(folder.glob(SAFETENSORS))
        if not files:
            self._read_pickled()
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self.files |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is missing, damaged or cut off: {error}; copy it again") from error

    def _read_pickled(self) -> None:
        """Map what torch.save wrote."""
        found = sorted(self.folder.glob(PICKLED))
        if not found:
            raise ValueError(f"{self.folder} has neither .safetensors weights nor {PICKLED}; copy the missing files")
        for file in found:
            try:
                tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except (OSError, RuntimeError, pickle.UnpicklingError) as error:
                raise ValueError(
                    f"{file} is damaged, of an old format, or holds more than tensors: {error}; save the model with "
                    "safetensors"
                ) from error
            seen = set()
            for name, tensor in tensors.items():
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"{file} holds {name!r}, which is no tensor; save the model with safetensors")
                place = tensor.data_ptr(), tensor.shape, tensor.stride()
                if place not in seen:  # safetensors keep a tied tensor once, under its first name
                    seen.add(place)
                    self._pickled[name], self.files[name] = tensor, file

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file: pages leave memory with the last reference, or where memory is short."""
        if self._pickled:
            return self._pickled[name]
        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(name)


class LayerwiseModel:
    """A causal language model whose decoder layers are in memory one at a time. The computing dtype is fp32, or bf16
    where the device multiplies it in hardware. Frozen, no dropout."""

    def __init__(self, folder: Path, family: Family, device: torch.device, dtype: torch.dtype):
        # The model begins without any values. What it computes and does not store, as rotary tables, is made anew; all
        # parameters outside of the layers are read.
        self.weights, self.family, self.device, self.dtype = Weights(folder), family, device, dtype
        self.config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config)).eval().requires_grad_(False)
        self.base = self.model.base_model
        self.prefix = f"{self.model.base_model_prefix}."
        for name, module in self.base.named_children():
            if any(buffer.is_meta for buffer in module.buffers()) and name != family.layers.split(".")[0]:
                setattr(self.base, name, type(module)(config=self.config).to(device))
        self.layers = self.base.get_submodule(family.layers)
        self.count = len(self.layers)
        for name, parameter in self.base.named_parameters():
            if not name.startswith(f"{family.layers}.") and parameter.is_meta:
                self._fill(self.base, name, self.stored(name))
        # The head is often the embedding once more.
        embedding = self.model.get_input_embeddings().weight
        is_tied = self.config.tie_word_embeddings or "lm_head.weight" not in self.weights.files
        self.head_VH = embedding.data if is_tied else self._cast(self.weights.tensor("lm_head.weight"))
        if getattr(self.model.get_output_embeddings(), "bias", None) is not None:
            raise ValueError(f"{folder}: a head with a bias is not known to pruning")
        self.norm = self.base.get_submodule(family.norm)

    def stored(self, name: str) -> Tensor:
        """A parameter of the base model; some checkpoints, GPT-2's on the hub for one, leave the base's name out."""
        full = self.prefix + name if self.prefix + name in self.weights.files else name
        if full not in self.weights.files:
            raise ValueError(f"{self.weights.folder} lacks the parameter {self.prefix}{name}; copy the missing files")
        return self.weights.tensor(full)

    @torch.no_grad()
    def embed(self, ids_RT: Tensor) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
        """(hidden states that enter the first layer, the layers as functions of hidden states). The model's own forward
        says what each layer is called with: masks, positions, rotary tables. They are those of one row, and all rows
        have as many tokens and no padding."""
        entering: list[Tensor] = []
        calls: list[tuple[tuple, dict]] = [((), {})] * self.count

        def note(index: int, hidden_BTH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                entering.append(hidden_BTH)
            calls[index] = args, kwargs
            return hidden_BTH

        def run(index: int, hidden_BTH: Tensor) -> Tensor:
            args, kwargs = calls[index]
            return self.layers[index](hidden_BTH, *args, **kwargs)

        # One forward a row, in which the layers only note what they are given.
        forwards = [layer.forward for layer in self.layers]
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = partial(note, index)
            for row_T in ids_RT:
                self.base(input_ids=row_T[None].to(self.device), use_cache=False)
        finally:
            for layer, forward in zip(self.layers, forwards, strict=True):
                layer.forward = forward
        return torch.cat(entering), [partial(run, index) for index in range(self.count)]

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """The layer with its weights, which leave memory after the block."""
        layer = self.layers[index]
        try:
            for name, _ in list(layer.named_parameters()):
                self._fill(layer, name, self.stored(f"{self.family.layers}.{index}.{name}"))
            yield layer
        finally:
            layer.to("meta")

    @torch.no_grad()
    def finish(self, hidden_RTH: Tensor) -> Tensor:
        """[N, H]: after the last norm, what the head reads."""
        return _in_passes(self.norm, hidden_RTH).flatten(0, 1)

    def _fill(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """Give a parameter its values. Raises ValueError for those of another shape."""
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        if tensor.shape != getattr(owner, last).shape:
            raise ValueError(
                f"{self.weights.folder}: {name} has shape {list(tensor.shape)}, config.json says "
                f"{list(getattr(owner, last).shape)}; copy the folder again"
            )
        setattr(owner, last, nn.Parameter(self._cast(tensor), requires_grad=False))

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype, copy=True)


@torch.no_grad()
def run_choices(
    model: LayerwiseModel, ids_RT: Tensor, choices: Iterable[Choice], watch: Watch = lambda index, layer: nullcontext()
) -> tuple[dict[Choice, Tensor], Tensor]:
    """What the head reads, [N, H], for each choice of layers to keep, and for all layers. Each layer is loaded once.

    Choices that begin with the same layers share their states, so leaving out one block of a model costs, for all
    places of the block together, one pass over it and the layers behind each place. At one time as many states
    [R, T, H] are in memory as there are different beginnings. `watch(index, layer)` is a context around the whole
    model's own pass through a layer, and through the last norm as `watch(model.count, norm)`.
    """
    # Each layer is run once for each different beginning, which is what a choice keeps of the layers before it.
    whole = tuple(range(model.count))
    wanted = {*choices, whole}
    hidden_RTH, calls = model.embed(ids_RT)
    states: dict[Choice, Tensor] = {(): hidden_RTH}
    for index in range(model.count):
        # What each choice keeps of the layers up to this one; a beginning without this layer stays as it is.
        needed = {tuple(layer for layer in choice if layer <= index) for choice in wanted}
        following: dict[Choice, Tensor] = {}
        with model.loaded(index) as layer:
            for prefix in sorted(needed):
                if not prefix or prefix[-1] != index:
                    following[prefix] = states[prefix]
                    continue
                with watch(index, layer) if prefix == whole[: index + 1] else nullcontext():
                    following[prefix] = _in_passes(calls[index], states[prefix[:-1]])
        states = following
        heartbeat.beat()
    # What is left are the choices themselves.
    ended = {}
    for choice in sorted(wanted):
        with watch(model.count, model.norm) if choice == whole else nullcontext():
            ended[choice] = model.finish(states.pop(choice))
    return ended, ended[whole]


def kl_to_teacher(
    hidden_NS: Tensor, head_VS: Tensor, teacher_NT: Tensor, teacher_head_VT: Tensor, vocabulary: int
) -> tuple[float, float]:
    """(mean forward KL in nats, share of tokens with the same first choice), over all positions."""
    with torch.no_grad():
        found = fused_linear_divergence(
            Objective(Divergence("fkl")), student=Hidden(hidden_NS, Head(head_VS)),
            teacher=Hidden(teacher_NT, Head(teacher_head_VT)), valid_vocab=vocabulary,
        )  # fmt: skip
    return found.divergence_N.double().mean().item(), found.agreement_N.double().mean().item()


def _in_passes(call: Callable[[Tensor], Tensor], hidden_RTH: Tensor) -> Tensor:
    """What `call` makes of all rows, so many at a time."""
    return torch.cat([call(part) for part in hidden_RTH.split(max(1, TOKENS_A_PASS // hidden_RTH.shape[1]))])
