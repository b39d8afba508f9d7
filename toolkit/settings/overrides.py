"""`section.key=value` for nested frozen dataclasses: typed by their annotations, unknown keys refused by name.

A section may have `after(name)`: the values that its other settings take once `name` is set.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name not in a table: lists the known names, and the nearest where one is near."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return ValueError(
        f"{what} = {name!r} is not one of {', '.join(known)}" + (f"; did you mean {near[0]!r}?" if near else "")
    )


def with_overrides(config: Config, overrides: list[str]) -> Config:
    """`["train.steps=3", "name=x"]` applied in order to a dataclass of sections; values are YAML.

    Raises ValueError for an unknown key and for a value of another type.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not key=value; write for example data.max_length=256")
        try:
            parsed = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {text!r} is not valid YAML: {error}") from None
        if isinstance(parsed, bool) and value.strip().lower() not in ("true", "false"):
            parsed = value.strip()  # YAML reads off, on, yes and no as booleans; a schedule's policy is "off"
        config = _replaced(config, key.strip().split("."), parsed, key.strip(), value.strip())
    return config


def with_value(config: Config, key: str, value: Any) -> Config:
    """`config` with `value` at "section.key". Raises ValueError as `with_overrides` does."""
    return _replaced(config, key.split("."), value, key)


def _replaced(section: Any, keys: list[str], value: Any, full_key: str, text: str | None = None) -> Any:
    """text: what `value` was read from, for settings that are text themselves: to YAML 1.10 is 1.1, and 0123 is 83."""
    hints = typing.get_type_hints(type(section))
    if keys[0] not in hints:
        prefix = full_key[: len(full_key) - len(".".join(keys))]
        sections = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
        nested = [f"{prefix}{name}.{keys[0]}" for name in sections if keys[0] in _field_names(hints[name])]
        if nested:
            raise ValueError(f"config key {full_key!r} belongs to a section; write {' or '.join(nested)}")
        raise unknown("config key", prefix + keys[0], [prefix + name for name in hints])
    old, hint = getattr(section, keys[0]), hints[keys[0]]
    if dataclasses.is_dataclass(hint):
        if len(keys) > 1:
            return dataclasses.replace(section, **{keys[0]: _replaced(old, keys[1:], value, full_key, text)})
        if not isinstance(value, dict):
            raise ValueError(
                f"{full_key} is a section; set one of its keys, as in {full_key}.{_field_names(hint)[0]}=..."
            )
        for key, part in value.items():
            old = _replaced(old, [key], part, f"{full_key}.{key}")
        return dataclasses.replace(section, **{keys[0]: old})
    if len(keys) > 1:
        if isinstance(old, dict):
            return dataclasses.replace(section, **{keys[0]: {**old, ".".join(keys[1:]): value}})
        raise ValueError(f"{full_key}: {keys[0]} is a single setting and has no key {'.'.join(keys[1:])!r}")
    is_text = text is not None and hint in (str, str | None) and not isinstance(value, str | list | dict | None)
    typed = _typed(text if is_text else value, hint, full_key)
    undone = section.after(keys[0]) if hasattr(section, "after") and typed is not None else {}
    return dataclasses.replace(section, **undone | {keys[0]: typed})


def _field_names(hint: type) -> list[str]:
    return [f.name for f in dataclasses.fields(hint)]


def _typed(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type; an int is taken for a float, "5e-4" too (YAML reads that as text)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    wanted = next(o for o in options if o is not types.NoneType)
    if typing.get_origin(wanted) is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(item, typing.get_args(wanted)[0], key) for item in value)
    if wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif wanted is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    elif isinstance(wanted, type) and isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise ValueError(
        f"{key} = {value!r} is a {type(value).__name__}; it takes {hint}".replace("<class ", "").replace(">", "")
    )


def plain(value: Any) -> Any:
    """Nested dicts and lists as YAML writes them: tuples become lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value
