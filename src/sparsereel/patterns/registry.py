"""Patterns by name: what YAML and the command line use."""

from __future__ import annotations

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
from sparsereel.patterns.sink_tokens import SinkTokens
from sparsereel.patterns.skip import Skip
from sparsereel.patterns.sliding_tile import SlidingTile
from sparsereel.patterns.spatial import Spatial
from sparsereel.patterns.temporal import Temporal
from sparsereel.patterns.vertical_stripe import VerticalStripe
from sparsereel.registry import Registry

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
    SinkTokens,
)


REGISTRY: Registry[Pattern] = Registry("pattern", CLASSES)
names = REGISTRY.names
make = REGISTRY.make
