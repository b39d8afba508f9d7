"""Write a part of a model as a Hugging Face folder, a shard at a time, and try it before it counts as written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

from toolkit.models.files import RECORD
from toolkit.models.portable import make_portable
from toolkit.pruning.depth import per_layer_fields
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
    cut: Callable[[str, Tensor], Tensor] | None = None,
    changes: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The layers `kept`, renumbered, each parameter as `cut(name, tensor)` leaves it, `changes` in the configuration,
    and the other files beside the weights (tokenizer, chat template, generation settings). One shard is in memory.

    Raises ValueError where the layers' names are not known.
    """
    number, renumbered = {old: new for new, old in enumerate(kept)}, set()
    shards: list[dict[str, str]] = []
    tensors: dict[str, Tensor] = {}
    size = total = 0

    def close_shard() -> None:
        nonlocal size
        file = folder / f"{len(shards)}.unfinished"
        save_file(tensors, file, metadata={"format": "pt"})
        shards.append(dict.fromkeys(tensors, file.name))
        tensors.clear()
        size = 0

    for name in weights.files:
        match = LAYER.match(name)
        new_name = name
        if match:
            old = int(match["index"])
            # T5's first block holds the position table for all of its stack.
            is_for_stack = config.is_encoder_decoder and "relative_attention_bias" in name
            if old not in number and not is_for_stack:
                continue
            new = 0 if is_for_stack else number[old]
            renumbered.add(new)
            new_name = f"{match['before']}{new}{match['after']}"
        tensor = weights.tensor(name)
        tensor = tensor if cut is None else cut(name, tensor)
        nbytes = tensor.numel() * tensor.element_size()
        if tensors and size + nbytes > shard_bytes:
            close_shard()
        tensors[new_name] = tensor.contiguous()
        heartbeat.beat()
        size, total = size + nbytes, total + nbytes
    close_shard()
    if renumbered != set(number.values()):
        raise ValueError(
            f"the layers of {weights.folder} ({config.model_type}) are not named as known, so they cannot be left out"
        )
    _name_shards(folder, shards, total)
    depth = {"num_hidden_layers": len(kept)} | ({"num_decoder_layers": len(kept)} if config.is_encoder_decoder else {})
    changes = depth | per_layer_fields(config, kept, PER_LAYER_FIELDS) | (changes or {})
    values = config.to_dict() | {config.attribute_map.get(name, name): value for name, value in changes.items()}
    type(config).from_dict(values).save_pretrained(folder)
    for file in weights.folder.iterdir():
        is_other = file.suffix in NOT_COPIED or file.name.endswith(".index.json") or file.name == RECORD
        if file.is_file() and not is_other and not file.name.startswith(".") and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    make_portable(folder)


def _name_shards(folder: Path, shards: list[dict[str, str]], total_bytes: int) -> None:
    weight_map = {}
    for number, names in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"{number - 1}.unfinished").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def try_out(folder: Path, trust_remote_code: bool = False) -> None:
    """Load, forward, generate. Raises ValueError where any of it fails; the whole model is in memory for it."""
    config_file = json.loads((folder / "config.json").read_text())
    kind = AutoModelForSeq2SeqLM if config_file.get("is_encoder_decoder") else AutoModelForCausalLM
    try:
        model, found = kind.from_pretrained(
            folder, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
        # Extra tensors, such as masks that older versions of transformers saved, are in the teacher as well.
        wrong = {name: sorted(map(str, values)) for name, values in found.items() if values and name != UNEXPECTED}
        if wrong:
            raise ValueError(f"loading reports {wrong}")
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
