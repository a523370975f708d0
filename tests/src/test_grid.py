"""TokenGrid: segments, coordinates, tile order."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsereel.grid import Permutation, Segment, TokenGrid
from sparsereel.patterns.testing import grids


def test_short_form_equals_segments():
    video = Segment("video", 2, 3, 4)
    assert TokenGrid(2, 3, 4) == TokenGrid.of((video,))
    assert TokenGrid(2, 3, 4, 5) == TokenGrid.of((video, Segment("text", length=5)))
    assert TokenGrid(2, 3, 4, 5, "before") == TokenGrid.of((Segment("text", length=5), video))
    assert hash(TokenGrid(2, 3, 4, 5)) == hash(TokenGrid.of((video, Segment("text", length=5))))
    assert TokenGrid(2, 3, 4, 5) != TokenGrid(2, 3, 4, 5, "before")


def test_sizes():
    grid = TokenGrid(2, 3, 4, 5, "before")
    assert (grid.frames, grid.height, grid.width, grid.text) == (2, 3, 4, 5)
    assert (grid.frame_len, grid.video_start, grid.video_len, grid.seq_len) == (12, 5, 24, 29)
    assert repr(grid) == "TokenGrid(text 5 + video 2x3x4)"


def test_coordinates_are_frame_major_and_minus_one_outside():
    grid = TokenGrid.of((Segment("condition", 1, 2, 2), Segment("video", 2, 2, 3), Segment("text", length=2)))
    t, h, w = grid.coordinates()
    assert t.tolist() == [-1] * 4 + [0] * 6 + [1] * 6 + [-1] * 2
    assert h.tolist() == [-1] * 4 + [0, 0, 0, 1, 1, 1] * 2 + [-1] * 2
    assert w.tolist() == [-1] * 4 + [0, 1, 2] * 4 + [-1] * 2
    assert grid.video_index().tolist() == [-1] * 4 + list(range(12)) + [-1] * 2


def test_an_image_beside_a_video_is_a_condition():
    grid = TokenGrid.of((Segment("image", 1, 2, 2), Segment("video", 2, 2, 2)))
    assert grid.shape == (2, 2, 2)
    assert grid.video_start == 4
    assert TokenGrid.of((Segment("image", 1, 4, 4),)).shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenGrid(0, 3, 4), "segment frames must be a whole number of at least 1, got 0"),
        (lambda: TokenGrid(2, 3.0, 4), "segment height must be a whole number of at least 1, got 3.0"),
        (lambda: TokenGrid(2, 3, 4, -1), "text must be a number of tokens, 0 or more, got -1"),
        (lambda: TokenGrid(2, 3, 4, 1, "left"), "text_side must be one of before, after, got 'left'"),
        (lambda: Segment("audio", length=3), "kind must be one of video, image, text, condition, got 'audio'"),
        (lambda: Segment("video", length=3), "a video segment needs frames, height and width"),
        (lambda: Segment("text"), "segment length must be a whole number of at least 1, got 0"),
        (lambda: Segment("condition", 1, 2, None), "segment width must be a whole number of at least 1, got None"),
        (lambda: Segment("condition", 1, 2, 2, length=5), "does not equal frames x height x width = 4"),
        (lambda: TokenGrid.of((Segment("text", length=3),)), "exactly one video .* got 0"),
        (lambda: TokenGrid.of([Segment("image", 1, 2, 2)] * 2), "exactly one video .* got 2"),
        (lambda: TokenGrid(2, 3, 4).tile_order((2, 2)), r"tile must be \(frames, height, width\)"),
        (lambda: TokenGrid(2, 3, 4).tile_order((0, 2, 2)), "tile size must be a whole number of at least 1, got 0"),
        (lambda: Permutation(torch.tensor([0, 2])), "each of 0..S-1 exactly once"),
        (lambda: Permutation(torch.tensor([0, 0])), "each of 0..S-1 exactly once"),
        (lambda: TokenGrid(2, 2, 2).tile_order().apply(torch.zeros(1, 7), 1), "has 8 tokens, dimension 1"),
    ],
)
def test_bad_input_is_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@settings(max_examples=60, deadline=None)
@given(grids(), st.tuples(*[st.integers(1, 9)] * 3))
def test_tile_order_is_a_permutation_that_keeps_tiles_together(grid, tile):
    order = grid.tile_order(tile)
    assert sorted(order.indices.tolist()) == list(range(grid.seq_len))
    outside = grid.video_index() < 0
    assert torch.equal(order.indices[outside], torch.arange(grid.seq_len)[outside])
    t, h, w = (order.apply(x, 0)[~outside] for x in grid.coordinates())
    tiles = list(zip((t // tile[0]).tolist(), (h // tile[1]).tolist(), (w // tile[2]).tolist(), strict=True))
    assert tiles == sorted(tiles)
    # Inside a tile tokens stay frame-major.
    numbered = list(zip(tiles, order.apply(grid.video_index(), 0)[~outside].tolist(), strict=True))
    assert numbered == sorted(numbered)


@settings(max_examples=30, deadline=None)
@given(grids())
def test_inverse_undoes(grid):
    order = grid.tile_order((2, 3, 2))
    x = torch.randn(2, grid.seq_len, 3)
    assert torch.equal(order.inverse.apply(order.apply(x, 1), 1), x)
    assert order.inverse.inverse == order


def test_permutations_compare_by_content():
    one, two = Permutation(torch.tensor([1, 0, 2])), Permutation(torch.tensor([1, 0, 2], dtype=torch.int32))
    assert one == two
    assert hash(one) == hash(two)
    assert one != Permutation(torch.tensor([0, 1, 2]))
    assert pickle.loads(pickle.dumps(one)) == one


def test_grids_can_be_pickled_and_copied():
    grid = TokenGrid(3, 4, 5, 6)
    assert pickle.loads(pickle.dumps(grid)) == grid
