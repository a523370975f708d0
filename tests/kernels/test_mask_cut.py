"""`BlockMask.cut`: a rectangle of a mask, wherever it begins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsereel_kernels import BlockMask


@st.composite
def cuts(draw):
    lengths = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    spans = []
    for length in lengths:
        start = draw(st.integers(0, length))
        spans.append((start, draw(st.integers(start, length))))
    return lengths, spans, draw(st.sampled_from([(8, 8), (16, 8), (8, 32)])), draw(st.sampled_from([0.02, 0.5, 1.0]))


@settings(max_examples=60, deadline=None)
@given(cuts(), st.integers(0, 9))
def test_cut_is_the_rectangle_of_the_dense_mask(case, seed):
    lengths, (rows, columns), block, density = case
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(2, 3, *lengths, generator=generator) < density
    dense[:, :, : lengths[0] // 2, : lengths[1] // 2] = True
    part = BlockMask.from_dense(dense, block).cut(rows, columns)
    expected = dense[:, :, slice(*rows), slice(*columns)]
    assert torch.equal(part.to_dense(), expected)
    if expected.numel():
        again = BlockMask.from_dense(expected, block)
        assert torch.equal(part.full_kv_num_blocks, again.full_kv_num_blocks)
        assert torch.equal(part.kv_num_blocks, again.kv_num_blocks)


def test_equal_tiles_stay_shared():
    band = (torch.arange(640)[:, None] - torch.arange(640)).abs() < 20
    mask = BlockMask.from_dense(band, (32, 32))
    part = mask.cut((5, 600), (5, 600))
    assert torch.equal(part.to_dense()[0, 0], band[5:600, 5:600])
    assert part.partial_bits.shape[0] <= mask.partial_bits.shape[0] + 6


def test_a_part_is_made_once():
    mask = BlockMask.from_dense(torch.ones(40, 40, dtype=torch.bool), (8, 8))
    assert mask.cut((0, 8), (3, 40)) is mask.cut((0, 8), (3, 40))
    assert mask.cut().shape == mask.shape


@pytest.mark.parametrize("bad", [(-1, 4), (5, 3), (0, 41)])
def test_ranges_outside_are_refused(bad):
    mask = BlockMask.from_dense(torch.ones(40, 40, dtype=torch.bool), (8, 8))
    with pytest.raises(ValueError, match="queries must be a range"):
        mask.cut(bad)
    with pytest.raises(ValueError, match="keys must be a range"):
        mask.cut(None, bad)
