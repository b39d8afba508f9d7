"""What differs between what is there and what is wanted, told name by name with both values."""

from collections.abc import Iterable, Mapping

#: how a file's contents, given as their SHA-256, are told to differ: 16 digits are enough for a reader
HASHES = "{} had SHA-256 {!s:.16}, has {!s:.16}"


def differences(
    before: Mapping[str, object], now: Mapping[str, object], form: str = "{} was {!r}, is {!r}"
) -> dict[str, str]:
    """name -> a line about it, for each name that has different values before and now; one that is missing has None.

    form: of the line, from the name and the two values.
    """
    return {
        name: form.format(name, before.get(name), now.get(name))
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }


def refuse(what: str, lines: Iterable[str], remedy: str) -> None:
    """Raises ValueError if there are any lines: `what` is wrong, each line on its own, and what the user can do."""
    if listed := "".join(f"\n  {line}" for line in lines):
        raise ValueError(f"{what}:{listed}\n{remedy}")
