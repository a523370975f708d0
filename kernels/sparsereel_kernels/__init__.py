"""Block-sparse attention for PyTorch: BlockMask says which blocks of keys to visit, sparse_attention visits them.

Knows tensors, not models. `reference.py` is the definition; the backends are tested against it.
"""

from __future__ import annotations

from .attention import sparse_attention
from .block_mask import BlockMask
from .errors import BackendUnavailable
from .merge import merge_attention
from .modifiers import FrameDecay, KeyBias

__all__ = ["BackendUnavailable", "BlockMask", "FrameDecay", "KeyBias", "merge_attention", "sparse_attention"]
