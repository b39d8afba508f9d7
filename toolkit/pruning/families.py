"""Which parameters of which architectures hold hidden units, query heads, key-value heads and MLP channels.

Names are relative: of a layer's parameters to the layer, of all others to the base model. What is not listed (biases
that are absent, the q and k norms of Qwen 3) has none of these axes and is kept as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

#: name of a decoder layer's parameters, of the architectures whose layers can be left out; T5 has two stacks
LAYER = re.compile(
    r"^(?P<before>(?:(?:model\.|transformer\.|model\.decoder\.|decoder\.)?(?:layers|h)|(?:encoder|decoder)\.block)\.)"
    r"(?P<index>\d+)(?P<after>\..+)$"
)
#: fields of a configuration that hold one entry a layer
PER_LAYER_FIELDS = ("layer_types", "no_rope_layers")

ENCODER_DECODERS = ("t5", "mt5")

HIDDEN, QUERY, KEY_VALUE, FUSED, MLP = "hidden", "query", "key_value", "fused", "mlp"
Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps what. layers, norm: path of the layers and of the last norm in the base model.
    embeddings: all that have hidden units as columns. norms, linears: of a layer, the latter with what their outputs
    and inputs count. heads_out, mlp_out: the linears whose inputs are the heads' and the channels' activations.
    heads_fill_hidden: hidden size = heads x head size, always (no head_dim of its own). transposed: weights are
    [in, out]."""

    layers: str
    norm: str
    embeddings: tuple[str, ...]
    norms: tuple[str, ...]
    linears: Mapping[str, tuple[str, str]]
    heads_out: str
    mlp_out: str
    heads_fill_hidden: bool
    transposed: bool = False

    def axes_of(self, name: str) -> Axes:
        """Of a parameter by its full name, what its dimensions count; () where none of them is cut."""
        match = LAYER.match(name)
        module, _, kind = (match["after"][1:] if match else ".".join(name.split(".")[-2:])).rpartition(".")
        if module in (*self.norms, self.norm.rpartition(".")[2]):
            return (HIDDEN,)
        if module in self.embeddings and kind == "weight":
            return (None, HIDDEN)
        if module not in self.linears:
            return ()
        outputs, inputs = self.linears[module]
        if kind == "bias":
            return (outputs,)
        return (inputs, outputs) if self.transposed else (outputs, inputs)


_LLAMA = Family(
    layers="layers", norm="norm", embeddings=("embed_tokens", "lm_head"),
    norms=("input_layernorm", "post_attention_layernorm"),
    linears={
        "self_attn.q_proj": (QUERY, HIDDEN), "self_attn.k_proj": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj": (KEY_VALUE, HIDDEN), "self_attn.o_proj": (HIDDEN, QUERY),
        "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP),
    },
    heads_out="self_attn.o_proj", mlp_out="mlp.down_proj", heads_fill_hidden=False,
)  # fmt: skip
_GPT2 = Family(  # c_attn holds q, k and v one after another
    layers="h", norm="ln_f", embeddings=("wte", "wpe", "lm_head"), norms=("ln_1", "ln_2"),
    linears={
        "attn.c_attn": (FUSED, HIDDEN), "attn.c_proj": (HIDDEN, QUERY),
        "mlp.c_fc": (MLP, HIDDEN), "mlp.c_proj": (HIDDEN, MLP),
    },
    heads_out="attn.c_proj", mlp_out="mlp.c_proj", heads_fill_hidden=True, transposed=True,
)  # fmt: skip
_OPT = Family(
    layers="decoder.layers", norm="decoder.final_layer_norm",
    embeddings=("embed_tokens", "embed_positions", "lm_head"), norms=("self_attn_layer_norm", "final_layer_norm"),
    linears={
        "self_attn.q_proj": (QUERY, HIDDEN), "self_attn.k_proj": (QUERY, HIDDEN), "self_attn.v_proj": (QUERY, HIDDEN),
        "self_attn.out_proj": (HIDDEN, QUERY), "fc1": (MLP, HIDDEN), "fc2": (HIDDEN, MLP),
    },
    heads_out="self_attn.out_proj", mlp_out="fc2", heads_fill_hidden=True,
)  # fmt: skip
FAMILIES = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "smollm3": _LLAMA, "gpt2": _GPT2, "opt": _OPT,
}  # fmt: skip


def family_of(config: PretrainedConfig, what: str) -> Family:
    """Raises ValueError for an architecture that `what` does not know."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{what} is not there for models of type {config.model_type!r}; it is for {', '.join(FAMILIES)}. "
            "Layers alone can be chosen with depth=even, depth=random or a list of layers, width left as it is"
        )
    if config.model_type == "opt" and config.word_embed_proj_dim != config.hidden_size:
        raise ValueError(
            f"{what} is not there for OPT with projected embeddings (word_embed_proj_dim = "
            f"{config.word_embed_proj_dim}, hidden_size = {config.hidden_size}), as OPT-350M has; use another size of "
            "OPT, or depth=even, depth=random or a list of layers"
        )
    return FAMILIES[config.model_type]


def layer_count(config: PretrainedConfig) -> int:
    """Of one stack. Raises ValueError for encoder-decoders other than T5, and where the two stacks differ."""
    if config.is_encoder_decoder:
        if config.model_type not in ENCODER_DECODERS:
            known = ", ".join(ENCODER_DECODERS)
            raise ValueError(f"layers of encoder-decoders are known for {known}, not for {config.model_type!r}")
        if config.num_decoder_layers != config.num_layers:
            raise ValueError(
                f"this {config.model_type} has {config.num_layers} encoder and {config.num_decoder_layers} decoder "
                "layers; one choice of layers is made for both, so they have to be as many"
            )
    return config.num_hidden_layers


def check_movable(config: PretrainedConfig) -> None:
    """Raises ValueError for layers that work at their own place only."""
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "this GPT-2 divides attention scores by the layer's number (scale_attn_by_inverse_layer_idx = True): its "
            "layers do not work at other places, so none can be left out"
        )
