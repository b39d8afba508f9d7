"""What every section of settings can do: check itself, change one setting by its key, list all of them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from toolkit.settings.overrides import parsed, plain, typed, unknown
from toolkit.settings.setting import Setting

if TYPE_CHECKING:
    from toolkit.settings.run import RunConfig


class Entry(NamedTuple):
    """One setting of a config: its full key, its value there, and what is written beside it."""

    key: str
    value: Any
    setting: Setting


@dataclass(frozen=True)
class Section:
    """Settings of one subject, or a config that is made of such sections. The first paragraph of a section's docstring
    heads it in `--help` and in docs/configuration.md."""

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Names a keyword that is not a setting. Raises TypeError."""
        for name in given.keys() - {field.name for field in dataclasses.fields(cls)}:
            former = cls.former_names()
            if name in former:
                raise TypeError(f"{cls.__name__}({name}=...): this setting is now called {former[name]}")
            raise TypeError(str(unknown(f"{cls.__name__}: setting", name, [f.name for f in dataclasses.fields(cls)])))
        return super().__new__(cls)

    def validate(self, section: str) -> None:
        """Raises ValueError for the first setting that cannot work; `section` is where it stands, as in "train"."""
        for entry in self.own_entries(f"{section}." if section else ""):
            entry.setting.check(entry.key, entry.value)

    def check_with(self, run: RunConfig) -> None:
        """Raises ValueError for what cannot go together with settings of other sections of the run."""

    def after(self, name: str) -> dict[str, None]:
        """The settings of this section that no longer count once `name` is set, with null for each."""
        return {}

    @classmethod
    def former_names(cls) -> dict[str, str]:
        """Former name -> name, of the section's own settings that were renamed."""
        named = ((field.metadata.get("setting"), field.name) for field in dataclasses.fields(cls))
        return {setting.formerly: name for setting, name in named if setting and setting.formerly}

    @classmethod
    def with_present_names(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that an earlier version stored, sections as mappings, under the names that they have now."""
        former, hints = cls.former_names(), typing.get_type_hints(cls)
        return {
            former.get(name, name): hints[name].with_present_names(value)
            if isinstance(value, Mapping) and dataclasses.is_dataclass(hints.get(name)) else value
            for name, value in stored.items()
        }  # fmt: skip

    @property
    def sections(self) -> dict[str, Section]:
        """Name -> section, of those that this one is made of."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Section)}

    def parts(self, prefix: str = "") -> Iterator[tuple[str, Section]]:
        """This section and all below it, each after what stands before its settings' names, as in "student.init."."""
        yield prefix, self
        for name, section in self.sections.items():
            yield from section.parts(f"{prefix}{name}.")

    def own_entries(self, prefix: str = "") -> list[Entry]:
        """The settings that lie in this section itself, in the order in which they are written."""
        fields = [field for field in dataclasses.fields(self) if "setting" in field.metadata]
        return [Entry(prefix + f.name, getattr(self, f.name), f.metadata["setting"]) for f in fields]

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Every setting: those of this section, then those of the sections below it."""
        for name, section in self.parts(prefix):
            yield from section.own_entries(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, sections as dicts."""
        found: dict[str, Any] = plain(dataclasses.asdict(self))
        return found

    def with_settings(self, values: Mapping[str, Any]) -> Self:
        """`{"train.steps": 3, "name": "x"}` applied in order. Raises ValueError for unknown keys and wrong types."""
        config = self
        for key, value in values.items():
            config = config._with(key.split("."), value, key)
        return config

    def with_overrides(self, overrides: Sequence[str]) -> Self:
        """`["train.steps=3", "name=x"]` applied in order; values are YAML. Raises ValueError as `with_settings` does,
        and for what is not key=value."""
        config = self
        for text in overrides:
            key, value, as_typed = parsed(text)
            config = config._with(key.split("."), value, key, as_typed)
        return config

    def _with(self, keys: Sequence[str], value: Any, full_key: str, text: str | None = None) -> Self:
        """This section with `value` at the path `keys`, the last part of `full_key`.

        text: what `value` was read from, for settings that are text themselves: to YAML 1.10 is 1.1, and 0123 is 83.
        """
        # The key's first part names a section, to which the rest is left, or a setting.
        name, *rest = keys
        hints = typing.get_type_hints(type(self))
        if name not in hints:
            raise self._no_such_key(name, full_key)
        old, hint = getattr(self, name), hints[name]
        if isinstance(old, Section):
            return dataclasses.replace(self, **{name: old._with_part(rest, value, full_key, text)})
        if rest:
            if isinstance(old, dict):
                return dataclasses.replace(self, **{name: {**old, ".".join(rest): value}})
            raise ValueError(f"{full_key}: {name} is a single setting and has no key {'.'.join(rest)!r}")

        # A setting takes its own type, and undoes those that no longer count beside it.
        is_text = text is not None and hint in (str, str | None) and not isinstance(value, str | list | dict | None)
        found = typed(text if is_text else value, hint, full_key)
        undone = self.after(name) if found is not None else {}
        return dataclasses.replace(self, **undone | {name: found})

    def _with_part(self, keys: Sequence[str], value: Any, full_key: str, text: str | None) -> Self:
        """This section, which lies in another one, with one of its keys set, or with all that a mapping names."""
        if keys:
            return self._with(keys, value, full_key, text)
        if not isinstance(value, dict):
            first = dataclasses.fields(self)[0].name
            raise ValueError(f"{full_key} is a section; set one of its keys, as in {full_key}.{first}=...")
        config = self
        for key, part in value.items():
            config = config._with([key], part, f"{full_key}.{key}")
        return config

    def _no_such_key(self, name: str, full_key: str) -> ValueError:
        """The error for a key that is not here: says its present name, or its section, or the nearest name."""
        # A former name comes first, then a section that has a setting of this name, then what is spelled alike.
        names = [field.name for field in dataclasses.fields(self)]
        prefix = full_key[: full_key.rindex(name)]
        if name in self.former_names():
            return ValueError(f"config key {full_key!r} is now called {prefix}{self.former_names()[name]}")
        nested = {part: section.former_names().get(name, name) for part, section in self.sections.items()}
        found = [f"{prefix}{part}.{key}" for part, key in nested.items() if hasattr(self.sections[part], key)]
        if found:
            return ValueError(f"config key {full_key!r} belongs to a section; write {' or '.join(found)}")
        return unknown("config key", prefix + name, [prefix + other for other in names])
