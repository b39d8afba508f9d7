"""A student made out of its teacher: fewer layers, fewer hidden units, heads and MLP channels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from toolkit.data import DataConfig
from toolkit.models.files import RECORD
from toolkit.pruning.depth import MEASURED, best_block, choose_layers, greedy, listed
from toolkit.pruning.families import Family, check_movable, family_of, layer_count
from toolkit.pruning.text import calibration_ids
from toolkit.pruning.weights import Choice, LayerwiseModel, Weights, kl_to_teacher, run_choices
from toolkit.pruning.width import Meter, Sizes, Statistics, Width, check_sizes, choose_width
from toolkit.pruning.write import try_out, write_part
from toolkit.settings import InitConfig
from toolkit.storage.manifest import sha256


def leave_out_layers(path: str, dropped: Sequence[int], folder: Path, trust_remote_code: bool = False) -> None:
    """Write the model in the folder `path` without the layers `dropped` into `folder`. Raises ValueError for layers
    that are not there, and for a result that does not load and generate."""
    source = Path(path)
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    count = layer_count(config)
    if not set(dropped) <= set(range(count)) or len(set(dropped)) >= count:
        raise ValueError(f"drop_layers = {sorted(dropped)}, but {path} has layers 0 to {count - 1} and must keep one")
    check_movable(config)
    kept = [layer for layer in range(count) if layer not in dropped]
    write_part(Weights(source), config, folder, kept)
    try_out(folder, trust_remote_code)
    (folder / RECORD).write_text(json.dumps({"teacher": path, "kept": {"layers": kept}}))


def prune(
    path: str, init: InitConfig, data: DataConfig, folder: Path, tokenizer: Callable[[], PreTrainedTokenizerBase],
    trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write the model in the folder `path`, cut down to the sizes of `init`, into the empty `folder`; returns what
    RECORD holds.

    The teacher is read layer by layer: embedding, head, one layer's weights, and hidden states of the calibration text
    are in memory; then one shard of what is written; then the student, when it is tried out. `tokenizer` is that of
    the calibration text; beside the student lies the teacher's. Raises ValueError for sizes, layers or architectures
    that cannot be, and for a result that does not load, run and generate.
    """
    # How many layers stay, and what decides which.
    source = Path(path)
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    count = layer_count(config)
    keep = _kept_count(path, init, count)
    if keep < count:
        check_movable(config)
    changes_width = any(getattr(init, name) is not None for name in ("hidden", "heads", "kv_heads", "mlp"))
    record: dict[str, Any] = {"teacher": {"path": path}, "settings": asdict(init)}
    # A choice of layers that needs no measurement needs no calibration text either.
    if changes_width or (init.depth in MEASURED and keep < count):
        family = family_of(config, "pruning of width" if changes_width else f"depth = {init.depth}")
        record |= _prune_by_text(source, config, init, data, folder, tokenizer(), family, keep, changes_width)
    else:
        kept = choose_layers(init.depth, count, keep, init.seed) if keep < count else tuple(range(count))
        write_part(Weights(source), config, folder, kept)
        record["kept"] = {"layers": list(kept)}
    # What was written has to work, and remembers the teacher's files.
    try_out(folder, trust_remote_code)
    record["teacher"]["sha256"] = {file.name: sha256(file) for file in sorted(set(Weights(source).files.values()))}
    (folder / RECORD).write_text(json.dumps(record))
    return record


def _kept_count(path: str, init: InitConfig, count: int) -> int:
    """How many of `count` layers stay. Raises ValueError for what the model does not have."""
    layers = listed(init.depth)
    if layers is not None and (not layers or not set(layers) <= set(range(count))):
        raise ValueError(f"layers {sorted(layers)} are to be kept, but the model has layers 0 to {count - 1}")
    keep = len(layers) if layers is not None else (init.layers or count)
    if not 1 <= keep <= count or (layers is not None and init.layers not in (None, keep)):
        raise ValueError(
            f"layers = {init.layers} with depth = {init.depth}, but {path} has {count} layers; give a number from 1 to "
            f"{count}, which is that of the listed layers where they are listed"
        )
    return keep


