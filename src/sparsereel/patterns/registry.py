"""Patterns by name: what YAML and the command line use."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from sparsereel.patterns.base import Pattern
from sparsereel.patterns.blocked import Blocked
from sparsereel.patterns.causal import Causal
from sparsereel.patterns.diagonal import Diagonal
from sparsereel.patterns.full import Full
from sparsereel.patterns.multi_diagonal import MultiDiagonal
from sparsereel.patterns.neighborhood import Neighborhood
from sparsereel.patterns.radial import Radial
from sparsereel.patterns.random_global import RandomGlobal
from sparsereel.patterns.sharded import Sharded
from sparsereel.patterns.sink import Sink
from sparsereel.patterns.skip import Skip
from sparsereel.patterns.sliding_tile import SlidingTile
from sparsereel.patterns.spatial import Spatial
from sparsereel.patterns.temporal import Temporal
from sparsereel.patterns.vertical_stripe import VerticalStripe

CLASSES: tuple[type[Any], ...] = (
    Full,
    Skip,
    Neighborhood,
    SlidingTile,
    Radial,
    Spatial,
    Temporal,
    Sink,
    Causal,
    Diagonal,
    MultiDiagonal,
    VerticalStripe,
    Blocked,
    Sharded,
    RandomGlobal,
)


def names() -> tuple[str, ...]:
    """The names that `make` knows."""
    return tuple(cls.name for cls in CLASSES)


def make(name: str, **arguments: Any) -> Pattern:
    """The pattern `name` with these arguments; hyphen and underscore are alike.

    Raises:
        ValueError: unknown name, unknown or missing arguments (the valid ones are listed), values out of range.
    """
    cls = next((cls for cls in CLASSES if cls.name == str(name).replace("-", "_")), None)
    if cls is None:
        raise ValueError(f"unknown pattern {name!r}; the patterns are {', '.join(names())}")
    valid = [field.name for field in fields(cls)]
    unknown = [argument for argument in arguments if argument not in valid]
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in arguments]
    if unknown or missing:
        problem = f"has no argument {unknown[0]!r}" if unknown else f"needs the argument {missing[0]!r}"
        raise ValueError(f"pattern {cls.name} {problem}; its arguments are: {_signature(cls)}")
    try:
        pattern: Pattern = cls(**arguments)
    except ValueError as error:
        raise ValueError(f"pattern {cls.name}: {error}") from None
    return pattern


def _signature(cls: type[Any]) -> str:
    listed = (f.name if f.default is MISSING else f"{f.name}={f.default}" for f in fields(cls))
    return ", ".join(listed) or "none"
