"""Write a part of a model as a Hugging Face folder, a shard at a time, and try it before it counts as written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

from toolkit.models.files import RECORD
from toolkit.models.portable import make_portable
from toolkit.pruning.families import LAYER, PER_LAYER_FIELDS
from toolkit.pruning.weights import Weights
from toolkit.ranks import heartbeat

SHARD_BYTES = 2**30
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
TRIAL_TOKENS, TRIAL_NEW_TOKENS = 16, 4
UNEXPECTED = "unexpected_keys"


def write_part(
    weights: Weights,
    config: PretrainedConfig,
    folder: Path,
    kept: Sequence[int],
    cut: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """The layers `kept`, renumbered, each parameter as `cut(name, tensor)` leaves it, `changes` in the configuration,
    and the other files beside the weights (tokenizer, chat template, generation settings). One shard is in memory.
    Raises ValueError where the layers' names are not known."""
    _write_shards(folder, _kept_parameters(weights, config, kept, cut))
    # The configuration: the number of layers, what it says of each one, and the changes.
    depth = {"num_hidden_layers": len(kept)} | ({"num_decoder_layers": len(kept)} if config.is_encoder_decoder else {})
    listed = {name: values for name in PER_LAYER_FIELDS if (values := getattr(config, name, None))}
    per_layer = {name: [values[layer] for layer in kept] for name, values in listed.items()}
    all_changes = {**depth, **per_layer, **(changes or {})}
    changed = {config.attribute_map.get(name, name): value for name, value in all_changes.items()}
    type(config).from_dict(config.to_dict() | changed).save_pretrained(folder)
    # The other files.
    for file in weights.folder.iterdir():
        is_other = file.suffix in NOT_COPIED or file.name.endswith(".index.json") or file.name == RECORD
        if file.is_file() and not is_other and not file.name.startswith(".") and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    make_portable(folder)


def _kept_parameters(
    weights: Weights, config: PretrainedConfig, kept: Sequence[int], cut: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The parameters that stay, by their new names. Raises ValueError at the end where a layer was not found."""
    number, renumbered = {old: new for new, old in enumerate(kept)}, set()
    for name in weights.files:
        new_name = name
        if match := LAYER.match(name):
            old = int(match["index"])
            # T5's first block holds the position table for all of its stack.
            is_for_stack = config.is_encoder_decoder and "relative_attention_bias" in name
            if old not in number and not is_for_stack:
                continue
            new = 0 if is_for_stack else number[old]
            renumbered.add(new)
            new_name = f"{match['before']}{new}{match['after']}"
        yield new_name, cut(name, weights.tensor(name))
        heartbeat.beat()
    if renumbered != set(number.values()):
        what = f"the layers of {weights.folder} ({config.model_type})"
        raise ValueError(f"{what} are not named as known, so they cannot be left out")


def _write_shards(folder: Path, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Safetensors files of SHARD_BYTES at most, and their index where they are several."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        save_file(shard, folder / f"{len(shards)}.unfinished", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in parameters:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            close()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    close()
    # Their names say how many there are, which is known only now.
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"{number - 1}.unfinished").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def try_out(folder: Path, trust_remote_code: bool = False) -> None:
    """Load, forward, generate. Raises ValueError where any of it fails; the whole model is in memory for it."""
    # An encoder-decoder is loaded by another class.
    config_file = json.loads((folder / "config.json").read_text())
    kind = AutoModelForSeq2SeqLM if config_file.get("is_encoder_decoder") else AutoModelForCausalLM
    try:
        how = dict(dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True)
        loaded: Any = kind.from_pretrained(folder, **how)
        model, found = loaded
        # Extra tensors, such as masks that older versions of transformers saved, are in the teacher as well.
        wrong = {name: sorted(map(str, values)) for name, values in found.items() if values and name != UNEXPECTED}
        if wrong:
            raise ValueError(f"loading reports {wrong}")
        # A forward pass and a few new tokens.
        ids_BT = torch.arange(3, 3 + TRIAL_TOKENS)[None] % model.config.vocab_size
        extra = {"decoder_input_ids": ids_BT[:, :1]} if model.config.is_encoder_decoder else {}
        if not model.eval()(input_ids=ids_BT, **extra).logits.isfinite().all():
            raise ValueError("its logits are not finite")
        made = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), min_new_tokens=TRIAL_NEW_TOKENS,
            max_new_tokens=TRIAL_NEW_TOKENS, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        if made.shape[1] < TRIAL_NEW_TOKENS:
            raise ValueError(f"it generated {made.shape[1]} tokens of {TRIAL_NEW_TOKENS}")
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the model made does not work ({error}), so it was not kept") from error
