"""What is written beside a setting: its meaning, unit, bounds and choices.

The checks, `--help` and docs/configuration.md all read these same words.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from toolkit.settings.overrides import plain, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What is written beside a setting.

    meaning: one or two sentences. unit: of a number, as in "rows".
    least, above, most, below: bounds of a number; `least` and `most` are allowed themselves.
    choices: the values it takes, or a function that returns them where they are costly to import.
    means: what some values stand for, as in {None: "all rows"}. These pass the check whatever the choices are.
    may_change: whether a run may go on from its checkpoint after the setting was changed.
    formerly: the name of the setting in earlier versions.
    """

    meaning: str
    unit: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: Sequence[str] | Callable[[], Sequence[str]] = ()
    means: Mapping[Any, str] = dataclasses.field(default_factory=dict)
    may_change: bool = False
    formerly: str = ""

    @property
    def bounds(self) -> str:
        """In words: "at least 0 and below 1"; empty without bounds."""
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        parts = [f"{word} {limit}" for word, limit in words.items() if limit is not None]
        return " and ".join(parts).replace("below inf", "finite").replace(str(2**64), "2**64")

    @property
    def known(self) -> Sequence[str]:
        """All of the choices."""
        return self.choices() if callable(self.choices) else self.choices

    @property
    def special(self) -> str:
        """What some values stand for, in words: "null: all rows"."""
        return "; ".join(f"{written(value)}: {meaning}" for value, meaning in self.means.items())

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError, naming the setting and both values, where `value` is not a choice or out of bounds."""
        if self.choices and value not in self.known and value not in self.means:
            raise unknown(name, value, self.known)
        if self.bounds and value is not None and not self._is_within(value):
            special = f" ({self.special})" if self.means else ""
            raise ValueError(f"{name} = {value}; it has to be {self.bounds}{special}")

    def _is_within(self, value: float) -> bool:
        """Whether the bounds hold; not a number is outside of all of them."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def setting(default: T, meaning: str, **beside: Any) -> T:
    """A field of a section with its default and all that `Setting` says of it; typed as the default is."""
    metadata = {"setting": Setting(meaning, **beside)}
    if isinstance(default, dict):
        return cast(T, dataclasses.field(default_factory=lambda: dict(default), metadata=metadata))
    return cast(T, dataclasses.field(default=default, metadata=metadata))


def written(value: Any) -> str:
    """A value as one types it after `key=`: null, true, [1, 2], text without quotes where it needs none."""
    if isinstance(value, str) and re.fullmatch(r"[^\s\"'{}\[\]]+", value):
        return value
    return json.dumps(plain(value))
