"""The shape of a model from its configuration alone: how many weights it has, in which tensors and layers.

The tensors of LLaMA, of families built like it, of GPT-2 and OPT are written down here: importing a family's code takes
longer than all the rest of a plan. Any other family is built by transformers on the meta device, where tensors have no
numbers.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.plan import gguf_header
from toolkit.settings import InitConfig, ModelConfig
from toolkit.settings.packages import PACKAGE, gguf_of_package

#: model_type -> (the query, key and value projections have biases, queries and keys have a norm for each head)
LLAMA_LIKE = {"llama": (False, False), "mistral": (False, False), "qwen2": (True, False), "qwen3": (False, True)}
#: what their configuration says of itself where it says nothing (transformers 5.24)
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                  num_attention_heads=32),
    "mistral": dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=8),
    "qwen2": dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=32),
    "qwen3": dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=32, head_dim=128),
    "gpt2": dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, tie_word_embeddings=True),
    "opt": dict(vocab_size=50272, max_position_embeddings=2048, hidden_size=768, num_hidden_layers=12, ffn_dim=3072,
                num_attention_heads=12, tie_word_embeddings=True),
}  # fmt: skip
#: fields of OPT with which its layers are built otherwise
USUAL = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True,
         "layer_norm_elementwise_affine": True}  # fmt: skip
#: what a size is called by the families, the first that a configuration has
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "decoder_layers": ("num_decoder_layers",),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "mlp": ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_of_a_token": ("num_experts_per_tok", "num_experts_per_token"),
}
ENCODER_DECODERS = ("t5", "mt5")
NUMBER = re.compile(r"\.(\d+)\.")
GATES = ("gate_proj", "gate_up_proj", "wi_1", ".w3.")


class Weight(NamedTuple):
    """A parameter. part: the layer that it belongs to, as in "layers.3", "" outside of them. is_expert: only some
    tokens use it."""

    name: str
    shape: tuple[int, ...]
    part: str = ""
    is_expert: bool = False

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """What a plan knows of a model. layers: of the decoder. mlp: width between an MLP's matrices, for a mixture of
    experts that of those that one token uses. head: rows of the output projection, which is `embedding`'s matrix where
    the model is tied."""

    family: str
    layers: int
    encoder_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    is_gated: bool
    vocabulary: int
    is_tied: bool
    share_of_experts: float
    weights: tuple[Weight, ...]

    @classmethod
    def of(cls, source: str | Path | Mapping[str, Any], *, trust_remote_code: bool = False) -> ModelShape:
        """Of a configuration, of a folder with a config.json, of a .gguf file, of package:NAME, or of a name of the
        hub, from which the configuration alone is fetched. Raises ValueError where there is none."""
        config = dict(source) if isinstance(source, Mapping) else read_configuration(str(source))
        return _shape(config, trust_remote_code, "" if isinstance(source, Mapping) else str(source))

    @classmethod
    def of_settings(cls, model: ModelConfig, init: InitConfig | None = None) -> ModelShape:
        """Of the model that `materialize` would make of these settings, cut by `init` beside the settings' own."""
        return cls.of(settings_configuration(model, init), trust_remote_code=model.trust_remote_code)

    @functools.cached_property
    def parameters(self) -> int:
        """All weights, a tied one once."""
        return sum(weight.numel for weight in self.weights)

    @functools.cached_property
    def active(self) -> int:
        """The weights that one token is multiplied with: no embedding that is only looked up, few of the experts. The
        head is not among them: it is multiplied with response tokens alone."""
        inside = (weight for weight in self.weights if weight.part)
        return sum(int(weight.numel * (self.share_of_experts if weight.is_expert else 1)) for weight in inside)

    @functools.cached_property
    def parts(self) -> dict[str, int]:
        """Weights of each layer, in the order of the model."""
        found: dict[str, int] = {}
        for weight in self.weights:
            if weight.part:
                found[weight.part] = found.get(weight.part, 0) + weight.numel
        return found

    @property
    def largest_layer(self) -> int:
        """Weights of the largest layer."""
        return max(self.parts.values(), default=0)

    @property
    def head(self) -> int:
        """Weights of the output projection."""
        return self.vocabulary * self.hidden

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys in one layer; its values are as many."""
        return self.kv_heads * self.head_dim

    @property
    def all_layers(self) -> int:
        """Those of an encoder as well."""
        return self.layers + self.encoder_layers


def settings_configuration(model: ModelConfig, init: InitConfig | None = None) -> dict[str, Any]:
    """The configuration that a model of these settings has. Raises ValueError as `read_configuration` does."""
    is_given = model.random_weights and model.shape
    config = dict(model.shape) if is_given else read_configuration(model.path)
    if model.num_layers is not None:
        config = resized(config, InitConfig(layers=model.num_layers))
    if model.drop_layers:
        layers = _size(config | DEFAULTS.get(config.get("model_type", ""), {}) | config, "layers", 0)
        config = resized(config, InitConfig(layers=layers - len(model.drop_layers)))
    for cut in (model.init, init):
        if cut is not None and cut.wanted:
            config = resized(config, cut)
    return config


def resized(config: Mapping[str, Any], cut: InitConfig) -> dict[str, Any]:
    """The configuration of what `cut` leaves of a model."""
    found = {**DEFAULTS.get(config.get("model_type", ""), {}), **config}
    heads, hidden = _size(found, "heads", 0), _size(found, "hidden", 0)
    layers = cut.layers
    if layers is None and "," in cut.depth:
        layers = len(cut.depth.split(","))
    # A head keeps its size, and a model without kv_heads has as many as heads.
    if (cut.hidden or cut.heads) and _field(found, "head_dim") is None and heads and _name(found, "hidden") != "n_embd":
        found["head_dim"] = hidden // heads
    if cut.heads and not cut.kv_heads and _field(found, "kv_heads") is None:
        found.pop("num_key_value_heads", None)
    sizes = ("layers", layers), ("decoder_layers", layers), ("hidden", cut.hidden), ("heads", cut.heads), (
        "kv_heads", cut.kv_heads), ("mlp", cut.mlp)  # fmt: skip
    for size, value in sizes:
        if value is not None and (size != "decoder_layers" or _name(found, size) in found):
            found[_name(found, size)] = value
    if layers is not None and found.get("layer_types"):
        found["layer_types"] = found["layer_types"][:layers]
    return found


def read_configuration(path: str) -> dict[str, Any]:
    """config.json of a folder or of the hub's model, or the header of a .gguf file. Raises ValueError where there is
    none."""
    if path.startswith(PACKAGE):
        path = gguf_of_package(path)
    where = Path(path).expanduser()
    if where.suffix == ".gguf":
        return gguf_header.configuration(where)
    file = where / "config.json"
    if not file.is_file() and not where.exists() and path.count("/") == 1 and not path.startswith((".", "~")):
        file = _fetched(path)
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise ValueError(f"no model's configuration at {path!r}: {error}") from error


def _fetched(path: str) -> Path:
    from huggingface_hub import hf_hub_download

    name, _, revision = path.partition("@")
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision or None))
    except Exception as error:  # of many kinds: no network, no such model, no right to read it
        raise ValueError(
            f"the configuration of {path} could not be had from the hub, and there is no folder of that name "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); name a folder, or set random_weights=true and "
            "shape for this model"
        ) from error


def _name(config: Mapping[str, Any], size: str) -> str:
    """What this configuration calls a size, or would."""
    return next((name for name in NAMES[size] if name in config), NAMES[size][0])


def _field(config: Mapping[str, Any], size: str) -> Any:
    return next((config[name] for name in NAMES[size] if config.get(name) is not None), None)


def _size(config: Mapping[str, Any], size: str, default: int) -> int:
    found = _field(config, size)
    return default if found is None else int(found)


def _shape(config: dict[str, Any], trust_remote_code: bool, path: str) -> ModelShape:
    family = config.get("model_type", "")
    if family in DEFAULTS and not any(config.get(name, usual) != usual for name, usual in USUAL.items()):
        config = {**DEFAULTS[family], **config}
        is_tied, weights = bool(config.get("tie_word_embeddings", False)), tuple(_written_down(config))
    else:
        config, weights = _by_transformers(config, trust_remote_code, path)
        is_tied = not any(_is_head(weight.name) for weight in weights)
    heads, hidden = _size(config, "heads", 1), _size(config, "hidden", 0)
    experts, used = _size(config, "experts", 0), _size(config, "experts_of_a_token", 0)
    is_sparse = bool(experts and used)
    is_pair = family in ENCODER_DECODERS
    return ModelShape(
        family=family,
        layers=_size(config, "decoder_layers", _size(config, "layers", 0)) if is_pair else _size(config, "layers", 0),
        encoder_layers=_size(config, "layers", 0) if is_pair else 0, hidden=hidden, heads=heads,
        kv_heads=_size(config, "kv_heads", heads), head_dim=_size(config, "head_dim", hidden // heads),
        mlp=_size(config, "mlp", 4 * hidden) * (used if is_sparse else 1),
        is_gated=any(gate in weight.name for weight in weights for gate in GATES),
        vocabulary=int(config["vocab_size"]), is_tied=is_tied, share_of_experts=used / experts if is_sparse else 1.0,
        weights=weights,
    )  # fmt: skip


def _written_down(config: Mapping[str, Any]) -> Iterator[Weight]:
    """The tensors of a family of DEFAULTS, in the order of the model."""
    family, vocabulary, hidden = config["model_type"], config["vocab_size"], _size(config, "hidden", 0)
    layers, mlp = _size(config, "layers", 0), _size(config, "mlp", 4 * hidden)
    if family == "gpt2":
        yield Weight("wte.weight", (vocabulary, hidden))
        yield Weight("wpe.weight", (config["n_positions"], hidden))
        shapes, prefix, norm, has_bias = _gpt2_layer(hidden, mlp), "h", "ln_f", True
    elif family == "opt":
        width = config.get("word_embed_proj_dim") or hidden
        yield Weight("embed_tokens.weight", (vocabulary, width))
        yield Weight("embed_positions.weight", (config["max_position_embeddings"] + 2, hidden))  # as OPT counts them
        if width != hidden:
            yield Weight("project_out.weight", (width, hidden))
            yield Weight("project_in.weight", (hidden, width))
        shapes, prefix, norm, has_bias = _opt_layer(hidden, mlp), "layers", "final_layer_norm", True
    else:
        yield Weight("embed_tokens.weight", (vocabulary, hidden))
        shapes, prefix, norm, has_bias = _llama_layer(config), "layers", "norm", False
    for layer in range(layers):
        for name, shape in shapes.items():
            yield Weight(f"{prefix}.{layer}.{name}", shape, f"{prefix}.{layer}")
    yield Weight(f"{norm}.weight", (hidden,))
    if has_bias:
        yield Weight(f"{norm}.bias", (hidden,))
    if not config.get("tie_word_embeddings", False):
        yield Weight("lm_head.weight", (vocabulary, hidden))


def _llama_layer(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    query, key = heads * size, (config.get("num_key_value_heads") or heads) * size
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (query, hidden), "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden), "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (mlp, hidden), "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
    }  # fmt: skip
    biased, has_norms = LLAMA_LIKE[config["model_type"]]
    of_settings = bool(config.get("attention_bias")) and config["model_type"] != "qwen2"
    if biased or of_settings:
        sizes = {"q": query, "k": key, "v": key} | ({"o": hidden} if of_settings else {})
        shapes |= {f"self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
    if config.get("mlp_bias"):
        shapes |= {"mlp.gate_proj.bias": (mlp,), "mlp.up_proj.bias": (mlp,), "mlp.down_proj.bias": (hidden,)}
    if has_norms:
        shapes |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    return shapes


def _gpt2_layer(hidden: int, mlp: int) -> dict[str, tuple[int, ...]]:
    linear = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden), "mlp.c_fc": (hidden, mlp),
              "mlp.c_proj": (mlp, hidden)}  # fmt: skip
    return _with_biases(linear, ("ln_1", "ln_2"), hidden, outputs=1)


def _opt_layer(hidden: int, mlp: int) -> dict[str, tuple[int, ...]]:
    linear = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    linear |= {"fc1": (mlp, hidden), "fc2": (hidden, mlp)}
    return _with_biases(linear, ("self_attn_layer_norm", "final_layer_norm"), hidden, outputs=0)


def _with_biases(
    linear: Mapping[str, tuple[int, int]], norms: tuple[str, ...], hidden: int, outputs: int
) -> dict[str, tuple[int, ...]]:
    """Weights and biases of these linear layers and norms; outputs: which axis counts a linear layer's outputs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": (shape[outputs],)}
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return shapes


