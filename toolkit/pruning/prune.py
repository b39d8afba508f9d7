"""A student made out of its teacher: fewer layers, fewer hidden units, heads and MLP channels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from toolkit.data import DataConfig
from toolkit.models.files import RECORD
from toolkit.pruning.depth import MEASURED, best_block, check_layers, choose_layers, greedy, listed
from toolkit.pruning.families import check_movable, family_of, layer_count
from toolkit.pruning.text import calibration_ids
from toolkit.pruning.weights import LayerwiseModel, Weights, kl_to_teacher, run_choices
from toolkit.pruning.width import Meter, Sizes, Statistics, Width, check_sizes, choose_width
from toolkit.pruning.write import try_out, write_part
from toolkit.settings import InitConfig
from toolkit.storage.manifest import sha256


def leave_out_layers(path: str, dropped: Sequence[int], folder: Path, trust_remote_code: bool = False) -> None:
    """Write the model in the folder `path` without the layers `dropped` into `folder`.

    Raises ValueError for layers that are not there, and for a result that does not load and generate.
    """
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
    path: str,
    init: InitConfig,
    data: DataConfig,
    folder: Path,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the model in the folder `path`, cut down to the sizes of `init`, into the empty `folder`; returns what
    RECORD holds.

    The teacher is read layer by layer: embedding, head, one layer's weights, and hidden states of the calibration text
    are in memory; then one shard of what is written; then the student, when it is tried out. `tokenizer` is that of
    the calibration text; beside the student lies the teacher's. Raises ValueError for sizes, layers or architectures
    that cannot be, and for a result that does not load, run and generate.
    """
    source = Path(path)
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    count = layer_count(config)
    layers = listed(init.depth)
    if layers is not None:
        check_layers(layers, count)
    keep = len(layers) if layers is not None else (init.layers or count)
    if not 1 <= keep <= count or (layers is not None and init.layers not in (None, keep)):
        raise ValueError(
            f"layers = {init.layers} with depth = {init.depth}, but {path} has {count} layers; give a number from 1 to "
            f"{count}, which is that of the listed layers where they are listed"
        )
    if keep < count:
        check_movable(config)
    changes_width = any(getattr(init, name) is not None for name in ("hidden", "heads", "kv_heads", "mlp"))
    measures_depth = init.depth in MEASURED and keep < count
    record: dict[str, Any] = {"teacher": {"path": path}, "settings": _settings(init)}
    if not changes_width and not measures_depth:
        kept = choose_layers(init.depth, count, keep, init.seed) if keep < count else tuple(range(count))
        write_part(Weights(source), config, folder, kept)
        record["kept"] = {"layers": list(kept)}
    else:
        family = family_of(config, "pruning of width" if changes_width else f"depth = {init.depth}")
        if config.is_encoder_decoder:
            raise AssertionError("no family has two stacks")
        words = tokenizer()
        vocabulary = max(words.get_vocab().values()) + 1
        ids_RT = calibration_ids(data, words, init.rows, init.row_tokens)
        limit = getattr(config, "max_position_embeddings", init.row_tokens)
        if ids_RT.shape[1] > limit:
            raise ValueError(f"row_tokens = {init.row_tokens} is longer than the teacher's {limit} positions; lower it")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        teacher = LayerwiseModel(source, family, device, dtype)
        sizes = Sizes.of(config, count)
        student = sizes
        if changes_width:
            student = _student_sizes(sizes, init, keep, family.heads_fill_hidden)
            check_sizes(sizes, student, family)
        meter = Meter(family, sizes, ids_RT.shape[1], centred=config.model_type in ("gpt2", "opt"))
        kept, scores, teacher_NT = _choose_depth(teacher, init, keep, ids_RT, meter, vocabulary)
        width = None
        if changes_width:
            width = choose_width(init.width, sizes, student, meter.found, init.seed, init.keep_scale)
        head_VT = teacher.head_VH
        del teacher
        cut = None if width is None else (lambda name, tensor: width.cut(family, name, tensor))
        write_part(
            Weights(source), config, folder, kept, cut, None if width is None else _fields(config, sizes, student)
        )
        made = LayerwiseModel(folder, family, device, dtype)
        hidden_NS = run_choices(made, ids_RT, [])[1]
        kl_nats, agreement = kl_to_teacher(hidden_NS, made.head_VH, teacher_NT, head_VT, vocabulary)
        del made, hidden_NS, teacher_NT, head_VT
        record["kept"] = {"layers": list(kept)} | _kept_width(width, kept)
        record["depth_kl_nats"] = scores
        record["width_importance"] = {} if width is None else _importance(meter.found)
        record["calibration"] = {
            "source": data.source, "rows": len(ids_RT), "row_tokens": ids_RT.shape[1], "sha256": _sha256_of_ids(ids_RT),
            "kl_nats": kl_nats, "top1_agreement": agreement,
        }  # fmt: skip
    try_out(folder, trust_remote_code)
    record["teacher"]["sha256"] = {file.name: sha256(file) for file in sorted(set(Weights(source).files.values()))}
    (folder / RECORD).write_text(json.dumps(record))
    return record


