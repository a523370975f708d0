"""Selectors by name: what YAML and the command line use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from sparsereel.selectors.adaspa import Adaspa
from sparsereel.selectors.anchor import Anchor
from sparsereel.selectors.base import Selector, ordered_fields
from sparsereel.selectors.biformer import Biformer
from sparsereel.selectors.block_topk import BlockTopk
from sparsereel.selectors.block_topp import BlockTopp
from sparsereel.selectors.dhsa import Dhsa
from sparsereel.selectors.hip import Hip
from sparsereel.selectors.spargeattn import Spargeattn
from sparsereel.selectors.sparsed import Sparsed
from sparsereel.selectors.svg import Svg
from sparsereel.selectors.svg2 import Svg2
from sparsereel.selectors.vertical_slash import VerticalSlash
from sparsereel.selectors.vsa import Vsa
from sparsereel.selectors.xattention import Xattention

CLASSES: tuple[type[Any], ...] = (
    BlockTopk,
    BlockTopp,
    Spargeattn,
    Xattention,
    VerticalSlash,
    Svg,
    Svg2,
    Vsa,
    Sparsed,
    Adaspa,
    Hip,
    Biformer,
    Anchor,
    Dhsa,
)


def names() -> tuple[str, ...]:
    """The names that `make` knows."""
    return tuple(cls.name for cls in CLASSES)


def make(name: str, **arguments: Any) -> Selector:
    """The selector `name` with these arguments; hyphen and underscore are alike.

    Raises:
        ValueError: unknown name, unknown or missing arguments (the valid ones are listed), values out of range.
    """
    cls = next((cls for cls in CLASSES if cls.name == str(name).replace("-", "_")), None)
    if cls is None:
        raise ValueError(f"unknown selector {name!r}; the selectors are {', '.join(names())}")
    known = ordered_fields(cls)
    unknown = [argument for argument in arguments if argument not in [f.name for f in known]]
    missing = [f.name for f in known if f.default is MISSING and f.name not in arguments]
    if unknown or missing:
        problem = f"has no argument {unknown[0]!r}" if unknown else f"needs the argument {missing[0]!r}"
        raise ValueError(f"selector {cls.name} {problem}; its arguments are: {_signature(cls)}")
    try:
        selector: Selector = cls(**arguments)
    except ValueError as error:
        raise ValueError(f"selector {cls.name}: {error}") from None
    return selector


def from_mapping(mapping: Mapping[str, Any]) -> Selector:
    """The selector that plain data describes: `{selector: name, threshold: 0.9, refresh: 4}`.

    Raises:
        ValueError: no name; what `make` refuses.
    """
    arguments = {str(key): _tuples(value) for key, value in mapping.items()}
    if not isinstance(arguments.get("selector"), str):
        raise ValueError(f"a selector needs its name, such as selector: {names()[0]}, got {dict(mapping)!r}")
    return make(arguments.pop("selector"), **arguments)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _signature(cls: type[Any]) -> str:
    return ", ".join(f.name if f.default is MISSING else f"{f.name}={f.default}" for f in ordered_fields(cls))
