"""Block masks decode to token masks, whatever the pattern, grid, block, order and range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsereel import patterns
from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns import Pattern, assemble, rules
from sparsereel.patterns.testing import compositions, grids, leaves

BLOCKS = st.tuples(st.sampled_from([8, 16, 24, 64, 128]), st.sampled_from([8, 16, 40, 64, 72, 128]))
THOROUGH = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def orders(draw, grid):
    kind = draw(st.sampled_from(["grid", "tile", "random"]))
    if kind == "grid":
        return None
    if kind == "tile":
        return grid.tile_order(draw(st.tuples(*[st.integers(1, 5)] * 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return Permutation(torch.randperm(grid.seq_len, generator=generator))


@st.composite
def ranges(draw, length):
    if draw(st.booleans()):
        return None
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))


def cut(mask, order, queries, keys):
    """The token mask of a sequence in another order, of ranges of it."""
    if order is not None:
        mask = mask[order.indices][:, order.indices]
    return mask[slice(*(queries or (None,)))][:, slice(*(keys or (None,)))]


@THOROUGH
@given(st.data(), leaves() | compositions(), grids(), BLOCKS)
def test_block_mask_decodes_to_token_mask(data, pattern, grid, block):
    order = data.draw(orders(grid))
    queries, keys = data.draw(ranges(grid.seq_len)), data.draw(ranges(grid.seq_len))
    truth = pattern.token_mask(grid)
    assert truth.shape == (grid.seq_len, grid.seq_len)
    assert truth.any(1).all(), "every query keeps a key"
    mask = pattern.block_mask(grid, block, order=order, queries=queries, keys=keys)
    assert torch.equal(mask.to_dense()[0, 0], cut(truth, order, queries, keys))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), compositions(), grids(frames=12, side=14), st.sampled_from([(128, 64), (64, 128), (128, 128)]))
def test_block_mask_decodes_where_blocks_repeat(data, pattern, grid, block):
    order = data.draw(orders(grid))
    mask = pattern.block_mask(grid, block, order=order)
    assert torch.equal(mask.to_dense()[0, 0], cut(pattern.token_mask(grid), order, None, None))


@pytest.mark.parametrize("limit", ["LARGEST_TABLE", "PAIRS_TO_COMPARE", "PAIRS_AT_ONCE", "WORDS_AT_ONCE"])
def test_limits_of_memory_do_not_change_masks(monkeypatch, limit):
    grid = TokenGrid(5, 6, 7, 11)
    pattern = patterns.Radial(0.5) & patterns.Neighborhood((3, 5, 5)) | patterns.MultiDiagonal(3, 17)
    options = {"block": (16, 24), "order": grid.tile_order((2, 3, 4))}
    before = pattern.block_mask(grid, **options)
    monkeypatch.setattr(assemble if "AT_ONCE" in limit else rules, limit, 40)
    assert torch.equal(pattern.block_mask(grid, **options).to_dense(), before.to_dense())


@THOROUGH
@given(compositions(), grids(), BLOCKS)
def test_inexact_masks_fill_exactly_the_touched_blocks(pattern, grid, block):
    exact, coarse = pattern.block_mask(grid, block), pattern.block_mask(grid, block, exact=False)
    assert not coarse.has_partial
    assert torch.equal(coarse.block_map() != -1, exact.block_map() != -1)
    assert coarse.density == exact.density


@settings(max_examples=60, deadline=None)
@given(compositions(), compositions(), grids())
def test_and_or_follow_the_token_masks(a, b, grid):
    both = a.token_mask(grid) & b.token_mask(grid)
    alone = ~both.any(1)
    both[alone, alone] = True
    assert torch.equal((a & b).token_mask(grid), both)
    assert torch.equal((a | b).token_mask(grid), a.token_mask(grid) | b.token_mask(grid))


@settings(max_examples=60, deadline=None)
@given(compositions(), grids())
def test_text_sees_and_is_seen_by_everything(pattern, grid):
    mask, text = pattern.token_mask(grid), grid.video_index() < 0
    assert mask[text].all()
    assert mask[:, text].all()


@settings(max_examples=60, deadline=None)
@given(compositions(), grids())
def test_patterns_that_see_themselves_do(pattern, grid):
    if pattern.sees_itself:
        assert pattern.token_mask(grid).diagonal().all()


@settings(max_examples=40, deadline=None)
@given(leaves(), grids(), BLOCKS)
def test_own_predicate_without_a_rule_is_exact_too(pattern, grid, block):
    @dataclass(frozen=True, eq=False)
    class Own(Pattern):
        name: ClassVar[str] = "own"

        def allowed(self, grid, q, k):
            return pattern.allowed(grid, q, k)

    mask = (Own() | patterns.Diagonal(0)).block_mask(grid, block)
    assert torch.equal(mask.to_dense()[0, 0], (pattern | patterns.Diagonal(0)).token_mask(grid))


def test_skip_allows_nothing():
    grid = TokenGrid(3, 4, 5, 7)
    mask = patterns.Skip().block_mask(grid)
    assert mask.density == mask.token_density == 0
    assert not patterns.Skip().token_mask(grid).any()


def test_full_is_full():
    mask = patterns.Full().block_mask(TokenGrid(3, 4, 5, 7), (8, 8))
    assert mask.density == mask.token_density == 1
    assert not mask.has_partial


@dataclass(frozen=True, eq=False)
class OddHeads(Pattern):
    """Odd heads look back, even heads see their frame; the second layer swaps them."""

    name: ClassVar[str] = "odd_heads"

    def for_head(self, layer, head):
        return patterns.Causal() if (layer + head) % 2 else patterns.Spatial(0)


def test_heads_that_differ_are_stacked():
    grid, pattern = TokenGrid(4, 4, 4, 3), OddHeads()
    mask = pattern.block_mask(grid, (16, 16), heads=3, layer=1)
    assert mask.shape[1] == 3
    for head in range(3):
        assert torch.equal(mask.to_dense()[0, head], pattern.token_mask(grid, layer=1, head=head))


def test_heads_that_are_alike_share_one_mask():
    assert patterns.Radial().block_mask(TokenGrid(4, 4, 4), heads=12).shape[1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": (5, 5)}, r"queries must be a range \(start, stop\) inside 0..24 with start < stop, got \(5, 5\)"),
        ({"keys": (0, 25)}, r"keys must be a range .* got \(0, 25\)"),
        ({"order": Permutation(torch.arange(7))}, "the order has 7 tokens, the grid 24"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"block": (12, 64)}, "block"),
        ({"block": (0, 64)}, "block"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        patterns.Radial().block_mask(TokenGrid(2, 3, 4), **options)


def test_aligned_windows_waste_nothing():
    grid = TokenGrid(30, 48, 80)
    order = grid.tile_order((2, 8, 8))
    # A window, stride and tile of one grid: the digest of published figures has 11.11x here, which is 1 / density.
    aligned = patterns.Neighborhood((18, 24, 24), stride=(16, 8, 8)).block_mask(grid, (128, 128), order=order)
    assert aligned.density == aligned.token_density == pytest.approx(1 / 11.111, rel=1e-3)
    tiles = patterns.SlidingTile((3, 3, 5), tile=(6, 8, 8)).block_mask(
        grid, (128, 64), order=grid.tile_order((6, 8, 8))
    )
    assert tiles.density == tiles.token_density == pytest.approx(3 / 5 * 3 / 6 * 5 / 10)
    frames = patterns.Spatial(1).block_mask(grid, (128, 64))
    assert frames.density == frames.token_density
