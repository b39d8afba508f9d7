"""A model folder that older versions of transformers, and other users of the machine, read as the same model."""

import contextlib
import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: Three names that transformers 4 has, family by family: of the rotary base (of the layers with full attention, where
#: there are two), of the base of the layers with sliding attention, and of the share of a head that is rotated.
SPELLINGS = (
    ("rope_theta", None, "partial_rotary_factor"),
    ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"),
    ("rotary_emb_base", None, "rotary_pct"),
    ("global_rope_theta", "local_rope_theta", "partial_rotary_factor"),
)
#: families that in transformers 4 refuse a rope_scaling with anything but "type" and what that type needs
STRICT_SCALING = ("olmo", "olmo2", "phi3", "phi4_multimodal")
#: by family, a field's name in transformers 4 and in transformers 5
FORMER_FIELDS = {"qwen3_moe": {"num_experts": "num_local_experts"}}
#: by family, an entry of layer_types in transformers 5 and in transformers 4
FORMER_LAYER_TYPES = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
#: tokenizers that in transformers 4 add BOS and EOS as tokenizer_config.json says, and not as tokenizer.json does
ENDS_BY_SETTING = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer")


def make_portable(folder: Path) -> None:
    """Completes, in place, a model folder that transformers 5 has written. A second call changes nothing.

    - config.json holds rotary positions as `rope_parameters` alone. transformers 4 does not know that name, takes its
      defaults without a word, and its logits differ by whole units. Its own names are written beside it.
    - tokenizer_config.json holds names that transformers 4 refuses, and both versions know the older ones.
    - safetensors writes through a temporary file that only its owner may read. All files get the mode of config.json,
      which transformers opens as any program opens a new file: the umask decides.
    """
    config_file, tokenizer_file = folder / "config.json", folder / "tokenizer_config.json"
    text = config_file.read_text(encoding="utf-8")
    # Infinity is {"__float__": "Infinity"} in transformers 5. Both versions read what Python's json writes.
    config = json.loads(text, object_hook=lambda found: float(found["__float__"]) if "__float__" in found else found)
    _write(config_file, text, with_former_names(config))
    if tokenizer_file.is_file():
        text = tokenizer_file.read_text(encoding="utf-8")
        _write(tokenizer_file, text, _with_former_tokenizer(json.loads(text), folder / "tokenizer.json"))
    mode = config_file.stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_mode != mode:
            with contextlib.suppress(OSError):  # a file system without modes is no reason to lose an export
                file.chmod(mode)


def with_former_names(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a config.json of transformers 5, with what transformers 4 calls the same beside them. Names of
    rotary positions are added only where transformers 5 reads the same positions from them as from its own
    `rope_parameters`. It still reads files of transformers 4, and knows which family spells them how."""
    config = {name: with_former_names(part) if isinstance(part, dict) else part for name, part in config.items()}
    family = config.get("model_type", "")
    # Fields and kinds of layers that have another name.
    config |= {former: config[name] for former, name in FORMER_FIELDS.get(family, {}).items() if name in config}
    if family in FORMER_LAYER_TYPES and "layer_types" in config:
        config["layer_types"] = [FORMER_LAYER_TYPES[family].get(kind, kind) for kind in config["layer_types"]]
    # transformers 5 calls every T5 tied, and finds a head of its own among the weights. transformers 4 goes by
    # tie_word_embeddings, and scales what a tied decoder says. T5 1.1 and mT5 have their own head, and no scale.
    if family in ("t5", "mt5") and not config.get("scale_decoder_outputs", family == "t5"):
        config["tie_word_embeddings"] = False
    if not config.get("rope_parameters"):
        return config
    if family not in CONFIG_MAPPING:  # the family's code came with the model: only its own class can tell
        return next(_former_ropes(config)) | config
    if (ropes := _ropes_read(config)) is None:
        return config
    # Of the spellings, the first from which transformers 5 reads the same positions, alone and beside its own.
    not_bare = {"rope_parameters", "rope_scaling"}.union(*SPELLINGS)
    bare = {name: value for name, value in config.items() if name not in not_bare}
    for former in _former_ropes(config):
        if _ropes_read(bare | former) == _ropes_read(config | former) == ropes:
            return config | former
    return config


def _former_ropes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What transformers 4 may call the configuration's `rope_parameters`, the commonest spelling first."""
    ropes, is_strict = config["rope_parameters"], config.get("model_type") in STRICT_SCALING
    full, sliding = ropes, dict[str, Any]()
    if all(rope is None or isinstance(rope, dict) for rope in ropes.values()):  # by type of layer
        full = ropes.get("full_attention") or next(filter(None, ropes.values()))
        sliding = ropes.get("sliding_attention") or {}
    # What transformers 4 has in `rope_scaling`: everything but what stands beside it.
    kind = full.get("rope_type", "default")
    elsewhere = {"rope_type", "rope_theta", "partial_rotary_factor"} | (config.keys() if is_strict else set())
    scaling = {name: value for name, value in full.items() if name not in elsewhere}
    scaling |= {"type" if is_strict else "rope_type": kind}
    values = full.get("rope_theta"), sliding.get("rope_theta"), full.get("partial_rotary_factor")
    trained = {"original_max_position_embeddings": full.get("original_max_position_embeddings")}
    common = trained if kind == "longrope" else {}
    # A family that scales its positions by default has to be told where they are not scaled.
    for said, names in itertools.product([None, scaling] if kind == "default" else [scaling], SPELLINGS):
        found = dict(zip(names, values, strict=True)) | common | {"rope_scaling": said}
        yield {name: value for name, value in found.items() if name and value is not None}


def _ropes_read(config: dict[str, Any]) -> Any:
    """The `rope_parameters` that transformers 5 makes of these values, None where it refuses them."""
    values = copy.deepcopy(config)  # the class changes what it is given
    try:
        return _without_type(CONFIG_MAPPING[config["model_type"]].from_dict(values).rope_parameters)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError):
        return None


def _without_type(ropes: Any) -> Any:
    """`type` is the older name of `rope_type`, and is kept beside it."""
    if not isinstance(ropes, dict):
        return ropes
    return {name: _without_type(value) for name, value in ropes.items() if name != "type"}


def _with_former_tokenizer(config: dict[str, Any], tokenizer_file: Path) -> dict[str, Any]:
    """The values of a tokenizer_config.json of transformers 5, with names that transformers 4 knows as well."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # By default that class makes token_type_ids as well in transformers 4, which no decoder takes.
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a table of named tokens there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config.get("tokenizer_class") in ENDS_BY_SETTING and tokenizer_file.is_file():
        tokens = Tokenizer.from_file(str(tokenizer_file)).encode("a").tokens
        for name, place in (("bos_token", 0), ("eos_token", -1)):
            token = config.get(name)
            token = token["content"] if isinstance(token, dict) else token
            config.setdefault(f"add_{name}", tokens[place] == token)
    return config


def _write(file: Path, before: str, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"  # as transformers writes it
    if text != before:
        file.write_text(text, encoding="utf-8")
