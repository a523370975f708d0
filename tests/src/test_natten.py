"""Neighborhoods against NATTEN's own code where it is installed, against its published rule everywhere, and its tiles.

NATTEN installs without a GPU (`pip install --no-build-isolation natten`); its FlexAttention path then runs on the CPU.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsereel.grid import TokenGrid
from sparsereel.patterns import Neighborhood
from sparsereel.patterns.tile_count import count_tiles, interval
from sparsereel_kernels import sparse_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def keys_of(query, length, window, stride, dilation, causal):
    """NATTEN's rule for one axis, written down from its documentation: the set of keys that a query sees."""
    group, place = query % dilation, query // dilation
    size = (length - group + dilation - 1) // dilation
    if causal:
        chosen = range(max(0, place - window + 1), place + 1)
    else:
        centre = min((place // stride) * stride + stride // 2, size - 1)
        left, right = window // 2, window // 2 + window % 2 - 1
        start = max(centre - left, 0) + ((size - right - centre - 1) if centre + right >= size else 0)
        chosen = range(start, start + window)
    return {key * dilation + group for key in chosen}


@st.composite
def axes(draw):
    """(length, window, stride, dilation, causal) that NATTEN allows."""
    length = draw(st.integers(2, 9))
    dilation = draw(st.integers(1, 2 if length >= 4 else 1))
    window = draw(st.integers(2, length // dilation)) if length // dilation >= 2 else 1
    causal = draw(st.booleans())
    stride = 1 if causal else draw(st.integers(1, window))
    return length, window, stride, dilation, causal


@settings(max_examples=60, deadline=None)
@given(st.tuples(axes(), axes(), axes()))
def test_masks_follow_nattens_rule(settings):
    lengths, window, stride, dilation, causal = zip(*settings, strict=True)
    mask = Neighborhood(window, stride, dilation, causal).token_mask(TokenGrid(*lengths))
    for number, query in enumerate(product(*map(range, lengths))):
        allowed = [keys_of(q, *axis) for q, axis in zip(query, settings, strict=True)]
        expected = torch.zeros(lengths, dtype=torch.bool)
        for key in product(*allowed):
            expected[key] = True
        assert torch.equal(mask[number], expected.flatten()), query


CASES = [
    ((11,), (5,), (1,), (1,), (False,)),
    ((11,), (4,), (3,), (2,), (False,)),
    ((9,), (4,), (1,), (2,), (True,)),
    ((8, 9), (4, 3), (2, 3), (1, 1), (False, False)),
    ((7, 9), (3, 2), (1, 1), (2, 3), (False, True)),
    ((4, 6, 8), (3, 3, 5), (1, 2, 3), (1, 1, 1), (False, False, False)),
    ((5, 7, 6), (2, 3, 3), (1, 1, 1), (2, 2, 1), (True, False, False)),
    ((5, 7, 6), (5, 4, 6), (5, 4, 2), (1, 1, 1), (False, False, False)),
]


@pytest.mark.parametrize(("lengths", "window", "stride", "dilation", "causal"), CASES)
def test_attention_equals_nattens(lengths, window, stride, dilation, causal):
    natten = pytest.importorskip("natten")
    rank = len(lengths)
    q, k, v = (torch.randn(2, *lengths, 2, 32) for _ in range(3))
    call = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[rank]
    expected = call(q, k, v, kernel_size=window, stride=stride, dilation=dilation, is_causal=causal)
    # An axis that the grid lacks has one token, seen by itself.
    fill = (1,) * (3 - rank)
    pattern = Neighborhood((*fill, *window), (*fill, *stride), (*fill, *dilation), (*((False,) * (3 - rank)), *causal))
    mask = pattern.block_mask(TokenGrid(*fill, *lengths), (32, 16))
    flat = (x.flatten(1, rank).transpose(1, 2) for x in (q, k, v))
    found = sparse_attention(*flat, mask, backend="torch").transpose(1, 2).unflatten(1, lengths)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ tiles

#: grid, window, stride, query tile, key tile, bound by FLOPs, bound by tiles, fully sparse
TABLE = [
    ((256, 256), (80, 80), (1, 1), (16, 8), (16, 8), 10.24, 7.51, False),
    ((256, 256), (80, 80), (16, 16), (16, 8), (16, 8), 10.24, 10.24, True),
    ((256, 256), (80, 80), (1, 1), (16, 16), (16, 8), 10.24, 7.06, False),
    ((256, 256), (80, 80), (16, 16), (16, 16), (16, 8), 10.24, 10.24, True),
    ((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 8), (2, 8, 8), 11.11, 5.44, False),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), 11.11, 11.11, True),
    ((30, 48, 80), (18, 24, 24), (1, 1, 1), (4, 8, 8), (2, 8, 8), 11.11, 5.24, False),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.11, 11.11, True),
    ((21, 45, 80), (9, 27, 48), (1, 1, 1), (3, 9, 16), (3, 9, 16), 6.48, 2.93, False),
    ((21, 45, 80), (9, 27, 48), (3, 9, 16), (3, 9, 16), (3, 9, 16), 6.48, 6.48, True),
    ((21, 45, 80), (10, 24, 24), (2, 8, 8), (2, 8, 8), (2, 8, 8), 13.12, 12.52, False),
]


@pytest.mark.parametrize(("grid", "window", "stride", "q", "k", "flops", "tiles", "full"), TABLE)
def test_the_table_of_published_problems(grid, window, stride, q, k, flops, tiles, full):
    found = count_tiles(grid, window, stride, q, k)
    assert round(found.flop_bound, 2) == pytest.approx(flops, abs=0.011)
    assert round(found.tile_bound, 2) == pytest.approx(tiles, abs=0.011)
    assert found.fully_sparse == full


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counts_equal_those_of_the_mask(data):
    """Every pair of tiles of a small grid, looked at token by token."""
    shape = data.draw(st.tuples(*(st.integers(2, 8),) * 2))
    window = tuple(data.draw(st.integers(1, n)) for n in shape)
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    q_tile, kv_tile = (data.draw(st.tuples(*(st.integers(1, 4),) * 2)) for _ in range(2))
    mask = Neighborhood((1, *window), (1, *stride)).token_mask(TokenGrid(1, *shape)).view(*shape, *shape)
    visited, total, full = 0, 0, True
    for q, k in product(tiles(shape, q_tile), tiles(shape, kv_tile)):
        pairs = mask[q[0], q[1], k[0], k[1]]
        visited, total = visited + bool(pairs.any()), total + 1
        full &= bool(pairs.all()) or not bool(pairs.any())
    found = count_tiles(shape, window, stride, q_tile, kv_tile)
    assert found.tile_bound == pytest.approx(total / visited)
    assert found.fully_sparse == full
    assert found.flop_bound == pytest.approx(math.prod(shape) ** 2 / float(mask.sum()))
    assert 0 < found.efficiency <= 1 + 1e-9


def tiles(shape, tile):
    """Slices of all tiles of a grid of two axes."""
    rows, columns = ([slice(s, s + t) for s in range(0, n, t)] for n, t in zip(shape, tile, strict=True))
    return list(product(rows, columns))


def test_windows_move_at_borders_and_never_shrink():
    for window in range(1, 12):
        assert all(interval(q, 11, window, 1)[1] - interval(q, 11, window, 1)[0] == window for q in range(11))
    with pytest.raises(ValueError, match="needs 1 <= stride <= window <= 8, got 3 and 9"):
        count_tiles((8,), (9,), (3,), (2,), (2,))
    with pytest.raises(ValueError, match="one number for each axis"):
        count_tiles((8, 8), (3,), (1,), (2,), (2,))