def _prune_by_text(
    source: Path, config: PretrainedConfig, init: InitConfig, data: DataConfig, folder: Path,
    tokenizer: PreTrainedTokenizerBase, family: Family, keep: int, changes_width: bool,
) -> dict[str, Any]:  # fmt: skip
    """Choose by what the teacher does on calibration text, write the student, and compare the two on that text."""
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    ids_RT = calibration_ids(data, tokenizer, init.rows, init.row_tokens)
    limit = getattr(config, "max_position_embeddings", init.row_tokens)
    if ids_RT.shape[1] > limit:
        raise ValueError(f"row_tokens = {init.row_tokens} is longer than the teacher's {limit} positions; lower it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = LayerwiseModel(source, family, device, dtype)
    # Sizes are checked before the teacher runs.
    sizes = Sizes.of(config, teacher.count)
    student = _student_sizes(sizes, init, keep, family.heads_fill_hidden) if changes_width else sizes
    if changes_width:
        check_sizes(sizes, student, family)
    # The teacher runs; its layers leave memory before the student is written.
    meter = Meter(family, sizes, ids_RT.shape[1], centred=config.model_type in ("gpt2", "opt"))
    kept, scores, teacher_NT = _choose_depth(teacher, init, keep, ids_RT, meter, vocabulary)
    head_VT = teacher.head_VH
    del teacher
    width = None
    if changes_width:
        width = choose_width(init.width, sizes, student, meter.found, init.seed, init.keep_scale)
        cut = partial(width.cut, family)
        write_part(Weights(source), config, folder, kept, cut, _fields(config, sizes, student))
    else:
        write_part(Weights(source), config, folder, kept)
    # The student runs as the teacher did.
    made = LayerwiseModel(folder, family, device, dtype)
    hidden_NS = run_choices(made, ids_RT, [])[1]
    kl_nats, agreement = kl_to_teacher(hidden_NS, made.head_VH, teacher_NT, head_VT, vocabulary)
    return {
        "kept": {"layers": list(kept)} | ({} if width is None else _kept_width(width, kept)),
        "depth_kl_nats": scores,
        "width_importance": {} if width is None else _importance(meter.found),
        "calibration": {
            "source": data.source, "rows": len(ids_RT), "row_tokens": ids_RT.shape[1],
            "sha256": hashlib.sha256(ids_RT.numpy().tobytes()).hexdigest(),
            "kl_nats": kl_nats, "top1_agreement": agreement,
        },
    }  # fmt: skip


def _choose_depth(
    teacher: LayerwiseModel, init: InitConfig, keep: int, ids_RT: Tensor, meter: Meter, vocabulary: int
) -> tuple[Choice, dict[str, float], Tensor]:
    """(layers to keep, KL in nats of what was measured, what the teacher's head reads [N, H])."""
    whole: list[Tensor] = []  # what the head reads, of the first pass

    def measure(choices: Sequence[Choice]) -> dict[Choice, float]:
        # The first pass over the teacher's layers serves `meter` as well.
        if whole:
            ended, _ = run_choices(teacher, ids_RT, choices)
        else:
            ended, whole_NT = run_choices(teacher, ids_RT, choices, meter.watch)
            whole.append(whole_NT)
        head_VH = teacher.head_VH
        return {choice: kl_to_teacher(ended[choice], head_VH, whole[0], head_VH, vocabulary)[0] for choice in choices}

    scores: dict[str, float] = {}
    if keep == teacher.count:
        kept = tuple(range(teacher.count))
        measure([])
    elif init.depth == "importance":
        kept, scores = best_block(teacher.count, keep, measure)
    elif init.depth == "greedy":
        kept, scores = greedy(teacher.count, keep, measure)
    else:
        kept = choose_layers(init.depth, teacher.count, keep, init.seed)
        scores = {",".join(map(str, kept)): measure([kept])[kept]}
    return kept, scores, whole[0]


def _student_sizes(teacher: Sizes, init: InitConfig, layers: int, heads_fill_hidden: bool) -> Sizes:
    """What is not given stays, but for kv_heads of a teacher without groups: they are as many as the heads."""
    heads, hidden, kv_heads = init.heads, init.hidden, init.kv_heads
    # Heads and hidden size follow from each other in some architectures.
    if heads_fill_hidden:
        if heads is None and hidden is not None:
            heads = max(1, hidden // teacher.head_dim)
        hidden = heads * teacher.head_dim if hidden is None and heads is not None else hidden
    heads = heads or teacher.heads
    if kv_heads is None:
        kv_heads = heads if teacher.kv_heads == teacher.heads else teacher.kv_heads
    mlp = init.mlp or teacher.mlp
    return Sizes(layers, hidden or teacher.hidden, heads, kv_heads, mlp, teacher.head_dim)


def _fields(config: PretrainedConfig, teacher: Sizes, student: Sizes) -> dict[str, Any]:
    """The configuration's fields that change with the width."""
    fields: dict[str, Any] = {"hidden_size": student.hidden, "num_attention_heads": student.heads}
    if config.model_type == "gpt2":
        return fields | {"n_inner": student.mlp}
    if config.model_type == "opt":
        return fields | {"ffn_dim": student.mlp, "word_embed_proj_dim": student.hidden}
    fields |= {"intermediate_size": student.mlp, "num_key_value_heads": student.kv_heads}
    return fields | {"head_dim": teacher.head_dim}


def _kept_width(width: Width, layers: Sequence[int]) -> dict[str, Any]:
    """By the teacher's numbers; per-layer entries in the order of the layers kept; None is all of them."""
    hidden = None if width.hidden_H is None else width.hidden_H.tolist()
    per_layer = {"heads": width.heads_LA, "kv_heads": width.kv_heads_LK, "mlp": width.mlp_LM}
    return {"hidden": hidden, "norm_factors": width.norm_factors} | {
        name: None if values is None else [values[layer].tolist() for layer in layers]
        for name, values in per_layer.items()
    }


def _importance(found: Statistics) -> dict[str, Any]:
    """The scores, with four significant digits."""

    def rounded(scores: Tensor) -> list[float]:
        return [float(f"{score:.4g}") for score in scores.tolist()]

    heads, mlp = ([rounded(scores) for scores in layers] for layers in (found.heads_LA, found.mlp_LM))
    return {"hidden": rounded(found.hidden_H), "heads": heads, "mlp": mlp}
