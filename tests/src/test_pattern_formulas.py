"""Each pattern against its paper's formula, written out anew in plain Python, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsereel import patterns
from sparsereel.grid import TokenGrid

SMALL = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))


def natten_window(q, length, window, stride, dilation, causal):
    """Keys of one axis that NATTEN lets query q see."""
    group = list(range(q % dilation, length, dilation))
    own, size = group.index(q), len(group)
    if causal:
        return {k for i, k in enumerate(group) if own - window < i <= own}
    left, right = window // 2, window // 2 + window % 2 - 1
    leader = min(own // stride * stride + stride // 2, size - 1)
    start = max(leader - left, 0)
    if leader + right >= size:
        start += size - right - leader - 1
    return set(group[start : start + window])


@settings(max_examples=40, deadline=None)
@given(st.data(), SMALL)
def test_neighborhood_is_nattens_rule(data, shape):
    axes = []
    for length in shape:
        window = data.draw(st.integers(1, length))
        dilation = data.draw(st.integers(1, length // window))
        causal = data.draw(st.booleans())
        axes.append((window, 1 if causal else data.draw(st.integers(1, window)), dilation, causal))
    window, stride, dilation, causal = zip(*axes, strict=True)
    mask = patterns.Neighborhood(window, stride, dilation, causal).token_mask(TokenGrid(*shape))
    seen = [[natten_window(q, length, *axis) for q in range(length)] for length, axis in zip(shape, axes, strict=True)]
    places = [(t, h, w) for t in range(shape[0]) for h in range(shape[1]) for w in range(shape[2])]
    expected = [[all(k[a] in seen[a][q[a]] for a in range(3)) for k in places] for q in places]
    assert torch.equal(mask, torch.tensor(expected))


@settings(max_examples=40, deadline=None)
@given(st.data(), SMALL)
def test_every_query_sees_the_product_of_the_windows(data, shape):
    window = [data.draw(st.integers(1, length + 3)) for length in shape]
    stride = [data.draw(st.integers(1, w)) for w in window]
    mask = patterns.Neighborhood(tuple(window), tuple(stride)).token_mask(TokenGrid(*shape))
    clamped = [min(w, length) for w, length in zip(window, shape, strict=True)]
    assert (mask.sum(1) == math.prod(clamped)).all()


@pytest.mark.parametrize("length", [4, 6, 12])
def test_special_cases_of_neighborhood(length):
    grid, axis = TokenGrid(1, 1, length), torch.arange(length)
    assert patterns.Neighborhood(length).token_mask(grid).all()
    assert patterns.Neighborhood(length + 5).token_mask(grid).all(), "a window larger than the axis is the axis"
    blocked = patterns.Neighborhood((1, 1, 2), stride=(1, 1, 2)).token_mask(grid)
    assert torch.equal(blocked, axis[:, None] // 2 == axis // 2)
    dilated = patterns.Neighborhood((1, 1, length // 2), dilation=(1, 1, 2)).token_mask(grid)
    assert torch.equal(dilated, axis[:, None] % 2 == axis % 2)


def test_dilation_gives_way_to_the_window():
    grid = TokenGrid(2, 8, 8)
    wide = patterns.Neighborhood((5, 3, 3), dilation=(2, 9, 2))
    assert [(w.window, w.dilation) for w in wide.windows(grid)] == [(2, 1), (3, 2), (3, 2)]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.tuples(*[st.integers(1, 4)] * 3), st.tuples(*[st.integers(1, 3)] * 3))
def test_sliding_tile_is_neighborhood_with_stride_of_a_tile(data, counts, tile):
    shape = [n * t for n, t in zip(counts, tile, strict=True)]
    window = [data.draw(st.sampled_from([w for w in (1, 3) if w <= n])) for n in counts]
    grid = TokenGrid(*shape)
    mask = patterns.SlidingTile(tuple(window), tile).token_mask(grid)
    tokens = tuple(w * t for w, t in zip(window, tile, strict=True))
    assert torch.equal(mask, patterns.Neighborhood(tokens, stride=tile).token_mask(grid))
    share = math.prod(w / n for w, n in zip(window, counts, strict=True))
    assert mask.float().mean().item() == pytest.approx(share)
    assert len(set(mask.sum(1).tolist())) == 1, "the same count for every query"


@settings(max_examples=60, deadline=None)
@given(SMALL, st.sampled_from([1, 3, 5]), st.tuples(*[st.integers(1, 4)] * 3))
def test_sliding_tile_by_tiles(shape, window, tile):
    def visible(q, k, length, size):
        count = -(-length // size)
        if window >= count:
            return True
        centre = min(max(q // size, window // 2), count - 1 - window // 2)
        return abs(k // size - centre) <= window // 2

    mask = patterns.SlidingTile(window, tile).token_mask(TokenGrid(*shape))
    places = [(t, h, w) for t in range(shape[0]) for h in range(shape[1]) for w in range(shape[2])]
    expected = [[all(visible(q[a], k[a], shape[a], tile[a]) for a in range(3)) for k in places] for q in places]
    assert torch.equal(mask, torch.tensor(expected))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.sampled_from([0.1, 0.5, 1.0, 2.0]), st.integers(0, 2))
def test_radial_is_the_papers_formula(frames, frame_len, decay, sinks):
    def kept(i, a, j, b):
        apart = abs(i - j)
        if j < sinks or apart <= 1:
            return True
        octave = 2 ** math.floor(math.log2(apart))
        width = math.floor(decay * frame_len / octave + 1e-9)
        if width >= 1:
            return abs(a - b) + 1 <= width
        return a == b and apart % math.ceil(octave / (decay * frame_len) - 1e-9) == 0

    places = [(t, p) for t in range(frames) for p in range(frame_len)]
    expected = torch.tensor([[kept(*q, *k) for k in places] for q in places])
    mask = patterns.Radial(decay, sinks).token_mask(TokenGrid(frames, 1, frame_len))
    assert torch.equal(mask, expected)


def test_radial_share_of_a_pair_of_frames_halves_with_each_octave():
    frames, frame_len = 20, 64
    mask = patterns.Radial(sink_frames=0).token_mask(TokenGrid(frames, 8, 8))
    pairs = mask.view(frames, frame_len, frames, frame_len).permute(0, 2, 1, 3).flatten(2).float().mean(2)
    share = [pairs[0, d].item() for d in range(frames)]
    for d in range(frames):
        width = 64 if d <= 1 else 64 >> int(math.log2(d))
        assert share[d] == pytest.approx((2 * width * 64 - 64 - width * (width - 1)) / 64**2 if width < 64 else 1)
    assert all(share[d] >= share[d + 1] for d in range(frames - 1))


@pytest.mark.parametrize(
    ("frames", "decay", "sinks", "density"),
    [
        # Density of the block masks that the authors' code builds, 48 x 80 tokens a frame, blocks of 128.
        (18, 0.2, 1, 0.2871),
        (18, 0.8, 1, 0.3768),
        (20, 0.8, 1, 0.3525),
        (30, 0.95, 0, 0.2746),
        (60, 1.0, 0, 0.1918),
    ],
)
def test_radial_released_has_the_density_of_the_released_code(frames, decay, sinks, density):
    pattern = patterns.Radial(decay, sinks, flavour="released")
    mask = pattern.block_mask(TokenGrid(frames, 48, 80), (128, 128))
    assert mask.density == mask.token_density == pytest.approx(density, abs=5e-5)


@pytest.mark.parametrize("shape", [(5, 8, 16), (6, 10, 15), (4, 5, 5), (9, 3, 7)])
def test_radial_released_is_a_vote_of_its_columns(shape):
    """Aligned, unaligned and tiny frames, with the tokens of each pair of frames laid out and counted."""
    frames, s = shape[0], shape[1] * shape[2]
    blocks = -(-frames * s // 128)
    kept = torch.eye(blocks, dtype=torch.bool)
    power = 2 ** s.bit_length()
    for i in range(frames):
        for j in range(frames):
            apart, unit = abs(i - j), power / 2 ** abs(i - j).bit_length()
            if j and unit < 128 and apart % int(128 / unit):
                continue
            near = torch.arange(s)[:, None] - torch.arange(s)
            pair = torch.ones(s, s, dtype=torch.bool) if j == 0 or apart <= 1 else near.abs() <= max(unit * 0.5, 128)
            whole = torch.zeros(blocks * 128, blocks * 128)
            whole[i * s : (i + 1) * s, j * s : (j + 1) * s] = pair
            fill = whole.view(blocks, 128, blocks, 128).mean(1)
            kept |= (fill > 1 / 3).sum(2) / ((fill > 0).sum(2) + 1e-9) > 0.6
    expected = kept.repeat_interleave(128, 0).repeat_interleave(128, 1)[: frames * s, : frames * s]
    mask = patterns.Radial(0.5, flavour="released").token_mask(TokenGrid(*shape))
    assert torch.equal(mask, expected)


@settings(max_examples=40, deadline=None)
@given(SMALL, st.integers(0, 3))
def test_spatial_and_temporal(shape, reach):
    grid = TokenGrid(*shape)
    t, h, w = grid.coordinates()
    near = lambda x: (x[:, None] - x).abs() <= reach  # noqa: E731
    assert torch.equal(patterns.Spatial(reach).token_mask(grid), near(t))
    assert torch.equal(patterns.Temporal(reach).token_mask(grid), near(h) & near(w))


@settings(max_examples=40, deadline=None)
@given(SMALL, st.integers(1, 8))
def test_sink_and_causal(shape, frames):
    grid = TokenGrid(*shape)
    t = grid.coordinates()[0]
    assert torch.equal(patterns.Sink(frames).token_mask(grid), (t < frames).expand(len(t), -1))
    assert torch.equal(patterns.Causal(frames).token_mask(grid), t // frames <= (t // frames)[:, None])


@settings(max_examples=40, deadline=None)
@given(SMALL, st.integers(0, 300), st.none() | st.integers(1, 40))
def test_diagonals(shape, width, period):
    grid = TokenGrid(*shape)
    n = torch.arange(grid.video_len)
    assert torch.equal(patterns.Diagonal(width).token_mask(grid), (n[:, None] - n).abs() <= width)
    folded = n % (period or grid.frame_len)
    assert torch.equal(
        patterns.MultiDiagonal(width, period).token_mask(grid), (folded[:, None] - folded).abs() <= width
    )


def test_vertical_stripes():
    grid = TokenGrid(2, 3, 5)
    mask = patterns.VerticalStripe((2, (5, 8), 0.5, (0.9, 1.0), 999)).token_mask(grid)
    assert mask[0].nonzero().flatten().tolist() == [2, 5, 6, 7, 15, 27, 28, 29]
    assert (mask == mask[0]).all()


def test_fractions_follow_the_grid():
    half = patterns.Neighborhood(0.5)
    assert [w.window for w in half.windows(TokenGrid(10, 6, 3))] == [5, 3, 1]
    assert [w.window for w in patterns.Neighborhood(0.5, stride=4).windows(TokenGrid(24, 40, 8))] == [12, 20, 4]
    assert [w.window for w in patterns.Neighborhood(1.0, stride=4).windows(TokenGrid(9, 10, 3))] == [9, 10, 3]
    grid = TokenGrid(2, 10, 20)
    assert torch.equal(patterns.Diagonal(0.25).token_mask(grid), patterns.Diagonal(100).token_mask(grid))
    assert torch.equal(patterns.MultiDiagonal(0.1).token_mask(grid), patterns.MultiDiagonal(20).token_mask(grid))
    tiles = patterns.SlidingTile(0.5, tile=(1, 2, 2)).token_mask(grid)
    assert torch.equal(tiles, patterns.SlidingTile((1, 3, 5), tile=(1, 2, 2)).token_mask(grid))


@pytest.mark.parametrize("pattern", [patterns.Radial(), patterns.Spatial(), patterns.Sink(), patterns.Causal()])
def test_an_image_is_one_frame_seen_whole(pattern):
    assert pattern.token_mask(TokenGrid(1, 5, 6, 3)).all()


def test_kept_sinks_are_the_first_frame_of_videos_only():
    pattern = patterns.KeepSinks(patterns.Temporal(0))
    video, image = TokenGrid(3, 4, 4), TokenGrid(1, 4, 4)
    assert torch.equal(pattern.token_mask(video), (patterns.Temporal(0) | patterns.Sink()).token_mask(video))
    assert torch.equal(pattern.token_mask(image), patterns.Temporal(0).token_mask(image))


def test_a_query_that_an_intersection_leaves_alone_sees_itself():
    grid = TokenGrid(3, 2, 2)
    mask = (patterns.Sink() & patterns.Diagonal(1)).token_mask(grid)
    assert mask[8:].nonzero().tolist() == [[i, 8 + i] for i in range(4)]
    assert mask[0].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("make", [patterns.Diagonal, patterns.MultiDiagonal, patterns.Spatial, patterns.Temporal])
def test_widths_beyond_the_grid_are_the_grid(make):
    grid, pattern = TokenGrid(3, 4, 5, 9), make(10**15)
    assert pattern.token_mask(grid).all()
    assert pattern.block_mask(grid, (8, 8)).token_density == 1


def test_blocked_windows_shift_in_odd_layers_only():
    grid = TokenGrid(1, 1, 8)
    pattern = patterns.Blocked(window=(1, 1, 4))
    even, odd = pattern.token_mask(grid, layer=0), pattern.token_mask(grid, layer=1)
    boxes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    shifted = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])
    assert torch.equal(even, boxes[:, None] == boxes)
    assert torch.equal(odd, shifted[:, None] == shifted)
    assert torch.equal(pattern.block_mask(grid, (8, 8), layer=1).to_dense()[0, 0], odd)


def test_shards_of_a_stride_of_heads_cover_everything_and_overlap_only_nearby():
    grid = TokenGrid(2, 4, 8)
    pattern = patterns.Sharded(run=4, local=1, stride=4)
    masks = torch.stack([pattern.token_mask(grid, head=head) for head in range(4)])
    assert masks.any(0).all()
    runs = torch.arange(64) // 4
    far = runs[:, None] != runs
    assert torch.equal(masks.sum(0)[far], torch.ones_like(masks.sum(0)[far]))
    stacked = pattern.block_mask(grid, (16, 8), heads=4)
    assert torch.equal(stacked.to_dense()[0], masks)


def test_random_runs_follow_their_share_and_seed():
    grid = TokenGrid(16, 16, 16)
    one = patterns.RandomGlobal(share=0.25, first=0, run=16)
    density = one.block_mask(grid, (16, 16)).token_density
    assert density == pytest.approx(0.25, abs=0.02)
    assert torch.equal(one.token_mask(TokenGrid(2, 4, 8)), one.token_mask(TokenGrid(2, 4, 8)))
    other = patterns.RandomGlobal(share=0.25, first=0, run=16, seed=1)
    assert not torch.equal(one.token_mask(TokenGrid(4, 8, 8)), other.token_mask(TokenGrid(4, 8, 8)))
    assert patterns.RandomGlobal(share=0.0, first=1, run=4).token_mask(TokenGrid(1, 4, 4))[:, :4].all()
