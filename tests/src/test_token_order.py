"""Which order of tokens is chosen, and for which kernel."""

from __future__ import annotations

import pytest
import torch

import sparsereel
from sparsereel import TokenGrid, selectors
from sparsereel.inject import injection_of
from sparsereel.kernel_choice import kernel_for
from sparsereel.patterns import Full, Neighborhood, Radial, SlidingTile, Spatial
from sparsereel.token_order import (
    GENERAL_TILE,
    STRIP_TILES,
    best_mask,
    best_tile,
    candidate_tiles,
    mask_in_order,
    own_tile,
    work_in_order,
)
from sparsereel_kernels.cost import work_share

GRID = TokenGrid(8, 32, 32)
WINDOW = Neighborhood(window=(3, 9, 9))


def test_the_cpu_kernel_has_tiles_of_one_strip_where_they_are_less_work():
    chosen = best_tile({WINDOW: 1}, GRID, kernel="cpu")
    assert chosen in STRIP_TILES
    tiles = [None, *candidate_tiles([WINDOW], GRID, "cpu")]
    work = {tile: work_in_order(WINDOW, GRID, tile, "cpu") for tile in tiles}
    assert min(work, key=lambda tile: work[tile]) == chosen
    # 0.0591 of the cells beside 0.0911 in the model's own order, which touches the fewest blocks.
    assert work[chosen] < 0.75 * work[None]
    assert mask_in_order((WINDOW,), GRID, chosen).density > mask_in_order((WINDOW,), GRID, None).density


def test_other_kernels_pay_for_blocks():
    for kernel in ("", "triton", "flex", "torch"):
        assert best_tile({WINDOW: 1}, GRID, kernel=kernel) is None
        assert candidate_tiles([WINDOW], GRID, kernel) == [GENERAL_TILE]
        mask = best_mask(WINDOW, GRID, kernel)
        assert work_share(mask, kernel) == pytest.approx(mask.density)


@pytest.mark.parametrize("kernel", ["", "cpu"])
def test_the_models_own_order_wins_a_tie(kernel):
    assert best_tile({Full(): 3}, GRID, kernel=kernel) is None
    assert best_mask(Full(), GRID, kernel) is None
    # Whole frames: one after the other in the model's order already.
    assert best_tile({Spatial(0): 1}, GRID, kernel=kernel) is None


def test_aligned_windows_keep_their_own_tiles_on_every_kernel():
    tiles = SlidingTile(window=(1, 3, 3), tile=(4, 8, 8))
    for kernel in ("", "cpu"):
        assert best_tile({tiles: 1}, GRID, kernel=kernel) == (4, 8, 8)
        mask = best_mask(tiles, GRID, kernel)
        assert mask.density == mask.cell_density == mask.token_density


def test_no_other_order_is_tried_where_the_models_own_is_near_the_least_work_possible(monkeypatch):
    tried = []

    def noting(pattern, grid, tile, kernel):
        tried.append(tile)
        return work_in_order(pattern, grid, tile, kernel)

    monkeypatch.setattr("sparsereel.token_order.work_in_order", noting)
    assert best_tile({Radial(): 1}, GRID, kernel="cpu") is None
    assert set(tried) == {None}
    assert best_tile({Radial(): 1, WINDOW: 1}, GRID, kernel="cpu") is None
    assert set(tried) == {None, GENERAL_TILE, *STRIP_TILES}


def test_what_most_heads_want_decides():
    assert best_tile({WINDOW: 1, Radial(): 30}, GRID, kernel="cpu") is None
    assert best_tile({WINDOW: 30, Radial(): 1}, GRID, kernel="cpu") in STRIP_TILES
    assert best_tile({WINDOW: 1, selectors.make("block_topk"): 2}, GRID, kernel="cpu") == GENERAL_TILE


def test_selectors_keep_the_general_tile_where_another_order_hardly_saves(monkeypatch):
    # The general tile is far more work here: the saving decides.
    assert best_tile({WINDOW: 3, selectors.make("block_topk"): 1}, GRID, kernel="cpu") in STRIP_TILES
    monkeypatch.setattr("sparsereel.token_order.SELECTOR_SAVING", 0.5)
    assert best_tile({WINDOW: 3, selectors.make("block_topk"): 1}, GRID, kernel="cpu") == GENERAL_TILE


def test_an_order_of_every_call_has_to_save_its_own_cost(monkeypatch):
    assert best_tile({WINDOW: 1}, GRID, every_call=True, kernel="cpu") in STRIP_TILES
    monkeypatch.setattr("sparsereel.token_order.CALL_SAVING", 0.6)
    assert best_tile({WINDOW: 1}, GRID, every_call=True, kernel="cpu") is None


def test_heads_move_by_what_their_kernel_pays():
    grid = TokenGrid(4, 32, 32)
    tiles = SlidingTile(window=(1, 1, 1), tile=(4, 8, 8))
    assert own_tile(tiles, grid, None, "cpu") == own_tile(tiles, grid, None) == (4, 8, 8)
    assert own_tile(WINDOW, GRID, (1, 4, 4), "cpu") == (1, 4, 4)


def test_kernel_for_names_what_runs(monkeypatch):
    assert kernel_for("torch", "cpu", torch.float32, 512) == "torch"
    monkeypatch.setenv("SPARSEREEL_BACKEND", "torch")
    assert kernel_for("auto", "cpu", torch.float32, 512) == "torch"
    assert kernel_for("flex", "cpu", torch.float64, 512) == ""
    with pytest.raises(ValueError, match="backend must be one of"):
        kernel_for("fast", "cpu", torch.float32, 512)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_model_runs_in_the_order_of_its_kernel_and_equals_dense_under_the_mask(tiny, backend):
    grid = TokenGrid(4, 16, 16, text=8)
    window = Neighborhood(window=(4, 5, 5))
    model = tiny.CASES["hunyuan_video"].model()
    g = torch.Generator().manual_seed(5)
    inputs = {**tiny.hunyuan_inputs(), "hidden_states": torch.randn(tiny.BATCH, 4, 4, 32, 32, generator=g)}
    with tiny.dense_under(tiny.same_mask(window), (grid,)):
        expected = tiny.run(model, inputs)
    if kernel_for(backend, "cpu", torch.float32, grid.seq_len) != backend:
        pytest.skip(f"backend {backend} cannot run here")
    with sparsereel.sparsified(model, window, backend=backend):
        actual = tiny.run(model, inputs)
        orders = set(injection_of(model).runtime._tiles.values())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    wanted = best_tile({window: 1}, grid, every_call=True, kernel=backend)
    assert orders == {wanted}
    assert (wanted in STRIP_TILES) == (backend == "cpu")