def _is_head(name: str) -> bool:
    return name.startswith(("lm_head.", "embed_out.", "output."))


def _by_transformers(
    config: dict[str, Any], trust_remote_code: bool, path: str
) -> tuple[dict[str, Any], tuple[Weight, ...]]:
    """The configuration with the family's defaults, and the weights of the model that its code builds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, MT5ForConditionalGeneration, T5ForConditionalGeneration
    from transformers.initialization import meta_device_safe_creation_ops

    family, given = config.get("model_type", ""), {key: v for key, v in config.items() if key != "model_type"}
    try:
        if trust_remote_code and path and "auto_map" in config:
            full = AutoConfig.from_pretrained(path, trust_remote_code=True)
        else:
            full = AutoConfig.for_model(family, **given)
        with torch.device("meta"), meta_device_safe_creation_ops():
            if family in ENCODER_DECODERS:
                kind: Any = {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration}[family]
                model: Any = kind._from_config(full)
            else:
                model = AutoModelForCausalLM.from_config(full, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"transformers cannot build the {family!r} model of {path or config!r}: {error}") from error
    weights = []
    for name, parameter in model.named_parameters():
        if _is_head(name) and family in ENCODER_DECODERS and not _has_own_head(config):
            continue
        weights.append(_weight(name, parameter))
    has_head = any(_is_head(weight.name) for weight in weights)
    if family in ENCODER_DECODERS and _has_own_head(config) and not has_head:
        # transformers 5 ties every T5. The project gives a head of their own to those that have one.
        weights.append(Weight("lm_head.weight", (full.vocab_size, full.d_model)))
    text = full.get_text_config()
    sizes = {NAMES[size][0]: value for size, value in _text_sizes(text).items() if value is not None}
    return {**text.to_dict(), **sizes, "vocab_size": text.vocab_size}, tuple(weights)


def _has_own_head(config: Mapping[str, Any]) -> bool:
    """Of T5 1.1 and mT5. transformers 5 writes of every T5 that it is tied, and scales what a tied decoder says."""
    is_tied = config.get("tie_word_embeddings", True) and config.get("scale_decoder_outputs") is not False
    return not is_tied or config["model_type"] == "mt5"


def _text_sizes(text: Any) -> dict[str, Any]:
    """Sizes by the names that transformers maps every family's own names to."""
    names = {size: NAMES[size][0] for size in ("layers", "hidden", "heads")}
    return {size: getattr(text, name, None) for size, name in names.items()}


def _weight(name: str, parameter: Any) -> Weight:
    numbers = list(NUMBER.finditer(name))
    part = name[: numbers[0].end() - 1] if numbers else ""
    return Weight(name, tuple(parameter.shape), part, ".experts." in name)
