"""Families that cannot put tokens in order once a forward move q, k, v and the output of every sparse call instead."""

from __future__ import annotations

import pytest
import torch

import sparsereel
from sparsereel import AttentionPlan, TokenGrid, selectors
from sparsereel.families.layout import text, video
from sparsereel.inject import injection_of
from sparsereel.inspection import Architecture, inspect_plan
from sparsereel.launches import Choice, Launch, run_launches
from sparsereel.patterns import SlidingTile, Spatial, Temporal
from sparsereel.selectors import SelectionContext
from sparsereel_kernels import FrameDecay, KeyBias, sparse_attention

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = SlidingTile(window=(1, 1, 1), tile=(4, 8, 8))
TEXT = 8


def larger(tiny, name):
    """(model, inputs, the grid whose order is changed): sizes at which tiles side by side pay."""
    model = tiny.CASES[name].model()
    g = torch.Generator().manual_seed(5)
    if name == "hunyuan_video":
        inputs = {**tiny.hunyuan_inputs(), "hidden_states": torch.randn(tiny.BATCH, 4, 4, 32, 32, generator=g)}
        return model, inputs, TokenGrid(4, 16, 16, text=TEXT)
    if name == "cogvideox":
        return model, tiny.cogvideox_inputs(4, 32, 32), TokenGrid(4, 16, 16, text=TEXT, text_side="before")
    return model, tiny.unet_inputs(32, 32), TokenGrid(1, 32, 32)


def masked_grids(grid):
    """The grids of all self-attention calls."""
    return (grid,) if grid.frames > 1 else (grid, TokenGrid(1, 16, 16), TokenGrid(1, 8, 8))


@pytest.mark.parametrize("name", ["hunyuan_video", "cogvideox", "unet"])
def test_moved_calls_equal_dense_under_the_token_mask(tiny, name):
    model, inputs, grid = larger(tiny, name)
    before = tiny.run(model, inputs)
    with tiny.dense_under(tiny.same_mask(NEAR), masked_grids(grid)):
        expected = tiny.run(model, inputs)
    with sparsereel.sparsified(model, NEAR):
        actual = tiny.run(model, inputs)
        rows = list(sparsereel.report(model).layers)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (actual - before).abs().max() > 1e-2
    in_tiles = NEAR.block_mask(grid, order=grid.tile_order((4, 8, 8))).density
    assert in_tiles < 0.9 * NEAR.block_mask(grid).density
    assert in_tiles in [pytest.approx(row.density) for row in rows]
    assert torch.equal(tiny.run(model, inputs), before)


@pytest.fixture
def in_grid_order(monkeypatch):
    """A switch: no order saves enough any more."""
    return lambda: monkeypatch.setattr("sparsereel.token_order.CALL_SAVING", 1.0)


