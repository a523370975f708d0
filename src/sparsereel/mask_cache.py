"""Block masks by pattern and grid: built once, then looked up."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns import Full, Pattern
from sparsereel_kernels import BlockMask

Block = tuple[int, int]
FIELDS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "partial_tile",
    "partial_bits",
)


class MaskCache:
    """Least recently used block masks are dropped first.

    Args:
        max_masks: Masks kept at most.
        max_bytes: Memory of all masks together; the newest mask is kept whatever its size.

    Safe to use from several threads. The key holds the patterns, grid, block, device and token order; the layer
    counts only for patterns that differ between layers.
    """

    def __init__(self, max_masks: int = 256, max_bytes: int = 4 * 2**30) -> None:
        if max_masks < 1 or max_bytes < 1:
            raise ValueError(f"a cache needs room, got max_masks={max_masks}, max_bytes={max_bytes}")
        self.max_masks = max_masks
        self.max_bytes = max_bytes
        self._masks: OrderedDict[Any, BlockMask] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(
        self,
        patterns: tuple[Pattern, ...],
        grid: TokenGrid,
        *,
        block: Block = (128, 64),
        device: torch.device | str = "cpu",
        layer: int = 0,
        order: Permutation | None = None,
    ) -> BlockMask | None:
        """The mask of one layer.

        Args:
            patterns: One a head.
            block: (query, key) tokens of a block.
            device: Where the mask's tensors are to be.
            layer: Number of the layer.
            order: Order of the tokens in the sequence; None = grid order.

        Returns:
            A mask with one head where all heads are alike, else with one for each; None where every head is full.

        Raises:
            ValueError: no patterns.
        """
        if not patterns:
            raise ValueError("patterns must hold one pattern a head, got none")
        heads = tuple(pattern.for_head(layer, head) for head, pattern in enumerate(patterns))
        if all(isinstance(pattern, Full) for pattern in heads):
            return None
        if all(pattern == heads[0] for pattern in heads):
            heads = heads[:1]
        key = (heads, grid, block, torch.device(device), order)
        # Building under the lock: two threads that want the same mask build it once.
        with self._lock:
            return self._get(*key)

    def _get(
        self, heads: tuple[Pattern, ...], grid: TokenGrid, block: Block, device: torch.device, order: Permutation | None
    ) -> BlockMask:
        key = (heads, grid, block, device, order)
        if key in self._masks:
            self._masks.move_to_end(key)
            return self._masks[key]
        if len(heads) == 1:
            mask = heads[0].block_mask(grid, block, order=order).to(device)
        else:
            # Layers mix the same few patterns: each is built once.
            alone = {pattern: self._get((pattern,), grid, block, device, order) for pattern in dict.fromkeys(heads)}
            mask = BlockMask.stack([alone[pattern] for pattern in heads])
        self._insert(key, mask)
        return mask

    def _insert(self, key: Any, mask: BlockMask) -> None:
        self._masks[key] = mask
        self._bytes += _size(mask)
        while len(self._masks) > 1 and (len(self._masks) > self.max_masks or self._bytes > self.max_bytes):
            _, dropped = self._masks.popitem(last=False)
            self._bytes -= _size(dropped)

    def __len__(self) -> int:
        return len(self._masks)

    def clear(self) -> None:
        """Drop all masks."""
        with self._lock:
            self._masks.clear()
            self._bytes = 0


def _size(mask: BlockMask) -> int:
    return sum(getattr(mask, name).nbytes for name in FIELDS)
