"""BlockMask behaves as the dense mask does, for all sizes, blocks and masks that hypothesis thinks of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsereel_kernels import BlockMask
from sparsereel_kernels.bits import pack_bits, unpack_bits

BLOCKS = st.sampled_from([(8, 8), (16, 8), (8, 24), (32, 16), (64, 128)])
LENGTHS = st.integers(0, 75)
SETTINGS = settings(max_examples=60, deadline=None)


def blocky(shape, block, seed):
    """A dense mask with whole, empty and mixed blocks."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, q_len, kv_len = shape
    kinds = torch.randint(0, 3, (batch, heads, q_len // block[0] + 1, kv_len // block[1] + 1), generator=generator)
    kinds = kinds.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :q_len, :kv_len]
    noise = torch.rand(shape, generator=generator) < 0.5
    return torch.where(kinds == 2, noise, kinds == 1)


@st.composite
def masks(draw, count=1):
    block, q_len, kv_len = draw(BLOCKS), draw(LENGTHS), draw(LENGTHS)
    found = []
    for _ in range(count):
        sizes = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]))
        found.append(blocky((*sizes, q_len, kv_len), block, draw(st.integers(0, 1000))))
    return block, found


@SETTINGS
@given(masks())
def test_dense_round_trip(made):
    block, (dense,) = made
    mask = BlockMask.from_dense(dense, block)
    assert torch.equal(mask.to_dense(), dense)
    assert mask.token_density == (float(dense.double().mean()) if dense.numel() else 0.0)


def live_cells(dense, block):
    """Share of cells with an allowed pair, counted one by one; every cell of a block without a hidden pair is live."""
    live = cells = 0
    for head in dense.flatten(0, 1):
        for rows in head.split(block[0]):
            for tile in rows.split(block[1], dim=1):
                if not tile.numel():
                    continue
                panels = math.ceil(block[0] / 12)
                whole = torch.zeros(block, dtype=torch.bool)
                whole[: tile.shape[0], : tile.shape[1]] = tile
                found = [bool(c.any()) for p in whole.tensor_split(panels) for c in p.split(16, dim=1)]
                live += len(found) if tile.all() else sum(found)
                cells += len(found)
    return live / max(1, cells)


@SETTINGS
@given(masks())
def test_cells_that_hold_an_allowed_pair(made):
    block, (dense,) = made
    mask = BlockMask.from_dense(dense, block)
    assert mask.cell_density == pytest.approx(live_cells(dense, block))
    assert mask.cell_density <= mask.density


@SETTINGS
@given(masks())
def test_canonical_lists_are_valid_and_ascend(made):
    block, (dense,) = made
    mask = BlockMask.from_dense(dense, block)
    again = BlockMask.from_lists(mask.seq_lengths, mask.BLOCK_SIZE, **mask.tensors())
    assert torch.equal(again.to_dense(), dense)
    tiles = mask.partial_bits
    assert torch.unique(tiles, dim=0).shape[0] == tiles.shape[0]
    assert not (unpack_bits(tiles).flatten(1).sum(1) == 0).any()


@SETTINGS
@given(masks(count=2))
def test_and_or(made):
    block, (a, b) = made
    left, right = BlockMask.from_dense(a, block), BlockMask.from_dense(b, block)
    assert torch.equal((left & right).to_dense(), a & b)
    assert torch.equal((left | right).to_dense(), a | b)
    assert (left & left).block_map().equal(left.block_map())


@SETTINGS
@given(masks(), st.integers(0, 1000))
def test_stack_and_head(made, seed):
    block, (a,) = made
    b = blocky((a.shape[0], 2, *a.shape[2:]), block, seed)
    stacked = BlockMask.stack([BlockMask.from_dense(a, block), BlockMask.from_dense(b, block)])
    assert torch.equal(stacked.to_dense(), torch.cat([a, b], 1))
    for h in range(stacked.shape[1]):
        assert torch.equal(stacked.head(h).to_dense(), stacked.to_dense()[:, h : h + 1])


@settings(max_examples=25, deadline=None)
@given(masks())
def test_flex_round_trip(made):
    block, (dense,) = made
    if 0 in dense.shape:
        return
    mask = BlockMask.from_dense(dense, block)
    again = BlockMask.from_flex(mask.to_flex())
    assert torch.equal(again.to_dense(), dense)
    assert torch.equal(again.block_map() < 0, mask.block_map() < 0)


@SETTINGS
@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 1000))
def test_bits_round_trip(rows, octets, seed):
    allowed = torch.rand(rows, octets * 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(allowed)
    assert torch.equal(unpack_bits(packed), allowed)
    for c in range(octets * 8):
        assert torch.equal((packed[:, c // 8] >> (c % 8)) & 1, allowed[:, c].to(torch.uint8))
