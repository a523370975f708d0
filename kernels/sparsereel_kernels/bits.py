"""Packed tiles of partial blocks: bit c % 8 of byte [r, c // 8] says whether row r may attend to column c."""

from __future__ import annotations

import torch
from torch import Tensor

# A fixed odd multiplier mixes the words of a tile into one number (Knuth's multiplicative hash).
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)


def pack_bits(allowed: Tensor) -> Tensor:
    """Bool [..., C] to uint8 [..., C // 8], little endian; C is a multiple of 8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=allowed.device)
    octets = allowed.unflatten(-1, (allowed.shape[-1] // 8, 8)).to(torch.uint8)
    return (octets << shifts).sum(-1, dtype=torch.uint8)


def octet_table(device: torch.device) -> Tensor:
    """Bool [256, 8]: the bits of each byte, lowest first."""
    shifts = torch.arange(8, device=device)
    return ((torch.arange(256, device=device)[:, None] >> shifts) & 1).bool()


def unpack_bits(bits: Tensor) -> Tensor:
    """Uint8 [..., C // 8] to bool [..., C]."""
    # One look-up moves eight bools at once; a shift for each bit is several times slower.
    table = octet_table(bits.device).view(torch.int64).flatten()
    return table[bits.to(torch.int32)].unsqueeze(-1).view(torch.bool).flatten(-2)


def count_bits(bits: Tensor) -> Tensor:
    """Set bits of each tile: uint8 [U, ...] to int64 [U]."""
    table = octet_table(bits.device).sum(-1)
    return table.to(torch.uint8)[bits.to(torch.int32)].flatten(1).sum(-1, dtype=torch.int64)


def edge_tile(rows: int, columns: int, block: tuple[int, int], device: torch.device) -> Tensor:
    """Uint8 [BQ, BK // 8] with the first `rows` x `columns` bits set."""
    inside = torch.zeros(block, dtype=torch.bool, device=device)
    inside[:rows, :columns] = True
    return pack_bits(inside)


def merge_equal_tiles(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Drop repeated tiles.

    Args:
        bits: [U, BQ, BK // 8] uint8.

    Returns:
        [V, BQ, BK // 8] different tiles, and int64 [U], the row of each old tile among them.
    """
    if bits.shape[0] < 2:
        return bits, torch.arange(bits.shape[0], device=bits.device)
    words = bits.reshape(bits.shape[0], -1).contiguous().clone().view(torch.int64)
    _, row = torch.unique(_hash(words), return_inverse=True)
    first = _first_of_each(row)
    # Two tiles with one hash are all but impossible; sorting whole tiles settles it exactly.
    if not torch.equal(words[first][row], words):
        _, row = torch.unique(words, dim=0, return_inverse=True)
        first = _first_of_each(row)
    return bits[first], row


def _hash(words: Tensor) -> Tensor:
    """Int64 [U, W] to int64 [U]; arithmetic wraps around."""
    position = torch.arange(1, words.shape[1] + 1, device=words.device) * _MIX
    mixed = (words ^ (words >> 29)) * (position | 1)
    return (mixed ^ (mixed >> 32)).sum(-1)


def _first_of_each(row: Tensor) -> Tensor:
    """The lowest position of every number in `row` (numbers 0..max, each present)."""
    count = int(row.max()) + 1
    first = torch.full((count,), row.shape[0], dtype=torch.int64, device=row.device)
    return first.scatter_reduce_(0, row, torch.arange(row.shape[0], device=row.device), "amin")
