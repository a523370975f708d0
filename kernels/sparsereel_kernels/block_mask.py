"""BlockMask: for every block of queries, the blocks of keys to visit.

A query block lists its key blocks in ascending order, split in two: FULL blocks, where every pair may attend, and
PARTIAL blocks, whose pairs are told by packed bits. Lengths need not divide by the block; a block at the end of the
sequence is full when all of its pairs inside the sequence may attend. The lists decode to a dense mask like this:

    for j in full_kv_indices[b, h, i, : full_kv_num_blocks[b, h, i]]:
        dense[b, h, i * BQ : (i + 1) * BQ, j * BK : (j + 1) * BK] = True
    for n in range(kv_num_blocks[b, h, i]):
        tile = unpack_bits(partial_bits[partial_tile[b, h, i, n]])
        dense[b, h, i * BQ : (i + 1) * BQ, kv_indices[b, h, i, n] * BK : ...] = tile
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor

from . import block_lists as lists
from . import registry
from .bits import count_bits
from .cells import count_cells, live_cells

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    from .block_lists import TransposedLists

T = TypeVar("T")

DEFAULT_BLOCK = (128, 64)
TENSORS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "partial_tile",
    "partial_bits",
)


class BlockMask:
    """Which key blocks each query block visits. Immutable; compared and hashed by identity.

    Build one with `from_lists`, `from_dense`, `from_block_map` or `from_flex`. B and H below are 1 (alike for all) or
    the real numbers of samples and heads.

    Attributes:
        seq_lengths: (Sq, Skv) in tokens.
        BLOCK_SIZE: (query, key) block in tokens, each a multiple of 8 from 8 to 1024.
        kv_num_blocks: [B, H, nQ] int32, number of partial key blocks of each query block.
        kv_indices: [B, H, nQ, maxP] int32, their ascending indices; entries past the count are 0.
        full_kv_num_blocks: [B, H, nQ] int32, number of full key blocks.
        full_kv_indices: [B, H, nQ, maxF] int32.
        partial_tile: [B, H, nQ, maxP] int32, row of `partial_bits` for each partial block; tiles may be shared.
        partial_bits: [U, BQ, BK // 8] uint8; bit c % 8 of byte [r, c // 8] is set where row r of the block may attend
            to its column c. Bits outside the sequence are 0.
        name: 0-d int64 CPU tensor that stands for this mask in compiled graphs (see registry.py).
    """

    seq_lengths: tuple[int, int]
    BLOCK_SIZE: tuple[int, int]
    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    partial_tile: Tensor
    partial_bits: Tensor
    name: Tensor

    def __init__(self, seq_lengths: tuple[int, int], block: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Takes the six tensors as they are: use `from_lists`, which checks them."""
        self.__dict__.update(tensors, seq_lengths=seq_lengths, BLOCK_SIZE=block, _cache={})
        self.__dict__["name"] = registry.register(self)

    def __setattr__(self, key: str, value: object) -> NoReturn:
        raise AttributeError(f"BlockMask is immutable: cannot set {key!r}")

    def __delattr__(self, key: str) -> NoReturn:
        raise AttributeError(f"BlockMask is immutable: cannot delete {key!r}")

    def __copy__(self) -> BlockMask:
        return self

    def __deepcopy__(self, memo: object) -> BlockMask:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockMask, (self.seq_lengths, self.BLOCK_SIZE, self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """The six tensors by name."""
        return {key: getattr(self, key) for key in TENSORS}

    def cached(self, key: str, make: Callable[[], T]) -> T:
        """`make()` once. Values are functions of the mask alone, so that two threads at worst compute them twice."""
        cache: dict[str, Any] = self.__dict__["_cache"]
        if key not in cache:
            cache[key] = make()
        return cache[key]

    # ------------------------------------------------------------ construction

    @classmethod
    def from_lists(
        cls,
        seq_lengths: tuple[int, int],
        BLOCK_SIZE: tuple[int, int] = DEFAULT_BLOCK,
        *,
        kv_num_blocks: Tensor | None = None,
        kv_indices: Tensor | None = None,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        partial_tile: Tensor | None = None,
        partial_bits: Tensor | None = None,
    ) -> BlockMask:
        """A mask from its lists (shapes: see the class); the partial or the full ones may be left out.

        Integer tensors of any width are taken; lists longer than the longest count are trimmed, and entries past the
        counts may hold anything.

        Raises:
            ValueError: shapes, devices or dtypes disagree; an index outside the blocks or out of order; a block that
                is both full and partial; a tile that does not exist; bits set outside the sequence.
        """
        q_len, kv_len = lists.check_lengths(seq_lengths)
        block = lists.check_block(BLOCK_SIZE)
        given = (kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, partial_tile, partial_bits)
        tensors = lists.normalise((q_len, kv_len), block, dict(zip(TENSORS, given, strict=True)))
        lists.check_lists((q_len, kv_len), block, tensors)
        return cls((q_len, kv_len), block, tensors)

    @classmethod
    def from_dense(cls, mask: Tensor, block: tuple[int, int] = DEFAULT_BLOCK) -> BlockMask:
        """The blocks of a dense mask.

        Args:
            mask: bool [Sq, Skv], [H, Sq, Skv] or [B, H, Sq, Skv]; True = may attend.
            block: (query, key) block in tokens.

        Raises:
            ValueError: not bool, another number of dimensions, or a block that is not allowed.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim not in (2, 3, 4):
            given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor [Sq, Skv], [H, Sq, Skv] or [B, H, Sq, Skv], got {given}")
        dense = mask[(None,) * (4 - mask.ndim)]
        lengths = lists.check_lengths((dense.shape[2], dense.shape[3]))
        block = lists.check_block(block)
        return cls.from_block_map(*lists.blocks_of_dense(dense, block), lengths, block)

    @classmethod
    def from_block_map(
        cls, block_map: Tensor, bits: Tensor, seq_lengths: tuple[int, int], block: tuple[int, int] = DEFAULT_BLOCK
    ) -> BlockMask:
        """A mask from a table of blocks; tiles that turn out full or empty, unused or equal are tidied away.

        Args:
            block_map: int [B, H, nQ, nK]: EMPTY (-1), FULL (-2) or a row of `bits`.
            bits: [U, BQ, BK // 8] uint8; bits outside the sequence are cleared.
            seq_lengths: (Sq, Skv) in tokens.
            block: (query, key) block in tokens.

        Raises:
            ValueError: a shape does not fit the lengths, or a tile does not exist.
        """
        lengths, block = lists.check_lengths(seq_lengths), lists.check_block(block)
        lists.check_block_map(block_map, bits, lengths, block)
        tidy = lists.tidy_block_map(block_map.to(torch.int32), bits, lengths, block)
        return cls(lengths, block, lists.lists_of_map(*tidy))

    @classmethod
    def stack(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """One mask whose heads are the heads of `masks`, one after the other: different heads in one launch.

        Raises:
            ValueError: no masks, or lengths, blocks, batch sizes or devices that differ.
        """
        masks = list(masks)
        if not masks:
            raise ValueError("BlockMask.stack needs at least one mask, got none")
        first = masks[0]
        for other in masks[1:]:
            lists.check_alike(first, other, "BlockMask.stack")
        if len(masks) == 1:
            return first
        return cls(first.seq_lengths, first.BLOCK_SIZE, lists.stack_lists([mask.tensors() for mask in masks]))

    @classmethod
    def from_flex(cls, mask: FlexBlockMask) -> BlockMask:
        """The same mask from FlexAttention's BlockMask; its `mask_mod` is evaluated on the partial blocks.

        Raises:
            ValueError: a block size that is not a multiple of 8 from 8 to 1024.
        """
        from .flex_masks import from_flex

        return from_flex(mask)

    def to_flex(self) -> FlexBlockMask:
        """FlexAttention's BlockMask with the same lists and a `mask_mod` that reads the packed bits."""
        from .flex_masks import to_flex

        return self.cached("flex", lambda: to_flex(self))

    # ------------------------------------------------------------ what it says

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Sq, Skv); B and H are 1 where all samples or heads are alike."""
        return (*self.kv_num_blocks.shape[:2], *self.seq_lengths)

    @property
    def device(self) -> torch.device:
        """Where the lists lie."""
        return self.kv_num_blocks.device

    @property
    def nbytes(self) -> int:
        """Memory of the lists and tiles, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def has_partial(self) -> bool:
        """Whether any block is partial."""
        return self.kv_indices.shape[-1] > 0

    @property
    def density(self) -> float:
        """Share of key blocks visited, 0 to 1. Reads the device once, then is remembered."""
        return self.cached("density", lambda: self._visited() / max(1, self._block_count()))

    @property
    def token_density(self) -> float:
        """Share of (query, key) pairs allowed, 0 to 1. Reads the device once, then is remembered."""
        batch, heads, q_len, kv_len = self.shape
        return self.cached("token_density", lambda: self._pairs() / max(1, batch * heads * q_len * kv_len))

    @property
    def cell_density(self) -> float:
        """Share of cells (at most 12 queries x 16 keys, see cells.py) with an allowed pair: what the CPU kernels do.

        Reads the device once, then is remembered.
        """
        return self.cached("cell_density", lambda: self._live_cells() / max(1, self._block_count()))

    def _live_cells(self) -> float:
        """In whole blocks."""
        live = float(self.full_kv_num_blocks.sum())
        if self.has_partial:
            partial = lists.valid_entries(self.kv_num_blocks, self.kv_indices)
            counted = (live_cells(self.partial_bits)[self.partial_tile.long()] * partial).sum()
            live += float(counted) / count_cells(self.BLOCK_SIZE)
        return live

    def _block_count(self) -> int:
        q_blocks, k_blocks = lists.block_counts(self.seq_lengths, self.BLOCK_SIZE)
        return self.shape[0] * self.shape[1] * q_blocks * k_blocks

    def _visited(self) -> int:
        return int(self.kv_num_blocks.sum() + self.full_kv_num_blocks.sum())

    def _pairs(self) -> int:
        rows, columns = lists.block_extents(self.seq_lengths, self.BLOCK_SIZE, self.device)
        full = lists.valid_entries(self.full_kv_num_blocks, self.full_kv_indices)
        allowed = (columns[self.full_kv_indices.long()] * full).sum(-1).mul(rows).sum()
        if self.has_partial:
            partial = lists.valid_entries(self.kv_num_blocks, self.kv_indices)
            allowed = allowed + (count_bits(self.partial_bits)[self.partial_tile.long()] * partial).sum()
        return int(allowed)

    def __repr__(self) -> str:
        """Sizes and both densities (read from the device on first use)."""
        batch, heads, q_len, kv_len = self.shape
        block = "×".join(map(str, self.BLOCK_SIZE))
        return (
            f"BlockMask({batch}×{heads} heads, {q_len}×{kv_len} tokens, block {block}, density {self.density:.3g}, "
            f"token density {self.token_density:.3g}, {self.device})"
        )

    def block_map(self) -> Tensor:
        """Int32 [B, H, nQ, nK]: EMPTY (-1), FULL (-2) or a row of `partial_bits`. Memory: one number a block pair."""
        return lists.map_of_lists(self.tensors(), lists.block_counts(self.seq_lengths, self.BLOCK_SIZE)[1])

    def to_dense(self) -> Tensor:
        """Bool [B, H, Sq, Skv], True = may attend. Memory grows with the square of the length."""
        return lists.dense_of_map(self.block_map(), self.partial_bits, self.seq_lengths)

    # ------------------------------------------------------------ other masks

    def head(self, head: int) -> BlockMask:
        """The mask of one head (H = 1). A mask that is alike for all heads gives itself.

        Raises:
            ValueError: no such head.
        """
        heads = self.shape[1]
        if heads == 1 and head >= 0:
            return self
        if not 0 <= head < heads:
            raise ValueError(f"head must be 0 to {heads - 1}, got {head}")
        tensors = {
            key: value if key == "partial_bits" else value[:, head : head + 1] for key, value in self.tensors().items()
        }
        return BlockMask(self.seq_lengths, self.BLOCK_SIZE, lists.trim(tensors))

    def cut(self, queries: tuple[int, int] | None = None, keys: tuple[int, int] | None = None) -> BlockMask:
        """The part of the mask for some of the queries and some of the keys, for shards; made once.

        Args:
            queries, keys: (start, stop) in tokens, anywhere; None = all. The new mask counts from the starts.

        Raises:
            ValueError: a range that does not lie inside the mask.
        """
        from .cut import cut_mask

        rows = (0, self.seq_lengths[0]) if queries is None else queries
        columns = (0, self.seq_lengths[1]) if keys is None else keys
        return self.cached(f"cut {rows} {columns}", lambda: cut_mask(self, rows, columns))

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask on `device`; itself where it is there already."""
        target = torch.empty(0, device=device).device
        if target == self.device:
            return self
        moved = {key: value.to(target) for key, value in self.tensors().items()}
        return BlockMask(self.seq_lengths, self.BLOCK_SIZE, moved)

    def __and__(self, other: BlockMask) -> BlockMask:
        """Pairs that both masks allow."""
        return self._combine(other, "and")

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs that either mask allows."""
        return self._combine(other, "or")

    def _combine(self, other: BlockMask, rule: str) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        lists.check_alike(self, other, "&" if rule == "and" else "|", broadcast=True)
        maps = self.block_map(), other.block_map()
        combined = lists.combine_maps(*maps, self.partial_bits, other.partial_bits, rule)
        return BlockMask.from_block_map(*combined, self.seq_lengths, self.BLOCK_SIZE)

    # ------------------------------------------------------------ for kernels

    @property
    def launch_order(self) -> Tensor:
        """Int32 [H]: heads from the most to the fewest visited blocks, so that a launch does not end on a long one."""

        def order() -> Tensor:
            visited = (self.kv_num_blocks + self.full_kv_num_blocks).sum((0, 2))
            return visited.argsort(descending=True, stable=True).to(torch.int32)

        return self.cached("launch_order", order)

    def transposed(self) -> TransposedLists:
        """The lists by key block (which query blocks visit it), for backward kernels; made once."""
        return self.cached("transposed", lambda: lists.transpose_map(self.block_map()))
