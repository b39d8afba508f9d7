"""From hidden states to logits: a model's output projection, and what its code does to logits after it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from toolkit.divergences.head import Head
from toolkit.models import zero
from toolkit.models.vocabulary import Vocabulary

#: how far off two ways to the same logits may be, relative to the largest: other products round otherwise
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2}


def stack_of(model: PreTrainedModel) -> nn.Module:
    """What makes the hidden states of a model without an encoder, between its ids and its head."""
    if model.base_model is not model:
        return model.base_model
    # Llama 4's base_model_prefix names no part of it, so it counts as its own base.
    embeddings = model.get_input_embeddings()
    return next(part for part in model.children() if any(module is embeddings for module in part.modules()))


def head_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the output projection. Reading its `weight` would make deepspeed gather it in the forward pass at hand."""
    return next(model.get_output_embeddings().parameters()).dtype


def logit_rules(config: Any) -> tuple[float, float | None]:
    """(scale, soft cap) of the logits: Cohere multiplies, Granite divides, T5 with tied embeddings divides by the root
    of its width, Gemma caps, and each has a name of its own for it."""
    config = config.get_text_config()

    def number(*names: str) -> float:
        return next((float(value) for name in names if (value := getattr(config, name, None)) is not None), 1.0)

    divisor = number("logits_scaling", "logits_mup_width_multiplier")
    # MPT has a logit_scale in its configuration and never reads it. HyperCLOVA X multiplies by its logits_scaling.
    scale = 1.0 if config.model_type == "mpt" else number("logit_scale", "lm_head_multiplier")
    scale *= divisor if config.model_type == "hyperclovax" else 1 / divisor
    if getattr(config, "scale_decoder_outputs", False):
        scale *= config.d_model**-0.5
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return scale, next((cap for name in caps if (cap := getattr(config, name, None))), None)


def head_of(model: PreTrainedModel) -> Head:
    """The output projection of a causal model, with what its code does to logits after it. Under ZeRO-3 its parameters
    have to be gathered, or this has to run in a forward pass of the engine, where reading them gathers them."""
    projection, (scale, cap) = model.get_output_embeddings(), logit_rules(model.config)
    weight_VH, bias_V = (zero.borrow(projection, name) for name in ("weight", "bias"))
    return Head(weight_VH, bias_V=bias_V, scale=scale, cap=cap)


def logits_of(model: PreTrainedModel, hidden_NH: Tensor, vocab_size: int | None = None) -> Tensor:
    """fp32 [N, V] of the model's hidden states, of the first `vocab_size` entries."""
    scale, soft_cap = logit_rules(model.config)
    logits_NV = model.get_output_embeddings()(hidden_NH.to(head_dtype(model)))[:, :vocab_size].float()
    logits_NV = logits_NV if scale == 1 else logits_NV * scale
    return logits_NV if soft_cap is None else soft_cap * torch.tanh(logits_NV / soft_cap)


def check_logits(role: str, model: PreTrainedModel, own_NV: Tensor, found_NV: Tensor, vocabulary: Vocabulary) -> None:
    """Raises ValueError where `found_NV`, by `logits_of`, are not what the model's own forward makes, `own_NV`: loss,
    validation and generation would all be of another model."""
    own_NV, found_NV = own_NV[:, : vocabulary.size].float(), found_NV[:, : vocabulary.size].float()
    most, error = float(own_NV.abs().max()), float((own_NV - found_NV).abs().max())
    if most < float("inf") and not error <= TOLERANCE[model.dtype] * most:
        raise ValueError(
            f"the {role}, a {model.config.model_type} model, does something to its logits that is not known here: they "
            f"are off by up to {error:.3g}, the largest is {most:.3g}. Use a model of another family, or add its rule "
            "to `logit_rules` (toolkit/models/head.py)"
        )
