"""The header of a GGUF file as a configuration, without the library, which reads every token of it: seconds.

Source: the format's specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"
#: type of a value -> how struct reads it
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
#: field of a configuration -> what stands for it behind the architecture's name
FIELDS = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "vocab_size": "vocab_size", "max_position_embeddings": "context_length",
}  # fmt: skip


def configuration(file: Path) -> dict[str, Any]:
    """What config.json would say of the model's shape. Raises ValueError for a file that is none, or has no shape."""
    try:
        with file.open("rb") as stream:
            fields, tensors = _header(stream)
    except (OSError, struct.error, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a GGUF file: {error!r}") from error
    kind = fields.get("general.architecture", "")
    found = {name: fields[f"{kind}.{key}"] for name, key in FIELDS.items() if f"{kind}.{key}" in fields}
    if "num_hidden_layers" not in found:
        raise ValueError(f"{file} does not say how many layers its {kind} model has; take the model's own folder")
    found["vocab_size"] = tensors.get("token_embd.weight", (0, found.get("vocab_size", 0)))[1]
    return {"model_type": kind, "tie_word_embeddings": "output.weight" not in tensors, **found}


def _header(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The fields that are no arrays, and the shape of each tensor, the innermost dimension first."""

    def number(form: str) -> Any:
        return struct.unpack(f"<{form}", stream.read(struct.calcsize(form)))[0]

    def text() -> str:
        return stream.read(number("Q")).decode()

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind != ARRAY:
            return number(SCALARS[kind])
        of, count = number("I"), number("Q")
        if of in SCALARS:
            stream.seek(count * struct.calcsize(SCALARS[of]), 1)
        else:
            for _ in range(count):
                value(of) if of == ARRAY else stream.seek(number("Q"), 1)
        return None

    if stream.read(4) != MAGIC:
        raise KeyError("it does not begin with GGUF")
    number("I")  # the version
    n_tensors, n_fields = number("Q"), number("Q")
    fields = {text(): value(number("I")) for _ in range(n_fields)}
    tensors = {}
    for _ in range(n_tensors):
        name = text()
        tensors[name] = tuple(number("Q") for _ in range(number("I")))
        number("I"), number("Q")  # its type, and where it lies
    return fields, tensors