def _choose_depth(
    teacher: LayerwiseModel, init: InitConfig, keep: int, ids_RT: Tensor, meter: Meter, vocabulary: int
) -> tuple[tuple[int, ...], dict[str, float], Tensor]:
    """(layers to keep, KL in nats of what was measured, what the teacher's head reads [N, H]).

    The first pass over the teacher's layers serves `meter` as well.
    """
    teacher_NT: Tensor | None = None

    def watch(index: int, module: nn.Module) -> AbstractContextManager:
        return meter.last_norm(module) if index == teacher.count else meter.layer(index, module)

    def run(choices: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        nonlocal teacher_NT
        ended, whole_NT = run_choices(teacher, ids_RT, choices, watch if teacher_NT is None else None)
        if teacher_NT is None:
            teacher_NT = whole_NT
        return ended

    def measure(choices: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        ended = run(choices)
        return {
            choice: kl_to_teacher(ended[choice], teacher.head_VH, teacher_NT, teacher.head_VH, vocabulary)[0]
            for choice in choices
        }

    if keep == teacher.count:
        run([])
        return tuple(range(teacher.count)), {}, teacher_NT
    if init.depth == "importance":
        kept, scores = best_block(teacher.count, keep, measure)
    elif init.depth == "greedy":
        kept, scores = greedy(teacher.count, keep, measure)
    else:
        kept = choose_layers(init.depth, teacher.count, keep, init.seed)
        scores = {",".join(map(str, kept)): measure([kept])[kept]}
    return kept, scores, teacher_NT


def _student_sizes(teacher: Sizes, init: InitConfig, layers: int, heads_fill_hidden: bool) -> Sizes:
    """What is not given stays, but that fewer heads never keep more query heads to a group than the teacher has."""
    heads, hidden, kv_heads = init.heads, init.hidden, init.kv_heads
    if heads_fill_hidden:  # each follows from the other
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


def _settings(init: InitConfig) -> dict[str, Any]:
    return {name: getattr(init, name) for name in init.__dataclass_fields__}


def _kept_width(width: Width | None, layers: Sequence[int]) -> dict[str, Any]:
    """By the teacher's numbers; per-layer entries in the order of the layers kept; None is all of them."""
    if width is None:
        return {}
    per_layer = {"heads": width.heads_LA, "kv_heads": width.kv_heads_LK, "mlp": width.mlp_LM}
    return {
        "hidden": None if width.hidden_H is None else width.hidden_H.tolist(),
        "norm_factors": width.norm_factors,
    } | {
        name: None if values is None else [values[layer].tolist() for layer in layers]
        for name, values in per_layer.items()
    }


def _importance(found: Statistics) -> dict[str, Any]:
    def rounded(scores: Tensor) -> list[float]:
        return [float(f"{score:.4g}") for score in scores.tolist()]

    return {
        "hidden": rounded(found.hidden_H),
        "heads": [rounded(scores) for scores in found.heads_LA],
        "mlp": [rounded(scores) for scores in found.mlp_LM],
    }


def _sha256_of_ids(ids_RT: Tensor) -> str:
    return hashlib.sha256(ids_RT.numpy().tobytes()).hexdigest()
