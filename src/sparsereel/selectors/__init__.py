"""Selectors: which blocks to visit for these q and k, one method a file.

make("xattention", threshold=0.9, refresh=4)      # by name, as YAML and the command line do
BlockTopk(density=0.1)                            # by class
refreshing(selector, q, k, context)               # what an attention layer calls: a Selection
"""

from __future__ import annotations

from sparsereel.selectors.base import Selection, SelectionContext, Selector
from sparsereel.selectors.block_topk import BlockTopk
from sparsereel.selectors.block_topp import BlockTopp
from sparsereel.selectors.refresh import refreshing
from sparsereel.selectors.registry import from_mapping, make, names

__all__ = [
    "BlockTopk",
    "BlockTopp",
    "Selection",
    "SelectionContext",
    "Selector",
    "from_mapping",
    "make",
    "names",
    "refreshing",
]
