"""Load a language model, with or without an encoder: a hub name, a folder, a GGUF file, or random.

Whatever needs work on whole weights (GGUF to safetensors, pruning) is done once, by rank 0, into a folder of
the cache that appears by rename; every rank then loads a plain Hugging Face folder, sharded as it is read.
"""

import json
import os
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    MT5ForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    T5ForConditionalGeneration,
)
from transformers.integrations import HfDeepSpeedConfig

from toolkit.batch import RowLayout, layout_of
from toolkit.divergences.products import cpu_has_bf16_products
from toolkit.models import attention
from toolkit.models.dtypes import dtypes_of
from toolkit.models.files import first_weights_file, hub_version
from toolkit.models.fit import Kind, blank, check_fit, from_config, quiet, rehearse
from toolkit.models.zero import dtypes_under_init
from toolkit.ranks import collectives
from toolkit.settings import ModelConfig
from toolkit.settings.overrides import unknown
from toolkit.settings.packages import PACKAGE, gguf_of_package

#: model_type -> class, of the encoder-decoder models whose stacks and caches the project knows
ENCODER_DECODERS: dict[str, type[PreTrainedModel]] = {
    "t5": T5ForConditionalGeneration,
    "mt5": MT5ForConditionalGeneration,
}


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where the device multiplies it in hardware: elsewhere it is many times slower than fp32."""
    if precision == "auto":
        on_cpu = device.type == "cpu"
        has_bf16 = cpu_has_bf16_products() if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def default_cache_dir(cache_dir: str) -> Path:
    """`cache_dir`, or the user's own place for converted models where it is empty."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "distillation-toolkit"
    return Path(cache_dir or user_cache).expanduser()


def resolve(path: str) -> str:
    """`package:NAME` as the one .gguf file of that installed package; anything else as it is."""
    if path.startswith(PACKAGE):
        return gguf_of_package(path)
    return os.path.expanduser(path)  # a shell leaves the ~ of key=~/model alone


def base_name(model: ModelConfig, path: str) -> str:
    """What others know as the base of an adapter: the hub's name of a model that is used as it is there, else `path`,
    where `materialize` put it."""
    is_changed = model.random_weights or model.drop_layers or model.init.wanted
    return path if is_changed or _is_local(resolve(model.path)) else hub_version(model.path)[0]


def row_layout(model: ModelConfig, path: str) -> RowLayout:
    """How the model reads a prompt and its response. `path` is what `materialize` returned. Raises ValueError for a
    configuration that is not to be had or not known."""
    with _told_plainly(model, path):
        return layout_of(configuration(model, path))


def generation_ends(path: str) -> list[int]:
    """The ids that end a text by the model's generation_config.json: chat models list several (Llama 3, Qwen)."""
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id if path else None
    except (OSError, ValueError):  # it has none
        return []
    return [int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None]


def check_positions(section: str, model: ModelConfig, path: str, tokens: int) -> None:
    """Raises ValueError, with both values, where a text of so many tokens has more than the model has positions: beyond
    them learned positions do not exist, and rotary ones were never trained. T5's relative ones have no end."""
    room = getattr(configuration(model, path).get_text_config(), "max_position_embeddings", None)
    if room is not None and tokens > room:
        raise ValueError(
            f"the {section} at {path or model.shape!r} has {room} positions (max_position_embeddings), and texts take "
            f"up to {tokens}, with padding to a multiple of 8; lower data.max_length, rollout.max_new_tokens or "
            "text.max_length, or use a model with more positions"
        )


def load_model(
    model: ModelConfig, path: str, ds_config: dict | None, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """The model in `dtype`, but for what transformers keeps in fp32; partitioned while it is read where `ds_config`
    says ZeRO-3, and then every rank has to call it. Without a `ds_config` it is whole on each rank.

    `path` is what `materialize` returned. Tensors of the files that the model does not have are told on rank 0. Raises
    ValueError for weights that do not fit the configuration, and for a model whose code fails under zero.Init.
    """
    is_sharded = ds_config is not None and ds_config.get("zero_optimization", {}).get("stage") == 3

    def planned() -> _Plan:
        with _told_plainly(model, path):
            return _plan(model, path, ds_config, dtype)

    # Together: a rank whose files are other ones would leave the rest alone in the collectives of the load.
    plan = collectives.together(planned) if is_sharded else planned()
    # transformers keeps only a weak reference: without this name alive the model would load whole on every rank.
    # deepspeed reads the precision from the config: under zero.Init `dtype` alone is not enough.
    keep_alive = HfDeepSpeedConfig(ds_config) if ds_config else None
    torch.manual_seed(seed)
    try:
        with _told_plainly(model, path), dtypes_under_init(plan.dtypes):
            loaded = _made(plan, model, path, dtype)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        if not is_sharded:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"the model at {path or model.shape!r}, a {plan.config.model_type} model, cannot be loaded under ZeRO-3, "
            f"where deepspeed partitions a weight as soon as it is made: {type(error).__name__}: {error} "
            f"({Path(place.filename).name}:{place.lineno}). Use a model of another family, or a ds_config that keeps "
            "it whole on every rank: ds_configs/student_zero2.json for a student, ZeRO stage 0 for a teacher"
        ) from error
    finally:
        del keep_alive
    for name in plan.frozen:
        loaded.get_parameter(name).requires_grad_(False)
    loaded.config.use_cache = False
    attention.install()
    return loaded


