"""Lists and tables behind BlockMask: checks and conversions, vectorised over blocks.

A *block map* is int32 [B, H, nQ, nK] with EMPTY, FULL or the row of a tile in every place: small (one number for
thousands of pairs) and easy to combine. Lists are what kernels read. Nothing here loops over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import count_bits, edge_tile, merge_equal_tiles, pack_bits, unpack_bits

if TYPE_CHECKING:
    from .block_mask import BlockMask

EMPTY, FULL = -1, -2
MAX_LENGTH = 2**31 - 1


@dataclass(frozen=True, eq=False)
class TransposedLists:
    """For every key block, the query blocks that visit it.

    Attributes:
        q_num_blocks, q_indices, partial_tile: [B, H, nK], [B, H, nK, maxP] twice: partial query blocks and tiles.
        full_q_num_blocks, full_q_indices: [B, H, nK], [B, H, nK, maxF]: full query blocks.
    """

    q_num_blocks: Tensor
    q_indices: Tensor
    partial_tile: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


# ---------------------------------------------------------------- sizes


def check_lengths(seq_lengths: Any) -> tuple[int, int]:
    """(Sq, Skv) as plain ints; ValueError unless both lie in 0 .. 2**31 - 1."""
    lengths = tuple(int(n) for n in seq_lengths)
    if len(lengths) != 2 or not all(0 <= n <= MAX_LENGTH for n in lengths):
        raise ValueError(f"seq_lengths must be (queries, keys), each 0 to {MAX_LENGTH}, got {tuple(seq_lengths)}")
    return lengths[0], lengths[1]


def check_block(block: Any) -> tuple[int, int]:
    """(query, key) block as plain ints; ValueError unless each is a multiple of 8 from 8 to 1024."""
    sizes = tuple(int(n) for n in block)
    if len(sizes) != 2 or not all(8 <= n <= 1024 and n % 8 == 0 for n in sizes):
        raise ValueError(f"block must be (query, key) tokens, each a multiple of 8 from 8 to 1024, got {tuple(block)}")
    return sizes[0], sizes[1]


def block_counts(seq_lengths: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """(nQ, nK): blocks along queries and keys."""
    return -(-seq_lengths[0] // block[0]), -(-seq_lengths[1] // block[1])


def block_extents(seq_lengths: tuple[int, int], block: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [nQ] rows and [nK] columns of each block that lie inside the sequence."""
    extents = []
    for length, size, count in zip(seq_lengths, block, block_counts(seq_lengths, block), strict=True):
        starts = torch.arange(count, device=device) * size
        extents.append((length - starts).clamp(max=size))
    return extents[0], extents[1]


# ---------------------------------------------------------------- checks


