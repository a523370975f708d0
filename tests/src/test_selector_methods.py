"""Each method against a plain reference, and on inputs with a planted structure."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sparsereel.grid import TokenGrid
from sparsereel.patterns import Spatial, Temporal
from sparsereel.selectors import SelectionContext, make
from sparsereel.selectors.kmeans import kmeans, nearest
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.probing import block_mass
from sparsereel.selectors.sampling import sampled_queries
from sparsereel.selectors.segments import arrangement, reached_blocks
from sparsereel.selectors.spargeattn import block_similarity
from sparsereel_kernels.block_lists import FULL

BLOCK = (32, 16)
GRID = TokenGrid(4, 8, 8)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(selector, q, k, grid=GRID, block=BLOCK):
    """bool [B, H, nQ, nK]."""
    return selector(q, k, SelectionContext(grid, block)).mask.block_map() == FULL


def attention(q, k):
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)


def block_sums(weights, block=BLOCK):
    """[B, H, S, S] to sums over blocks; lengths must divide."""
    return weights.unflatten(3, (-1, block[1])).sum(4).unflatten(2, (-1, block[0])).sum(3)


def constant_in_blocks(count, block, seed, dim=16):
    """[1, 2, count * block, dim], tokens of a block alike."""
    return normal(1, 2, count, dim, seed=seed).repeat_interleave(block, 2)


def column_of(where, tokens=256, dim=16):
    """q and k [1, 1, tokens, dim] in which every query looks at the keys `where`."""
    direction = normal(dim, seed=5) / 2
    k = 0.3 * normal(1, 1, tokens, dim)
    k[:, :, where] = 10 * direction
    return direction + 0.1 * normal(1, 1, tokens, dim, seed=1), k


def slanted(distance, tokens=256, dim=32):
    """q and k in which query i looks at key i - distance."""
    k = normal(1, 1, tokens, dim, seed=2)
    return 3 * k.roll(distance, 2), k


# ------------------------------------------------------------------ pooled scores


def test_block_topk_takes_the_best_products_of_means():
    q, k = normal(1, 2, 256, 16), normal(1, 2, 256, 16, seed=1)
    means = q.view(1, 2, 8, 32, 16).mean(3) @ k.view(1, 2, 16, 16, 16).mean(3).transpose(-1, -2)
    expected = torch.zeros(1, 2, 8, 16, dtype=torch.bool).scatter_(-1, means.topk(4).indices, True)
    assert torch.equal(blocks(make("block_topk", density=0.25), q, k), expected)


@pytest.mark.parametrize("name", ["block_topp", "xattention", "spargeattn"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_where_tokens_of_a_block_are_alike_the_kept_mass_is_exact(name, share):
    q, k = constant_in_blocks(8, 32, 1), constant_in_blocks(16, 16, 2)
    options = {"flavour": "cdf", "include_crossing": True} if name == "spargeattn" else {}
    chosen = blocks(make(name, threshold=share, **options), q, k)
    mass = block_sums(attention(q, k)) / BLOCK[0]
    kept = (mass * chosen).sum(-1)
    assert bool((kept >= share - 1e-5).all())
    # Without its smallest block no row would do.
    smallest = mass.masked_fill(~chosen, math.inf).amin(-1)
    assert bool((kept - smallest < share + 1e-5).all())


def test_topp_keeps_the_minimum():
    q, k = normal(1, 2, 256, 16), normal(1, 2, 256, 16, seed=1)
    assert bool((blocks(make("block_topp", threshold=0.01, min_density=0.5), q, k).sum(-1) >= 8).all())
    assert bool((blocks(make("block_topp", threshold=0.01), q, k).sum(-1) == 1).all())


# ------------------------------------------------------------------ spargeattn


def test_similarity_is_the_mean_cosine_of_pairs():
    x = normal(1, 1, 100, 16)
    cut = Partition.of(TokenGrid(1, 10, 10), BLOCK)
    found = block_similarity(x, 16, cut.k_sizes, cut)
    for j in range(7):
        unit = torch.nn.functional.normalize(x[0, 0, j * 16 : (j + 1) * 16], dim=-1)
        torch.testing.assert_close(found[0, 0, j], (unit @ unit.T).mean())
    assert bool(
        (block_similarity(constant_in_blocks(16, 16, 0), 16, Partition.of(GRID, BLOCK).k_sizes, cut) > 0.99).all()
    )


def test_blocks_that_are_not_alike_are_not_judged_by_their_mean():
    q, k = constant_in_blocks(8, 32, 1), constant_in_blocks(16, 16, 2)
    q[:, :, 64:96], k[:, :, 48:64] = normal(1, 2, 32, 16), normal(1, 2, 16, 16)
    chosen = blocks(make("spargeattn", flavour="cdf", threshold=0.3, smooth=False), q, k)
    assert bool(chosen[:, :, 2].all())
    assert bool(chosen[:, :, :, 3].all())
    assert chosen.float().mean() < 0.6


def test_the_crossing_block_is_left_out_unless_asked_for():
    q, k = constant_in_blocks(8, 32, 1), constant_in_blocks(16, 16, 2)
    without, with_it = (
        blocks(make("spargeattn", flavour="cdf", threshold=0.7, include_crossing=x), q, k) for x in (False, True)
    )
    mass = block_sums(attention(q, k)) / BLOCK[0]
    kept = (mass * without).sum(-1)
    assert bool(((kept <= 0.7) | (without.sum(-1) == 1)).all())
    assert bool((with_it | ~without).all())
    assert bool((with_it.sum(-1) - without.sum(-1) <= 1).all())
    assert bool((with_it != without).any())


def test_a_common_part_of_all_keys_does_not_matter_when_smoothed():
    q, k = constant_in_blocks(8, 32, 1), normal(1, 2, 256, 16)
    smooth = make("spargeattn", flavour="cdf", threshold=0.5, similarity=0.05)
    shift = 5 * normal(16, seed=3)
    assert torch.equal(blocks(smooth, q, k), blocks(smooth, q, k + shift))
    rough = make("spargeattn", flavour="cdf", threshold=0.5, similarity=0.05, smooth=False)
    assert not torch.equal(blocks(rough, q, k), blocks(rough, q, k + shift))


def test_sparge_sink_keeps_the_first_block():
    q, k = normal(1, 2, 256, 16), normal(1, 2, 256, 16, seed=1)
    assert not bool(blocks(make("spargeattn", density=0.05), q, k)[..., 0].all())
    assert bool(blocks(make("spargeattn", density=0.05, sink=True), q, k)[..., 0].all())


# ------------------------------------------------------------------ xattention, vertical-slash


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 7, 9)])
def test_xattention_with_stride_one_sums_blocks_exactly(grid):
    q, k = normal(1, 2, grid.seq_len, 16), normal(1, 2, grid.seq_len, 16, seed=1)
    cut = Partition.of(grid, BLOCK)
    found = make("xattention", stride=1).scores(q, k, cut, 16**-0.5)
    torch.testing.assert_close(found, block_mass(q, k, cut, 16**-0.5) * cut.q_sizes[:, None, :, None])


def test_xattention_does_not_depend_on_how_rows_are_cut(monkeypatch):
    grid = TokenGrid(3, 7, 9)
    q, k = normal(1, 2, grid.seq_len, 16), normal(1, 2, grid.seq_len, 16, seed=1)
    cut, selector = Partition.of(grid, BLOCK), make("xattention")
    whole = selector.scores(q, k, cut, 0.25)
    monkeypatch.setattr("sparsereel.selectors.partition.NUMBERS_AT_ONCE", {"cpu": 1})
    torch.testing.assert_close(selector.scores(q, k, cut, 0.25), whole)


def test_xattention_scores_are_the_means_of_antidiagonals():
    q, k = normal(1, 1, 64, 8), normal(1, 1, 64, 8, seed=1)
    cut, stride = Partition.of(TokenGrid(1, 8, 8), BLOCK), 8
    logits = (q @ k.transpose(-1, -2))[0, 0]
    cells = torch.zeros(8, 8)
    for n in range(8):
        for m in range(8):
            cells[n, m] = sum(logits[8 * n + stride - 1 - r, 8 * m + r] for r in range(stride)) / stride
    expected = cells.mul(0.5).softmax(-1).unflatten(1, (4, 2)).sum(2).unflatten(0, (2, 4)).sum(1)
    torch.testing.assert_close(make("xattention").scores(q, k, cut, 0.5)[0, 0], expected)


@pytest.mark.parametrize("name", ["xattention", "vertical_slash"])
def test_a_planted_column_is_found(name):
    q, k = column_of(slice(112, 128))
    arguments = {"threshold": 0.5} if name == "xattention" else {"vertical": 0.1, "slash": 0.0}
    chosen = blocks(make(name, **arguments), q, k)
    assert bool(chosen[..., 7].all())
    assert chosen.float().mean() < 0.5


@pytest.mark.parametrize("name", ["xattention", "vertical_slash", "sparsed"])
def test_a_planted_diagonal_is_found(name):
    # An odd distance: with an even stride antidiagonals meet no diagonal at an even one.
    q, k = slanted(97)
    arguments = {"xattention": {"threshold": 0.6, "stride": 4}, "sparsed": {"density": 0.2}}
    chosen = blocks(make(name, **arguments.get(name, {"vertical": 0.0, "slash": 0.1, "samples": 32})), q, k)[0, 0]
    for i in range(3, 8):
        assert bool(chosen[i, 2 * (i - 3) : 2 * (i - 3) + 2].all())
    assert chosen.float().mean() < 0.5


def test_vertical_slash_without_budget_keeps_the_first_block_and_the_diagonal():
    q, k = normal(1, 2, 256, 16), normal(1, 2, 256, 16, seed=1)
    chosen = blocks(make("vertical_slash", vertical=0.0, slash=0.0), q, k)
    i, j = torch.arange(8)[:, None], torch.arange(16)
    near = ((j >= 2 * i - 1) & (j <= 2 * i + 2)) | (j == 0)
    assert torch.equal(chosen, near.expand(1, 2, 8, 16))


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 7, 9)])
@pytest.mark.parametrize("block", [(32, 16), (16, 64), (24, 40)])
def test_line_scores_and_the_blocks_on_a_diagonal_match_loops(grid, block):
    from sparsereel.selectors.vertical_slash import _blocks_on, _line_scores

    cut = Partition.of(grid, block)
    positions = sampled_queries(cut, 9)
    weights = torch.rand(1, 2, 9, grid.seq_len, generator=torch.Generator().manual_seed(0))
    nk = cut.counts[1]
    columns, diagonals = torch.zeros(1, 2, nk), torch.zeros(1, 2, 2 * nk + 1)
    for n, position in enumerate(positions[0].tolist()):
        for key in range(grid.seq_len):
            columns[..., key // block[1]] += weights[:, :, n, key]
            diagonals[..., (position - key) // block[1] + nk] += weights[:, :, n, key]
    found = _line_scores(weights, positions, cut)
    torch.testing.assert_close(found[0], columns, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], diagonals, atol=1e-4, rtol=1e-4)
    kept = torch.zeros(1, 1, 2 * nk + 1, dtype=torch.bool)
    kept[..., [nk - 2, nk + 1]] = True
    apart = torch.arange(cut.counts[0] * block[0])[:, None] - torch.arange(nk * block[1])
    met = kept[0, 0][(apart.div(block[1], rounding_mode="floor") + nk).clamp(0, 2 * nk)]
    # Blocks whole in tokens: the last may reach past the sequence.
    expected = met.unflatten(1, (nk, block[1])).any(2).unflatten(0, (-1, block[0])).any(1)
    assert torch.equal(_blocks_on(kept, cut)[0, 0], expected)


def test_samples_are_spread_over_the_valid_video():
    grid = TokenGrid(8, 6, 6, text=30, text_side="before")
    cut = Partition.of(grid, BLOCK, key_lengths=torch.tensor([318, 30 + 36]))
    positions = sampled_queries(cut, 16)
    frames = (positions - 30) // 36
    assert sorted(frames[0].unique().tolist()) == list(range(8))
    assert bool((frames[1] == 0).all())
    assert bool((positions[:, 1:] > positions[:, :-1]).all())
    assert sampled_queries(cut, 10**6).shape == (2, 288)


# ------------------------------------------------------------------ svg, svg2, vsa


def heads_of_two_kinds(grid, dim=32):
    """q and k [1, 2, S, dim]: head 0 looks at its own frame, head 1 at its own place."""
    t, h, w = grid.coordinates()
    codes = [normal(grid.frames, dim)[t], normal(grid.frame_len, dim, seed=1)[h * grid.width + w]]
    k = torch.stack(codes)[None]
    return 2 * k + 0.1 * normal(*k.shape, seed=2), k


@pytest.mark.parametrize("tiled", [False, True])
def test_svg_tells_spatial_from_temporal_heads(tiled):
    grid = TokenGrid(8, 8, 8)
    order = grid.tile_order((2, 4, 4)) if tiled else None
    q, k = heads_of_two_kinds(grid)
    if order is not None:
        q, k = order.apply(q, 2), order.apply(k, 2)
    context = SelectionContext(grid, (16, 16), order=order)
    selector = make("svg", density=0.2)
    cut = selector.partition(context, q.device)
    assert selector.temporal_heads(q, k, cut, context).tolist() == [[False, True]]
    selection = selector(q, k, context)
    seen = selection.mask.to_dense()
    for axis, moved in ((2, selection.order_q), (3, selection.order_k)):
        index = moved.unsqueeze(5 - axis).expand(seen.shape)
        seen = torch.zeros_like(seen).scatter_(axis, index, seen)
    spatial, temporal = selector._patterns(grid)
    for head, pattern in enumerate((spatial, temporal)):
        allowed = pattern.token_mask(grid)
        if order is not None:
            allowed = allowed[order.indices][:, order.indices]
        assert bool((seen[0, head] | ~allowed).all())
    # Place by place, what a temporal head visits is hardly more than what it needs.
    still = make("svg", density=0.2, reorder=False)(q, k, context)
    assert selection.mask.head(1).density <= still.mask.head(1).density


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_svg_takes_the_widest_patterns_within_the_density(density):
    grid = TokenGrid(7, 9, 6)
    spatial, temporal = make("svg", density=density)._patterns(grid)
    for pattern, wider, least in (
        (spatial, Spatial(spatial.frames + 1), Spatial(0)),
        (temporal, Temporal(int(temporal.width) + 1), Temporal(0)),
    ):
        share = pattern.token_mask(grid).float().mean()
        assert share <= density + 1e-6 or pattern == least
        assert wider.token_mask(grid).float().mean() > density or share == 1


def test_kmeans_inertia_never_rises_and_empty_clusters_stay():
    x = normal(1, 2, 200, 8)
    start = x[:, :, :10].clone()
    start[:, :, 3] = 1e3
    outside = torch.zeros(1, 200, dtype=torch.bool)
    inertias = []
    for iterations in range(6):
        labels, centroids = kmeans(x, start, iterations, outside)
        labels = nearest(x, centroids)
        near = centroids.gather(2, labels[..., None].expand(x.shape))
        inertias.append(float((x - near).square().sum()))
        assert torch.equal(centroids[:, :, 3], start[:, :, 3])
    assert all(after <= before + 1e-3 for before, after in pairwise(inertias))
    assert inertias[-1] < inertias[0]
    labels, centroids = kmeans(x, start, 0, outside)
    assert torch.equal(labels, torch.cdist(x, start).argmin(-1))
    assert torch.equal(centroids, start)


def test_kmeans_means_leave_out_what_is_outside():
    x = normal(1, 1, 50, 4)
    outside = torch.arange(50)[None] >= 40
    labels, centroids = kmeans(x, x[:, :, :3].clone(), 5, outside)
    for c in range(3):
        members = x[0, 0, :40][labels[0, 0, :40] == c]
        torch.testing.assert_close(centroids[0, 0, c], members.mean(0))


@pytest.mark.parametrize("flavour", ["clusters", "blocks"])
def test_svg2_gathers_scattered_tokens_of_a_kind(flavour):
    kinds = torch.arange(256) % 8
    # k-means starts from these tokens; one of each kind, so that it cannot end in a poor optimum.
    starts = sampled_queries(Partition.of(GRID, (32, 32)), 8)[0]
    for kind, start in enumerate(starts.tolist()):
        other = next(i for i in range(256) if kinds[i] == kind and i not in starts)
        kinds[other], kinds[start] = kinds[start].clone(), kind
    codes = 6 * torch.nn.functional.normalize(normal(8, 32), dim=-1)
    k = codes[kinds][None, None] + 0.01 * normal(1, 1, 256, 32)
    q = codes[kinds][None, None] + 0.01 * normal(1, 1, 256, 32, seed=1)
    selector = make("svg2", threshold=0.9, min_density=0.0, query_clusters=8, key_clusters=8, flavour=flavour)
    selection = selector(q, k, SelectionContext(GRID, (32, 32)))
    assert selection.mask.density == 1 / 8
    assert torch.equal(
        kinds[selection.order_q[0, 0]].view(8, 32), kinds[selection.order_q[0, 0]].view(8, 32)[:, :1].expand(8, 32)
    )
    weights = attention(*selection.arrange(q, k, k)[:2])
    assert (weights * selection.mask.to_dense()).sum(-1).min() > 0.9
    assert (block_sums(attention(q, k), (32, 32)) / 32).amax() < 0.2


def test_svg2_keeps_the_least_number_of_clusters():
    q, k = 3 * normal(1, 2, 256, 16), 3 * normal(1, 2, 256, 16, seed=1)
    context = SelectionContext(GRID, (16, 16))
    few, many = (make("svg2", threshold=0.01, min_density=least)(q, k, context).mask.density for least in (0.0, 0.5))
    assert few < 0.5 < many


def test_svg2_weighs_clusters_by_their_size():
    selector = make("svg2", threshold=0.9, min_density=0.0)
    q_means, k_means = normal(1, 1, 3, 8), normal(1, 1, 5, 8, seed=1)
    sizes = torch.tensor([[[40, 3, 0, 9, 12, 0, 0]]])
    kept = selector._clusters_kept(q_means, k_means, sizes, 0.3)
    tokens = k_means[0, 0].repeat_interleave(sizes[0, 0, :5], 0)
    weights = torch.softmax(0.3 * q_means[0, 0] @ tokens.T, -1)
    owner = torch.arange(5).repeat_interleave(sizes[0, 0, :5])
    mass = torch.zeros(3, 5).index_add_(1, owner, weights)
    held = (mass * kept[0, 0]).sum(-1)
    assert bool((held >= 0.9 - 1e-5).all())
    assert bool((held - mass.masked_fill(~kept[0, 0], 2).amin(-1) < 0.9 + 1e-5).all())
    assert not bool(kept[..., 2].any())


def test_segments_reach_the_blocks_that_hold_their_tokens():
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 9, (1, 2, 100), generator=generator) for _ in range(2)]
    (order_q, q_sorted, q_sizes), (_, k_sorted, k_sizes) = (arrangement(x, 10) for x in labels)
    chosen = torch.rand(1, 2, 10, 10, generator=generator) < 0.1
    chosen &= (q_sizes > 0)[..., None] & (k_sizes > 0)[:, :, None]
    found = reached_blocks(chosen, q_sorted, k_sorted, (16, 8))
    for head in range(2):
        assert torch.equal(labels[0][0, head][order_q[0, head]], q_sorted[0, head])
        dense = chosen[0, head][q_sorted[0, head]][:, k_sorted[0, head]]
        padded = torch.nn.functional.pad(dense, (0, 4, 0, 12))
        assert torch.equal(found[0, head], padded.unflatten(1, (13, 8)).any(2).unflatten(0, (7, 16)).any(1))


def test_vsa_rows_hold_exactly_their_number_of_cubes():
    grid = TokenGrid(8, 8, 8)
    q, k = normal(1, 2, 512, 16), normal(1, 2, 512, 16, seed=1)
    selection = make("vsa", density=0.3)(q, k, SelectionContext(grid, (64, 64)))
    assert bool((selection.mask.full_kv_num_blocks == math.ceil(0.3 * 8)).all())
    t, h, w = grid.coordinates()
    cube = ((t // 4) * 2 + h // 4) * 2 + w // 4
    assert torch.equal(cube[selection.order_q[0, 0]], torch.arange(8).repeat_interleave(64))
    q, k, _ = selection.arrange(q, k, k)
    scores = q.unflatten(2, (8, 64)).mean(3) @ k.unflatten(2, (8, 64)).mean(3).transpose(-1, -2)
    expected = torch.zeros(1, 2, 8, 8, dtype=torch.bool).scatter_(-1, scores.topk(3).indices, True)
    assert torch.equal(selection.mask.block_map() == FULL, expected)


# ------------------------------------------------------------------ probes


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 7, 9)])
def test_the_probe_is_the_mean_of_exact_attention(grid, monkeypatch):
    q, k = normal(1, 2, grid.seq_len, 16), normal(1, 1, grid.seq_len, 16, seed=1)
    cut = Partition.of(grid, BLOCK)
    found = block_mass(q, k, cut, 16**-0.5)
    pad = [n * size - grid.seq_len for n, size in zip(cut.counts, BLOCK, strict=True)]
    weights = torch.nn.functional.pad(attention(q, k), (0, pad[1], 0, pad[0]))
    torch.testing.assert_close(found, block_sums(weights) / cut.q_sizes[:, None, :, None])
    monkeypatch.setattr("sparsereel.selectors.partition.NUMBERS_AT_ONCE", {"cpu": 1})
    torch.testing.assert_close(block_mass(q, k, cut, 16**-0.5), found)


def test_sparsed_keeps_the_heaviest_blocks_in_both_flavours():
    q, k = normal(1, 2, 256, 16), normal(1, 2, 256, 16, seed=1)
    mass = block_sums(attention(q, k))
    for flavour, count in (("paper", 4), ("released", 5)):
        chosen = blocks(make("sparsed", density=0.25, flavour=flavour), q, k)
        expected = torch.zeros_like(chosen).scatter_(-1, mass.topk(count).indices, True)
        assert torch.equal(chosen, expected)


def test_adaspa_moves_budget_from_sharp_heads_to_flat_ones():
    sharp_q, sharp_k = column_of(slice(112, 128))
    q = torch.cat([sharp_q, normal(1, 1, 256, 16)], 1)
    k = torch.cat([sharp_k, normal(1, 1, 256, 16, seed=1)], 1)
    even, moved = (blocks(make("adaspa", density=0.25, by_head=x), q, k) for x in (False, True))
    assert even.sum(-1).unique().tolist() == [4]
    assert moved[0, 0].sum(-1).unique().tolist() == [2]
    assert moved[0, 1].sum(-1).unique().tolist() == [6]


# ------------------------------------------------------------------ hip, biformer, anchor, dhsa


@pytest.mark.parametrize("representative", ["middle", "mean"])
def test_hip_finds_the_best_blocks_of_smooth_scores(representative):
    tokens, density = 1024, 0.1
    place = torch.arange(tokens) / tokens
    wave = torch.stack([torch.cos(3 * place), torch.sin(3 * place)], -1)[None, None]
    wave = torch.nn.functional.pad(wave, (0, 6))
    grid = TokenGrid(4, 16, 16)
    chosen = blocks(make("hip", density=density, representative=representative, window=0), wave, wave, grid)
    exact = blocks(make("block_topk", density=density), wave, wave, grid)
    # The own blocks are kept on top, and a border block may go either way.
    found = (chosen & exact).sum(-1) / exact.sum(-1)
    assert found.min() >= 1 - 1 / exact[0, 0, 0].sum()
    assert found.mean() > 0.9


def test_hip_work_grows_with_the_logarithm_of_the_keys():
    costs = [
        make("hip", density=0.1 / f).cost(TokenGrid(f, 64, 64), (128, 64), 1, 64) / (f * 64 * 64) for f in (8, 32, 128)
    ]
    assert costs[0] < costs[1] < costs[2]
    # Keys are 16 times as many, work a query grows by levels alone.
    assert costs[2] < 3 * costs[0]


def test_hip_keeps_its_window():
    q, k = normal(1, 1, 256, 16), normal(1, 1, 256, 16, seed=1)
    chosen = blocks(make("hip", density=0.05, window=20), q, k)[0, 0]
    for i in range(8):
        for j in range(16):
            if (j + 1) * 16 > i * 32 - 20 and j * 16 < (i + 1) * 32 + 20:
                assert bool(chosen[i, j])


def test_biformer_routes_regions_for_all_heads_alike():
    q, k = normal(1, 3, 512, 16), normal(1, 3, 512, 16, seed=1)
    chosen = blocks(make("biformer", density=0.25, region=64), q, k, TokenGrid(8, 8, 8))
    assert torch.equal(chosen[:, :1].expand_as(chosen), chosen)
    joined = [x.transpose(1, 2).flatten(2).unflatten(1, (8, 64)).mean(2) for x in (q, k)]
    affinity = joined[0] @ joined[1].transpose(-1, -2)
    routed = torch.zeros(1, 8, 8, dtype=torch.bool).scatter_(-1, affinity.topk(2).indices, True)
    assert torch.equal(chosen[:, 0], routed.repeat_interleave(2, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("theta", [0.0, 1.5])
def test_anchor_keeps_what_comes_within_theta_of_the_anchor(theta, group):
    grid = TokenGrid(3, 8, 9)
    q, k = 2 * normal(1, 2, 216, 16), normal(1, 2, 216, 16, seed=1)
    logits = q @ k.transpose(-1, -2) * 0.25
    expected = torch.zeros(1, 2, 7, 14, dtype=torch.bool)
    for i in range(7):
        own = torch.zeros(216, dtype=torch.bool)
        start = i // group * group * 32
        own[start : start + group * 32], own[:16] = True, True
        own_blocks = range(start // 16, min(-(-(start + group * 32) // 16), 14))
        rows = slice(i * 32, (i + 1) * 32)
        anchor = logits[:, :, rows][..., own].amax(-1).mean(-1)
        near = logits[:, :, rows].mean(2) + theta >= anchor[..., None]
        near = torch.nn.functional.pad(near, (0, 8)).unflatten(-1, (14, 16)).any(-1)
        near[..., [0, *own_blocks]] = True
        members = slice(i // group * group, i // group * group + group)
        expected[:, :, members] |= near[:, :, None]
    assert torch.equal(blocks(make("anchor", theta=theta, group=group), q, k, grid), expected)


def test_dhsa_with_chunks_like_blocks_is_block_topk():
    q, k = normal(1, 2, 256, 16), normal(1, 2, 256, 16, seed=1)
    chunked = blocks(make("dhsa", density=0.25, chunks="fixed", chunk=16), q, k)
    assert torch.equal(chunked, blocks(make("block_topk", density=0.25), q, k))


def test_dhsa_cuts_where_keys_change():
    edges, start = [37, 90, 150, 201], 0
    k = torch.empty(1, 1, 256, 16)
    for n, stop in enumerate([*edges, 256]):
        k[:, :, start:stop] = normal(16, seed=10 + n) + 0.05 * normal(1, 1, stop - start, 16, seed=n)
        start = stop
    until = torch.nn.functional.pad(k.cumsum(2), (0, 0, 1, 0))
    labels = make("dhsa", chunk=52)._labels(until, Partition.of(GRID, BLOCK))[0, 0]
    found = (labels.diff() > 0).nonzero().flatten() + 1
    assert found.tolist() == edges


def test_dhsa_chunk_vectors_do_not_favour_a_length():
    from sparsereel.selectors.dhsa import _represent

    k = normal(1, 1, 4096, 64)
    labels = torch.cat([torch.zeros(64), torch.ones(1024), torch.full((3008,), 2)]).long()[None, None]
    until = torch.nn.functional.pad(k.cumsum(2), (0, 0, 1, 0))
    vectors, share = _represent(until, labels, 3, Partition.of(TokenGrid(1, 64, 64), (128, 64)))
    norms = vectors.norm(dim=-1)
    assert norms.max() / norms.min() < 1.5
    torch.testing.assert_close(share.sum(-1), torch.ones(1, 1, 64))
    torch.testing.assert_close(vectors[0, 0, 1], k[0, 0, 64:1088].mean(0) * 1024**0.5, atol=1e-3, rtol=1e-3)
