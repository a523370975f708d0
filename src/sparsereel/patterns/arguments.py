"""Checks of pattern arguments: each returns the cleaned value or raises ValueError with one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
AXES = ("frames", "height", "width")

# A size is a whole number of tokens, or a float: a fraction of what the grid has.
Size = int | float


def whole(name: str, value: Any, *, least: int) -> int:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def at_least_one(name: str, value: Any) -> int:
    """An integer of at least 1."""
    return whole(name, value, least=1)


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def size(name: str, value: Any, *, least: int = 1) -> Size:
    """An integer of at least `least`, or a float in (0, 1]: a fraction of what the grid has."""
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(f"{name} as a fraction of the grid must be above 0 and at most 1, got {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name} must be a whole number of at least {least} or a fraction of the grid in (0.0, 1.0], got {value!r}"
        )
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return str(value)


def axes(name: str, value: Any, check: Callable[[str, Any], T]) -> tuple[T, T, T]:
    """One value for all axes, or (frames, height, width)."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    if len(values) != 3:
        raise ValueError(f"{name} must be one value or three (frames, height, width), got {value!r}")
    first, second, third = (check(f"{name} ({axis})", v) for axis, v in zip(AXES, values, strict=True))
    return first, second, third


def three(value: Any) -> tuple[Any, Any, Any]:
    """The three axes of an argument that `axes` has checked."""
    frames, height, width = value
    return frames, height, width


def store(pattern: object, **values: Any) -> None:
    """Set the cleaned values of a frozen pattern."""
    for name, value in values.items():
        object.__setattr__(pattern, name, value)


def tokens(value: Size, length: int) -> int:
    """`value` in tokens of an axis of `length`; fractions are rounded to the nearest, at least 1."""
    if isinstance(value, int):
        return value
    return max(1, math.floor(value * length + 0.5))


def odd_units(value: float, length: int, unit: int) -> int:
    """The odd number of units (tiles, strides) nearest to the share `value` of an axis; at least 1."""
    wanted = value * length / unit
    return max(1, 2 * math.floor(wanted / 2) + 1)
