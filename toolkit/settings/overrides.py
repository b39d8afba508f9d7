"""`key=value` from a command line: values are YAML, and take the type that a setting is annotated with."""

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

import yaml


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name not in a table: lists the known names, and the nearest where one is near."""
    known = list(known)
    near = "".join(f"; did you mean {one!r}?" for one in difflib.get_close_matches(str(name), known, n=1))
    return ValueError(f"{what} = {name!r} is not one of {', '.join(known)}{near}")


def parsed(text: str) -> tuple[str, Any, str]:
    """Key, value and the value as it was typed, of "key=value"; values are YAML. Raises ValueError for other text."""
    key, equals, given = (part.strip() for part in text.partition("="))
    if not equals:
        raise ValueError(f"{text!r} is not key=value; write for example data.max_length=256")
    try:
        value = yaml.safe_load(given) if given else ""
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {text!r} is not valid YAML: {error}") from None
    if isinstance(value, bool) and given.lower() not in ("true", "false"):
        value = given  # YAML reads off, on, yes and no as booleans; a schedule's policy is "off"
    return key, value, given


def typed(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type; an int is taken for a float, "5e-4" too (YAML reads that as text).

    Raises ValueError, naming `key`, for a value of another type.
    """
    # `wanted` is the type without `| None`, and `kind` is it without the type of its items.
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    wanted = next(o for o in options if o is not types.NoneType)
    kind = typing.get_origin(wanted) or wanted
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(typed(item, typing.get_args(wanted)[0], key) for item in value)

    # Numbers are taken for each other and for text where nothing is lost; true and false are none.
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    takes = str(hint).replace("<class ", "").replace(">", "")
    raise ValueError(f"{key} = {value!r} is a {type(value).__name__}; it takes {takes}")


def plain(value: Any) -> Any:
    """Nested dicts and lists as YAML writes them: tuples become lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value
