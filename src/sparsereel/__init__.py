"""Training-free sparse attention for diffusers image and video models.

import sparsereel
sparsereel.sparsify(pipe, "radial")   # a preset, a plan file, a plan, a pattern or a selector
video = pipe("a cat surfing").frames[0]
print(sparsereel.report(pipe))
sparsereel.restore(pipe)
"""

from __future__ import annotations

import importlib
from typing import Any

from sparsereel import patterns, selectors
from sparsereel.extend import extend
from sparsereel.grid import Permutation, Segment, TokenGrid
from sparsereel.inject import report, restore, sparsified, sparsify
from sparsereel.plan import AttentionPlan
from sparsereel.report import LayerReport, Report
from sparsereel.search import search
from sparsereel.stream import stream
from sparsereel.tune import tune
from sparsereel_kernels import BackendUnavailable, BlockMask, FrameDecay, KeyBias, sparse_attention

__version__ = "0.1.0"

__all__ = [
    "AttentionPlan",
    "BackendUnavailable",
    "BlockMask",
    "FrameDecay",
    "KeyBias",
    "LayerReport",
    "Permutation",
    "Report",
    "Segment",
    "TokenGrid",
    "__version__",
    "extend",
    "minireel",
    "patterns",
    "report",
    "restore",
    "search",
    "selectors",
    "sparse_attention",
    "sparsified",
    "sparsify",
    "stream",
    "tune",
]


def __getattr__(name: str) -> Any:
    # minireel is a submodule that some never touch.
    if name == "minireel":
        return importlib.import_module("sparsereel.minireel")
    raise AttributeError(f"module 'sparsereel' has no attribute {name!r}")
