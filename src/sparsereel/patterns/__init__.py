"""Patterns: which tokens attend to which, one method a file.

    make("radial", decay=0.5)                     # by name, as YAML and the command line do
    Neighborhood(window=(3, 5, 5)) | Sink()       # by class; `&` and `|` combine
    pattern.token_mask(grid)                      # the definition, bool [S, S]
    pattern.block_mask(grid, block=(128, 64))     # the same as block lists, for the kernels

Every file draws itself: `python -m sparsereel.patterns.radial -o radial.png`.
"""

from __future__ import annotations

import sys
import warnings

from sparsereel.patterns.base import Pattern
from sparsereel.patterns.blocked import Blocked
from sparsereel.patterns.causal import Causal
from sparsereel.patterns.compose import AllOf, AnyOf, KeepSinks
from sparsereel.patterns.diagonal import Diagonal
from sparsereel.patterns.full import Full
from sparsereel.patterns.multi_diagonal import MultiDiagonal
from sparsereel.patterns.neighborhood import Neighborhood
from sparsereel.patterns.radial import Radial
from sparsereel.patterns.random_global import RandomGlobal
from sparsereel.patterns.registry import make, names
from sparsereel.patterns.sharded import Sharded
from sparsereel.patterns.sink import Sink
from sparsereel.patterns.sink_tokens import SinkTokens
from sparsereel.patterns.skip import Skip
from sparsereel.patterns.sliding_tile import SlidingTile
from sparsereel.patterns.spatial import Spatial
from sparsereel.patterns.temporal import Temporal
from sparsereel.patterns.vertical_stripe import VerticalStripe

# `python -m sparsereel.patterns.radial` runs a file that this package has imported already, which is meant here.
if sys.argv[:1] == ["-m"]:
    warnings.filterwarnings("ignore", message="'sparsereel.patterns", category=RuntimeWarning)

__all__ = [
    "AllOf",
    "AnyOf",
    "Blocked",
    "Causal",
    "Diagonal",
    "Full",
    "KeepSinks",
    "MultiDiagonal",
    "Neighborhood",
    "Pattern",
    "Radial",
    "RandomGlobal",
    "Sharded",
    "Sink",
    "SinkTokens",
    "Skip",
    "SlidingTile",
    "Spatial",
    "Temporal",
    "VerticalStripe",
    "make",
    "names",
]
