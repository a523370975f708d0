"""Selectors: which blocks to visit for these q and k, one method a file.

make("xattention", threshold=0.9, refresh=4)      # by name, as YAML and the command line do
BlockTopk(density=0.1)                            # by class
refreshing(selector, q, k, context)               # what an attention layer calls: a Selection
"""

from __future__ import annotations

from sparsereel.selectors.adaspa import Adaspa
from sparsereel.selectors.anchor import Anchor
from sparsereel.selectors.base import Selection, SelectionContext, Selector
from sparsereel.selectors.biformer import Biformer
from sparsereel.selectors.block_topk import BlockTopk
from sparsereel.selectors.block_topp import BlockTopp
from sparsereel.selectors.dhsa import Dhsa
from sparsereel.selectors.hip import Hip
from sparsereel.selectors.refresh import refreshing
from sparsereel.selectors.registry import from_mapping, make, names
from sparsereel.selectors.spargeattn import Spargeattn
from sparsereel.selectors.sparsed import Sparsed
from sparsereel.selectors.svg import Svg
from sparsereel.selectors.svg2 import Svg2
from sparsereel.selectors.vertical_slash import VerticalSlash
from sparsereel.selectors.vsa import Vsa
from sparsereel.selectors.xattention import Xattention

__all__ = [
    "Adaspa",
    "Anchor",
    "Biformer",
    "BlockTopk",
    "BlockTopp",
    "Dhsa",
    "Hip",
    "Selection",
    "SelectionContext",
    "Selector",
    "Spargeattn",
    "Sparsed",
    "Svg",
    "Svg2",
    "VerticalSlash",
    "Vsa",
    "Xattention",
    "from_mapping",
    "make",
    "names",
    "refreshing",
]