def normalise(
    seq_lengths: tuple[int, int], block: tuple[int, int], given: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """The six tensors of a mask with absent ones filled in, int32, trimmed, and 0 past the counts."""
    present = [x for x in given.values() if x is not None]
    if not present or not all(isinstance(x, Tensor) for x in present):
        raise ValueError("from_lists needs tensors: the full lists, the partial lists, or both")
    if len({x.device for x in present}) > 1:
        raise ValueError(f"lists must lie on one device, got {sorted({str(x.device) for x in present})}")
    counts = given["kv_num_blocks"] if given["kv_num_blocks"] is not None else given["full_kv_num_blocks"]
    if counts is None:
        raise ValueError("from_lists needs kv_num_blocks or full_kv_num_blocks")
    empty = {
        "kv_num_blocks": torch.zeros_like(counts),
        "kv_indices": counts.new_zeros(*counts.shape, 0),
        "full_kv_num_blocks": torch.zeros_like(counts),
        "full_kv_indices": counts.new_zeros(*counts.shape, 0),
        "partial_tile": counts.new_zeros(*counts.shape, 0),
        "partial_bits": torch.zeros(0, block[0], block[1] // 8, dtype=torch.uint8, device=counts.device),
    }
    tensors = {key: value if value is not None else empty[key] for key, value in given.items()}
    _check_shapes(seq_lengths, block, tensors)
    for key in tensors.keys() - {"partial_bits"}:
        tensors[key] = tensors[key].to(torch.int32)
    return trim(tensors)


def _check_shapes(seq_lengths: tuple[int, int], block: tuple[int, int], tensors: dict[str, Tensor]) -> None:
    nq, _ = block_counts(seq_lengths, block)
    shape = tuple(tensors["kv_num_blocks"].shape)
    if len(shape) != 3 or shape[2] != nq or 0 in shape[:2]:
        raise ValueError(
            f"kv_num_blocks must be [B, H, {nq}] for {seq_lengths[0]} queries in blocks of {block[0]}, "
            f"got {list(shape)}"
        )
    for key in ("full_kv_num_blocks", "kv_indices", "full_kv_indices", "partial_tile"):
        found = tuple(tensors[key].shape)
        fits = found == shape if key == "full_kv_num_blocks" else len(found) == 4 and found[:3] == shape
        if not fits:
            raise ValueError(f"{key} must begin with the shape {list(shape)} of kv_num_blocks, got {list(found)}")
    if tensors["partial_tile"].shape != tensors["kv_indices"].shape:
        raise ValueError(
            f"partial_tile must have the shape of kv_indices, got {list(tensors['partial_tile'].shape)} "
            f"and {list(tensors['kv_indices'].shape)}"
        )
    _check_tiles(tensors["partial_bits"], block)
    for key in tensors.keys() - {"partial_bits"}:
        if tensors[key].dtype.is_floating_point or tensors[key].dtype in (torch.bool, torch.complex64):
            raise ValueError(f"{key} must hold integers, got {tensors[key].dtype}")


def _check_tiles(bits: Tensor, block: tuple[int, int]) -> None:
    if bits.dtype != torch.uint8 or bits.ndim != 3 or tuple(bits.shape[1:]) != (block[0], block[1] // 8):
        raise ValueError(
            f"partial_bits must be uint8 [tiles, {block[0]}, {block[1] // 8}], got {bits.dtype} {list(bits.shape)}"
        )


def check_lists(seq_lengths: tuple[int, int], block: tuple[int, int], tensors: dict[str, Tensor]) -> None:
    """ValueError unless counts, indices and tiles exist, ascend and do not overlap."""
    nk = block_counts(seq_lengths, block)[1]
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        _check_index_list(tensors[counts], tensors[indices], counts, indices, nk)
    valid = valid_entries(tensors["kv_num_blocks"], tensors["kv_indices"])
    tiles = tensors["partial_bits"].shape[0]
    _check_range(tensors["partial_tile"][valid], "partial_tile", tiles, "tiles")
    block_map = map_of_lists(tensors, nk)
    listed = int(tensors["kv_num_blocks"].sum() + tensors["full_kv_num_blocks"].sum())
    if int((block_map != EMPTY).sum()) != listed:
        raise ValueError("a key block is listed both as full and as partial for one query block")
    _check_edges(block_map, tensors["partial_bits"], seq_lengths, block)


def _check_index_list(counts: Tensor, indices: Tensor, counts_name: str, name: str, blocks: int) -> None:
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > indices.shape[-1]):
        raise ValueError(
            f"{counts_name} must lie in 0 to {indices.shape[-1]} (the width of {name}), "
            f"got {int(counts.min())} to {int(counts.max())}"
        )
    valid = valid_entries(counts, indices)
    _check_range(indices[valid], name, blocks, "key blocks")
    if bool(((indices[..., 1:] <= indices[..., :-1]) & valid[..., 1:]).any()):
        raise ValueError(f"{name} must ascend without repeats within each query block")


def _check_range(values: Tensor, name: str, limit: int, what: str) -> None:
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= limit):
        raise ValueError(f"{name} must lie in 0 to {limit - 1} ({limit} {what}), got {values.min()} to {values.max()}")


def _check_edges(block_map: Tensor, bits: Tensor, seq_lengths: tuple[int, int], block: tuple[int, int]) -> None:
    if not torch.equal(_cut_edges(block_map, bits, seq_lengths, block)[0], block_map):
        raise ValueError(
            f"partial_bits has bits set outside the sequence of {seq_lengths[0]} queries and {seq_lengths[1]} keys"
        )


def check_block_map(block_map: Tensor, bits: Tensor, seq_lengths: tuple[int, int], block: tuple[int, int]) -> None:
    """ValueError unless map and tiles fit the lengths."""
    counts = block_counts(seq_lengths, block)
    if block_map.ndim != 4 or tuple(block_map.shape[2:]) != counts:
        raise ValueError(f"block_map must be [B, H, {counts[0]}, {counts[1]}], got {list(block_map.shape)}")
    _check_tiles(bits, block)
    if block_map.numel() and (int(block_map.min()) < FULL or int(block_map.max()) >= bits.shape[0]):
        raise ValueError(
            f"block_map must lie in {FULL} to {bits.shape[0] - 1} ({bits.shape[0]} tiles), "
            f"got {int(block_map.min())} to {int(block_map.max())}"
        )


def check_alike(a: BlockMask, b: BlockMask, what: str, *, broadcast: bool = False) -> None:
    """ValueError unless two masks can be put together."""
    kinds: dict[str, tuple[object, object]] = {
        "seq_lengths": (a.seq_lengths, b.seq_lengths),
        "block": (a.BLOCK_SIZE, b.BLOCK_SIZE),
        "device": (a.device, b.device),
    }
    for name, (left, right) in kinds.items():
        if left != right:
            raise ValueError(f"{what} needs masks of one {name}, got {left} and {right}")
    sizes = {"batch": (a.shape[0], b.shape[0])}
    if broadcast:
        sizes["heads"] = (a.shape[1], b.shape[1])
    for name, pair in sizes.items():
        if pair[0] != pair[1] and not (broadcast and 1 in pair):
            raise ValueError(f"{what} needs masks of one {name}, got {pair[0]} and {pair[1]}")


# ---------------------------------------------------------------- lists <-> map


def valid_entries(counts: Tensor, indices: Tensor) -> Tensor:
    """Bool like `indices`: entries before the count."""
    return torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]