class _Plan(NamedTuple):
    """A model as transformers would load it: by name, the dtypes of parameters and buffers, and the parameters that its
    own code does not train (which transformers forgets where it replaces them by those of a file)."""

    kind: Kind
    config: PretrainedConfig
    dtypes: dict[str, torch.dtype]
    frozen: list[str]


def _plan(model: ModelConfig, path: str, ds_config: dict | None, dtype: torch.dtype) -> _Plan:
    """Of names and shapes alone. Raises ValueError for weights that do not fit the configuration."""
    config = configuration(model, path)
    is_quantised = bool(getattr(config, "quantization_config", None))
    if ds_config and is_quantised:
        raise ValueError(
            f"the weights at {path} are quantised (quantization_config of config.json), and such a model is not "
            "sharded. Take the checkpoint in bf16, or write one with transformers' dequantize()"
        )
    kind: Kind = AutoModelForCausalLM
    if config.is_encoder_decoder:
        known = ENCODER_DECODERS[config.model_type]
        kind = _untied(known) if _has_own_head(model, path) else known
    if is_quantised:
        return _Plan(kind, config, {}, [])
    # What the code makes of the configuration, and then what it makes of the files.
    shape = blank(kind, config, dtype, model.trust_remote_code)
    frozen = [name for name, parameter in shape.named_parameters() if not parameter.requires_grad]
    if not model.random_weights:
        shape, found = rehearse(type(shape), path, config, dtype)
        check_fit(path, shape, found, keeps_all_layers=model.num_layers is None)
    return _Plan(kind, config, dtypes_of(shape), frozen)


def _made(plan: _Plan, model: ModelConfig, path: str, dtype: torch.dtype) -> PreTrainedModel:
    kind, config = plan.kind, plan.config
    if model.random_weights:
        return from_config(kind, config, dtype, model.trust_remote_code)
    with quiet():
        pair: Any = kind.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=model.trust_remote_code, output_loading_info=True
        )
    loaded, found = pair
    # What is left out was told already, but for a quantised model's. ZeRO-3's own way to read may miss some more.
    is_known = not getattr(config, "quantization_config", None)
    check_fit(path, loaded, {"missing_keys": found["missing_keys"]} if is_known else found, model.num_layers is None)
    return loaded


@contextmanager
def _told_plainly(model: ModelConfig, path: str) -> Iterator[None]:
    """Errors of transformers about a model's files as a ValueError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        told = f"the pickled weights at {path} hold more than tensors, and code in them is not run"
        raise ValueError(f"{told}; save them as safetensors") from error
    except (OSError, RuntimeError, StrictDataclassError) as error:
        raise ValueError(f"the model at {path or model.shape!r} could not be loaded: {error}") from error


def configuration(model: ModelConfig, path: str) -> PretrainedConfig:
    """The configuration that the model is loaded with: of its files, or of the settings' shape. Raises ValueError for
    fields that it does not know."""
    if model.random_weights and model.shape:
        shape = dict(model.shape)
        if "model_type" not in shape:
            raise ValueError(f"the shape of a random model has no model_type (for example 'llama'): {shape}")
        model_type = shape.pop("model_type")
        # transformers keeps any name, and reads only those that it knows.
        known = AutoConfig.for_model(model_type)
        for name in shape:
            if not hasattr(known, name):
                raise unknown(f"the shape's field of a {model_type}", name, sorted(vars(known)))
        config = AutoConfig.for_model(model_type, **shape)
    else:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    if (layers := model.num_layers) is not None:
        config.num_hidden_layers = layers  # attribute maps of transformers translate it (GPT-2's n_layer)
        if config.is_encoder_decoder:
            config.num_decoder_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    # An encoder-decoder model has to be one whose stacks are known, and its decoder starts with some id.
    if config.is_encoder_decoder:
        if config.model_type not in ENCODER_DECODERS:
            raise unknown("the encoder-decoder model's model_type", config.model_type, ENCODER_DECODERS)
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.pad_token_id  # as T5 was trained
    return config


def _has_own_head(model: ModelConfig, path: str) -> bool:
    """Whether an encoder-decoder model has a head beside its embeddings, as T5 v1.1 and mT5 have: its weights tell, or
    without any its configuration."""
    is_made = model.random_weights and model.shape
    if not model.random_weights and (names := _weight_names(path)):
        return {"lm_head.weight", "shared.weight"} <= names
    written = model.shape if is_made else PretrainedConfig.get_config_dict(path)[0]
    return written.get("tie_word_embeddings") is False


def _weight_names(path: str) -> set[str]:
    """Names of the tensors in the safetensors files of a folder; empty where it has none."""
    file = first_weights_file(Path(path), ["model.safetensors"])
    if file is None:
        return set()
    if file.name.endswith(".index.json"):
        return set(json.loads(file.read_text())["weight_map"])
    with safe_open(file, framework="pt") as weights:
        return set(weights.keys())


def _untied(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`kind` with a head of its own. transformers 5 ties every T5, unless the checkpoint's head differs from its
    embeddings. Under ZeRO-3 it compares what is left of two partitioned parameters, finds nothing equal to nothing, and
    drops the head."""
    ties = {name: source for name, source in (kind._tied_weights_keys or {}).items() if name != "lm_head.weight"}
    return type(kind.__name__, (kind,), {"_tied_weights_keys": ties})


def _is_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") != 1
