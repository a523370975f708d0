"""Selectors by name: what YAML and the command line use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsereel.registry import Registry, tuples
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


REGISTRY: Registry[Selector] = Registry("selector", CLASSES, ordered_fields)
names = REGISTRY.names
make = REGISTRY.make


def from_mapping(mapping: Mapping[str, Any]) -> Selector:
    """The selector that plain data describes: `{selector: name, threshold: 0.9, refresh: 4}`.

    Raises:
        ValueError: no name; what `make` refuses.
    """
    arguments = {str(key): tuples(value) for key, value in mapping.items()}
    if not isinstance(arguments.get("selector"), str):
        raise ValueError(f"a selector needs its name, such as selector: {names()[0]}, got {dict(mapping)!r}")
    return make(arguments.pop("selector"), **arguments)