def trim(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lists cut to the longest count, with 0 past each count."""
    trimmed = dict(tensors)
    listed = {"kv_num_blocks": ("kv_indices", "partial_tile"), "full_kv_num_blocks": ("full_kv_indices",)}
    for counts, names in listed.items():
        longest = int(tensors[counts].max()) if tensors[counts].numel() else 0
        for name in names:
            cut = tensors[name][..., : max(0, longest)]
            trimmed[name] = torch.where(valid_entries(tensors[counts], cut), cut, 0).contiguous()
        trimmed[counts] = tensors[counts].contiguous()
    return trimmed


def map_of_lists(tensors: dict[str, Tensor], k_blocks: int) -> Tensor:
    """The block map [B, H, nQ, nK] of a mask's lists."""
    counts = tensors["kv_num_blocks"]
    block_map = torch.full((counts.numel(), k_blocks), EMPTY, dtype=torch.int32, device=counts.device)
    full = valid_entries(tensors["full_kv_num_blocks"], tensors["full_kv_indices"]).flatten(0, 2)
    row, slot = full.nonzero().unbind(1)
    block_map[row, tensors["full_kv_indices"].flatten(0, 2)[row, slot].long()] = FULL
    partial = valid_entries(counts, tensors["kv_indices"]).flatten(0, 2)
    row, slot = partial.nonzero().unbind(1)
    column = tensors["kv_indices"].flatten(0, 2)[row, slot].long()
    block_map[row, column] = tensors["partial_tile"].flatten(0, 2)[row, slot]
    return block_map.view(*counts.shape, k_blocks)


def lists_of_map(block_map: Tensor, bits: Tensor) -> dict[str, Tensor]:
    """The six tensors of a mask from its block map."""
    full_counts, full_indices, _ = index_lists(block_map == FULL, block_map)
    counts, indices, tile = index_lists(block_map >= 0, block_map)
    return {
        "kv_num_blocks": counts,
        "kv_indices": indices,
        "full_kv_num_blocks": full_counts,
        "full_kv_indices": full_indices,
        "partial_tile": tile,
        "partial_bits": bits,
    }


def index_lists(present: Tensor, block_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the True places of each row, in ascending order.

    Args:
        present: bool [B, H, N, M].
        block_map: int32 [B, H, N, M].

    Returns:
        int32 counts [B, H, N], columns [B, H, N, longest] and the map's values there; 0 past the counts.
    """
    counts = present.sum(-1, dtype=torch.int32)
    row, column = present.flatten(0, 2).nonzero().unbind(1)
    starts = counts.flatten().cumsum(0) - counts.flatten()
    slot = torch.arange(row.shape[0], device=row.device) - starts[row]
    longest = int(counts.max()) if counts.numel() else 0
    columns = counts.new_zeros(counts.numel(), longest)
    values = torch.zeros_like(columns)
    columns[row, slot] = column.to(torch.int32)
    values[row, slot] = block_map.flatten(0, 2)[row, column]
    shape = (*counts.shape, longest)
    return counts, columns.view(shape), values.view(shape)


def transpose_map(block_map: Tensor) -> TransposedLists:
    """Lists by key block."""
    turned = block_map.transpose(2, 3).contiguous()
    full_counts, full_indices, _ = index_lists(turned == FULL, turned)
    counts, indices, tile = index_lists(turned >= 0, turned)
    return TransposedLists(counts, indices, tile, full_counts, full_indices)


def stack_lists(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several masks of equal geometry with their heads one after the other."""
    stacked = {key: torch.cat([part[key] for part in parts], 1) for key in ("kv_num_blocks", "full_kv_num_blocks")}
    for key in ("kv_indices", "full_kv_indices"):
        stacked[key] = _cat_heads([part[key] for part in parts])
    offsets, first = [], 0
    for part in parts:
        offsets.append(part["partial_tile"] + first)
        first += part["partial_bits"].shape[0]
    bits, row = merge_equal_tiles(torch.cat([part["partial_bits"] for part in parts]))
    tile = _cat_heads(offsets)
    stacked["partial_tile"] = row.to(torch.int32)[tile.long()] if tile.numel() else tile
    stacked["partial_bits"] = bits
    return trim(stacked)


def _cat_heads(tensors: Sequence[Tensor]) -> Tensor:
    longest = max(x.shape[-1] for x in tensors)
    return torch.cat([F.pad(x, (0, longest - x.shape[-1])) for x in tensors], 1)


# ---------------------------------------------------------------- dense masks and algebra


def blocks_of_dense(dense: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Block map and tiles of a bool [B, H, Sq, Skv]; every block gets a tile of its own unless empty or full."""
    batch, heads, q_len, kv_len = dense.shape
    nq, nk = block_counts((q_len, kv_len), block)
    padded = F.pad(dense, (0, nk * block[1] - kv_len, 0, nq * block[0] - q_len))
    tiles = pack_bits(padded).view(batch, heads, nq, block[0], nk, block[1] // 8).transpose(3, 4)
    rows, columns = block_extents((q_len, kv_len), block, dense.device)
    allowed = padded.view(batch, heads, nq, block[0], nk, block[1]).sum((3, 5))
    block_map = torch.full_like(allowed, EMPTY, dtype=torch.int32)
    block_map[allowed == rows[:, None] * columns] = FULL
    partial = (allowed > 0) & (block_map != FULL)
    block_map[partial] = torch.arange(int(partial.sum()), dtype=torch.int32, device=dense.device)
    return block_map, tiles[partial].contiguous()


def dense_of_map(block_map: Tensor, bits: Tensor, seq_lengths: tuple[int, int]) -> Tensor:
    """Bool [B, H, Sq, Skv] of a block map, one sample and head at a time."""
    _, q_block, octets = bits.shape
    batch, heads, nq, nk = block_map.shape
    tiles = torch.cat([bits, bits.new_full((1, q_block, octets), 255), bits.new_zeros(1, q_block, octets)])
    # Negative rows count from the end: FULL (-2) is the tile of ones, EMPTY (-1) that of zeros.
    dense = torch.empty(batch * heads, *seq_lengths, dtype=torch.bool, device=bits.device)
    for index, one in enumerate(block_map.flatten(0, 1)):
        rows = tiles[one.long()].transpose(1, 2).reshape(nq * q_block, nk * octets)
        dense[index] = unpack_bits(rows)[: seq_lengths[0], : seq_lengths[1]]
    return dense.view(batch, heads, *seq_lengths)


def combine_maps(a: Tensor, b: Tensor, bits_a: Tensor, bits_b: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Map and tiles of `a and b` or `a or b`; sizes of 1 broadcast. Tiles are not tidied."""
    a, b = torch.broadcast_tensors(a, b)
    dominant, neutral = (EMPTY, FULL) if rule == "and" else (FULL, EMPTY)
    b_tile = torch.where(b >= 0, b + bits_a.shape[0], b)
    combined = torch.where(a == neutral, b_tile, a)
    combined = torch.where(b == dominant, dominant, combined)
    both = (a >= 0) & (b >= 0)
    pairs, row = torch.unique(a[both].long() * bits_b.shape[0] + b[both].long(), return_inverse=True)
    left, right = (bits_a, bits_b) if pairs.numel() else (bits_a[:0], bits_b[:0])
    divisor = max(1, bits_b.shape[0])
    left, right = left[pairs // divisor], right[pairs % divisor]
    joined = left & right if rule == "and" else left | right
    combined[both] = (row + bits_a.shape[0] + bits_b.shape[0]).to(torch.int32)
    return combined, torch.cat([bits_a, bits_b, joined])


def tidy_block_map(
    block_map: Tensor, bits: Tensor, seq_lengths: tuple[int, int], block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Clear bits outside the sequence, turn whole and empty tiles into FULL and EMPTY, drop unused and equal tiles."""
    block_map, bits = _cut_edges(block_map, bits, seq_lengths, block)
    if bits.shape[0]:
        rows, columns = block_extents(seq_lengths, block, bits.device)
        partial = block_map >= 0
        allowed = torch.where(partial, count_bits(bits)[block_map.clamp(min=0).long()], -1)
        block_map = torch.where(allowed == 0, EMPTY, block_map)
        block_map = torch.where(allowed == rows[:, None] * columns, FULL, block_map)
    used, row = torch.unique(block_map[block_map >= 0], return_inverse=True)
    bits, merged = merge_equal_tiles(bits[used.long()])
    block_map = block_map.clone()
    block_map[block_map >= 0] = merged[row].to(torch.int32)
    return block_map, bits


def _cut_edges(
    block_map: Tensor, bits: Tensor, seq_lengths: tuple[int, int], block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Give blocks at the ends of the sequence tiles without bits outside it; map and bits as they are if none has."""
    nq, nk = block_map.shape[2:]
    rows, columns = seq_lengths[0] - (nq - 1) * block[0], seq_lengths[1] - (nk - 1) * block[1]
    if nq and nk and columns < block[1]:
        block_map, bits = _cut_edge(block_map, bits, 3, edge_tile(block[0], columns, block, bits.device))
    if nq and nk and rows < block[0]:
        block_map, bits = _cut_edge(block_map, bits, 2, edge_tile(rows, block[1], block, bits.device))
    return block_map, bits


def _cut_edge(block_map: Tensor, bits: Tensor, axis: int, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the last blocks along `axis`; `inside` is the tile of bits that stay."""
    last = block_map.shape[axis] - 1
    edge = block_map.narrow(axis, last, 1)
    used, row = torch.unique(edge[edge >= 0], return_inverse=True)
    tiles = bits[used.long()]
    if not bool((tiles & ~inside).any()):
        return block_map, bits
    cut = edge.clone()
    cut[edge >= 0] = (row + bits.shape[0]).to(torch.int32)
    block_map = block_map.clone()
    block_map.narrow(axis, last, 1).copy_(cut)
    return block_map, torch.cat([bits, tiles & inside])