def gradients(model, inputs):
    model.zero_grad()
    leaf = inputs["hidden_states"].clone().requires_grad_()
    model(**{**inputs, "hidden_states": leaf}, return_dict=False)[0].square().mean().backward()
    return [leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_grid_order(tiny, in_grid_order, checkpointing):
    model, inputs, _ = larger(tiny, "hunyuan_video")
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
    with sparsereel.sparsified(model, NEAR):
        moved = gradients(model, inputs)
        moved_density = sparsereel.report(model).density
    in_grid_order()
    with sparsereel.sparsified(model, NEAR):
        plain = gradients(model, inputs)
        assert moved_density < 0.9 * sparsereel.report(model).density
    for a, b in zip(moved, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hunyuan_video", "cogvideox"])
def test_compiled_models_move_calls_too(tiny, name):
    model, inputs, grid = larger(tiny, name)
    in_tiles = NEAR.block_mask(grid, order=grid.tile_order((4, 8, 8))).density
    with sparsereel.sparsified(model, NEAR):
        eager = tiny.run(model, inputs)
        compiled = torch.compile(model, backend="aot_eager")
        found = tiny.run(compiled, inputs)
        rows = list(sparsereel.report(model).layers)
    torch.compiler.reset()
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
    assert all(row.calls == 2 and row.density == pytest.approx(in_tiles) for row in rows)


def test_selectors_see_tiles(tiny):
    """What keeps everything changes nothing; a plan of heads of both kinds keeps what its patterns allow."""
    model, inputs, _ = larger(tiny, "hunyuan_video")
    before = tiny.run(model, inputs)
    for name, arguments in (("svg2", {"threshold": 1.0}), ("vsa", {"density": 1.0}), ("block_topk", {"density": 1.0})):
        with sparsereel.sparsified(model, AttentionPlan.uniform(selectors.make(name, **arguments))):
            torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-5, atol=1e-5)
    layers = {"*": {"default": {"selector": "block_topk", "density": 1.0}, "heads": {"0": "near"}}}
    mixed = {
        "version": 1,
        "patterns": {"near": {"sliding_tile": {"window": [1, 1, 1], "tile": [4, 8, 8]}}},
        "components": {"transformer": {"layers": layers}},
    }
    plain = {**mixed, "components": {"transformer": {"layers": {"*": {"default": "full", "heads": {"0": "near"}}}}}}
    found = []
    for plan in (mixed, plain):
        with sparsereel.sparsified(model, AttentionPlan.from_dict(plan)):
            found.append(tiny.run(model, inputs))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert (found[0] - before).abs().max() > 1e-2


def test_orders_that_do_not_pay_are_not_put_on(tiny):
    """Whole frames lie side by side as they are."""
    model, inputs, grid = larger(tiny, "hunyuan_video")
    with sparsereel.sparsified(model, Spatial(0)):
        tiny.run(model, inputs)
        assert injection_of(model).runtime.call_tile((*video(4, 16, 16), *text(TEXT))) is None
        assert sparsereel.report(model).density == pytest.approx(Spatial(0).block_mask(grid).density)


def test_key_lengths_never_cut_what_is_moved(tiny):
    model, inputs, _ = larger(tiny, "cogvideox")
    layout = (*text(TEXT), *video(4, 16, 16))
    with sparsereel.sparsified(model, NEAR):
        tiny.run(model, inputs)
        runtime = injection_of(model).runtime
        assert runtime.call_tile(layout) == (4, 8, 8)
        assert runtime.call_tile(layout, padded=True) is None
        assert runtime.call_tile((*video(4, 16, 16), *text(TEXT)), padded=True) == (4, 8, 8)


# ------------------------------------------------------------------ heads with orders of their own

HEADS = (Spatial(0), Temporal(1))
BOTH = {
    "version": 1,
    "patterns": {"frames": {"spatial": {"frames": 0}}, "columns": {"temporal": {"width": 1}}},
    "components": {"transformer": {"layers": {"*": {"default": "frames", "heads": {"1": "columns"}}}}},
}


def long(tiny, name):
    """A clip long enough for heads to be moved by themselves."""
    g = torch.Generator().manual_seed(5)
    model = tiny.CASES[name].model()
    if name == "wan":
        return model, tiny.wan_inputs(16, 32, 32), TokenGrid(16, 16, 16)
    inputs = {**tiny.hunyuan_inputs(), "hidden_states": torch.randn(tiny.BATCH, 4, 16, 32, 32, generator=g)}
    inputs["encoder_attention_mask"] = torch.ones(tiny.BATCH, TEXT, dtype=torch.long)
    return model, inputs, TokenGrid(16, 16, 16, text=TEXT)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_temporal_heads_run_in_columns_beside_spatial_ones(tiny, name):
    model, inputs, grid = long(tiny, name)
    with tiny.dense_under(lambda call, grid: torch.stack([p.token_mask(grid) for p in HEADS]), (grid,)):
        expected = tiny.run(model, inputs)
    plan = AttentionPlan.from_dict(BOTH)
    with sparsereel.sparsified(model, plan):
        actual = tiny.run(model, inputs)
        rows = list(sparsereel.report(model).layers)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    columns = grid.tile_order(HEADS[1].preferred_tile(grid))
    in_own = (HEADS[0].block_mask(grid).density + HEADS[1].block_mask(grid, order=columns).density) / 2
    in_one = sum(pattern.block_mask(grid).density for pattern in HEADS) / 2
    assert in_own < 0.5 * in_one
    assert all(row.density == pytest.approx(in_own) for row in rows)


def test_moved_heads_have_gradients_and_a_compiled_model_keeps_one_order(tiny):
    model, inputs, grid = long(tiny, "wan")
    with sparsereel.sparsified(model, AttentionPlan.from_dict(BOTH)):
        moved = gradients(model, inputs)
        eager = tiny.run(model, inputs)
        found = tiny.run(torch.compile(model, backend="aot_eager"), inputs)
    torch.compiler.reset()
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
    with tiny.dense_under(lambda call, grid: torch.stack([p.token_mask(grid) for p in HEADS]), (grid,)):
        plain = gradients(model, inputs)
    for a, b in zip(moved, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_inspect_tells_what_a_run_visits(tiny):
    model, inputs, grid = long(tiny, "wan")
    plan = AttentionPlan.from_dict(BOTH)
    names = tuple(f"blocks.{number}.attn1" for number in range(3))
    architecture = Architecture("wan", "transformer", "WanTransformer3DModel", names, 2, 16)
    with sparsereel.sparsified(model, plan):
        tiny.run(model, inputs)
        assert inspect_plan(plan, grid, architecture).density == pytest.approx(sparsereel.report(model).density)


# ------------------------------------------------------------------ modifiers


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", ["svg", "svg2", "vsa"])
def test_a_bias_of_keys_follows_them_where_a_selector_moves_tokens(name, dims, kv_heads):
    grid = TokenGrid(4, 8, 8, text=20)
    q, k, v = (torch.randn(2, heads, grid.seq_len, 16) for heads in (4, kv_heads, kv_heads))
    bias = torch.randn(2, 4, grid.seq_len)
    bias[1, :, 5:60] = -torch.inf
    bias = bias[1, 0] if dims == 1 else bias[:, 0] if dims == 2 else bias
    everything = {"svg": {"density": 1.0}, "svg2": {"threshold": 1.0}, "vsa": {"density": 1.0}}[name]
    found = selectors.make(name, **everything)(q, k, SelectionContext(grid, (32, 16)))
    choice = Choice.of([Launch(None, found.mask, found)], 4)
    assert choice.launches[0].moves_tokens
    out = run_launches(q, k, v, choice, modifier=KeyBias(bias), backend="torch")
    expected = sparse_attention(q, k, v, None, modifier=KeyBias(bias), backend="torch")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_other_modifiers_are_refused_where_heads_have_orders_of_their_own():
    grid = TokenGrid(4, 8, 8)
    q, k, v = torch.randn(3, 1, 2, grid.seq_len, 16)
    frames = torch.arange(grid.seq_len, dtype=torch.int32) // 64
    decay = FrameDecay(frames, frames, torch.tensor([1.0, 0.5]))
    found = selectors.make("vsa", density=1.0)(q, k, SelectionContext(grid, (32, 16)))
    with pytest.raises(ValueError, match="FrameDecay does not go with a selector that moves tokens"):
        run_launches(q, k, v, Choice.of([Launch(None, found.mask, found)], 2), modifier=decay, backend="torch")


@pytest.mark.parametrize("kind", ["bias", "decay", None])
def test_an_order_of_the_call_takes_modifiers_with_it(kind):
    grid = TokenGrid(4, 16, 16, text=TEXT)
    q, k, v = torch.randn(3, 2, 2, grid.seq_len, 16)
    frames = torch.full((grid.seq_len,), -1, dtype=torch.int32)
    frames[: grid.video_len] = torch.arange(grid.video_len, dtype=torch.int32) // 256
    modifier = {
        "bias": KeyBias(torch.randn(2, grid.seq_len)),
        "decay": FrameDecay(frames, frames, torch.tensor([1.0, 0.8, 0.5])),
        None: None,
    }[kind]
    order = grid.tile_order((4, 8, 8))
    moved = Choice.of([Launch(None, NEAR.block_mask(grid, order=order))], 2)
    moved = Choice(moved.launches, moved.density, moved.token_density, order)
    plain = Choice.of([Launch(None, NEAR.block_mask(grid))], 2)
    found, expected = (run_launches(q, k, v, x, modifier=modifier, backend="torch") for x in (moved, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
