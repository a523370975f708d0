"""Windows around the model, arranged noise, guides, the dual path and coarse attention: parts against plain
restatements, and each in a tiny Wan pipeline."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

import sparsereel
from sparsereel import AttentionPlan, TokenGrid
from sparsereel.extend.cells import cells_of, pool_cells, spread_cells
from sparsereel.extend.dual import DualPath
from sparsereel.extend.guide import Guide, enlarge, low_pass
from sparsereel.extend.mixers import Compressed, Registers
from sparsereel.extend.noise import Antiphase, Rescheduled
from sparsereel.extend.recipes import METHODS, Recipe
from sparsereel.extend.views import Views, blur, window_starts
from sparsereel.extend.windows import Alternating, Entropy, InwardWindow, LocalRegions
from sparsereel.patterns import Neighborhood, Radial
from sparsereel.selectors import make

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"height": 256, "width": 192}


class Short(WanPipeline):
    """A pipeline that was "trained" on 17 frames of 128 x 128: 5 x 8 x 8 tokens."""

    def __call__(self, *args, height=128, width=128, num_frames=17, **kwargs):
        return super().__call__(*args, height=height, width=width, num_frames=num_frames, **kwargs)


@pytest.fixture
def build(tiny):
    def make(scheduler=None):
        pipe, call = tiny.wan_pipe(scheduler or FlowMatchEulerDiscreteScheduler())
        pipe.__class__ = Short

        def run(steps=3, seed=1, **size):
            g = torch.Generator().manual_seed(seed)
            return pipe(**{**call, **size}, num_inference_steps=steps, generator=g).frames

        return pipe, run

    return make


@pytest.fixture
def forward(tiny):
    def run(pipe, frames, height=16, width=16, step=0):
        pipe.scheduler.set_timesteps(10)
        pipe.scheduler._step_index = step
        return tiny.run(pipe.transformer, tiny.wan_inputs(frames, height, width))

    return run


# ------------------------------------------------------------------ all methods in a pipeline


@pytest.mark.parametrize(
    "method", ["sliding", "freenoise", "flex", "freeswim", "demofusion", "cupscale", "registers", "ultragen"]
)
def test_a_native_call_and_restore_are_bit_identical(build, method):
    pipe, run = build()
    size = {"num_frames": 37} if method in ("sliding", "freenoise", "flex") else WIDE
    native, large = run(), run(**size)
    cls = type(pipe)
    report = sparsereel.extend(
        pipe,
        frames=37 if "num_frames" in size else None,
        height=size.get("height"),
        width=size.get("width"),
        method=method,
    )
    assert torch.equal(run(), native)
    out = run(**report.arguments)
    assert out.shape == large.shape
    assert out.isfinite().all()
    assert not torch.equal(out, large)
    assert torch.equal(run(**report.arguments), out)
    sparsereel.sparsify(pipe, AttentionPlan.uniform(Neighborhood(window=(3, 5, 5))))
    assert run(**report.arguments).isfinite().all()
    sparsereel.restore(pipe)
    assert type(pipe) is cls
    assert torch.equal(run(**size), large)
    assert torch.equal(run(), native)
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


def test_methods_are_named_in_the_table():
    assert {"freenoise", "freeswim", "demofusion"} <= set(METHODS["wan"])
    assert {"hidiffusion", "agent", "demofusion"} <= set(METHODS["stable_diffusion"])


def test_names_joined_by_plus(build):
    pipe, _ = build()
    recipe = sparsereel.extend(pipe, frames=2.0, method="freenoise+riflex").recipe
    assert recipe.views is not None
    assert recipe.time.name == "riflex"
    with pytest.raises(ValueError, match="yarn and pi both set time; take one of them"):
        sparsereel.extend(pipe, frames=2.0, method="yarn+pi")
    with pytest.raises(ValueError, match="views and the dual path"):
        sparsereel.extend(pipe, height=2.0, method="freeswim+multidiffusion")


def test_time_alone_is_squeezed(build):
    """Twice as long and twice as high: positions in time as `pi` has them, those in space as they were."""
    sizes = {"frames": 37, "height": WIDE["height"], "width": WIDE["width"]}
    found = {}
    for method in ("plain", "pi", "pi_time"):
        pipe, _ = build()
        arguments = sparsereel.extend(pipe, **sizes, method=method).arguments
        shape = (arguments["num_frames"] // 4 + 1, arguments["height"] // 8, arguments["width"] // 8)
        found[method] = pipe.transformer.rope(torch.zeros(1, 4, *shape))
    dim = pipe.transformer.rope.t_dim
    for plain, both, time in zip(*found.values(), strict=True):
        assert torch.equal(time[..., :dim], both[..., :dim])
        assert torch.equal(time[..., dim:], plain[..., dim:])
        assert not torch.equal(plain, both)


def test_two_transformers_of_one_pipeline(tiny):
    """Wan 2.2: both are extended at every stage, and the pipeline gets its class back."""
    from diffusers import WanPipeline

    models = {"transformer": tiny.CASES["wan"].model(), "transformer_2": tiny.CASES["wan"].model()}
    _, call = tiny.wan_pipe(FlowMatchEulerDiscreteScheduler())
    none = dict.fromkeys(("vae", "tokenizer", "text_encoder"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = tiny.quiet(WanPipeline(scheduler=scheduler, boundary_ratio=0.5, **models, **none))
    pipe.__class__ = Short

    def run(**size):
        g = torch.Generator().manual_seed(1)
        return pipe(**{**call, **size}, num_inference_steps=3, generator=g).frames

    plain = run(**WIDE)
    sparsereel.extend(pipe, height=256, width=192, method=Recipe(views=Views(time=False), guide=Guide(stages=2)))
    extensions = [m._sparsereel_injection.runtime.extension for m in models.values()]
    stages = []
    hook = (
        models["transformer_2"]
        .blocks[0]
        .register_forward_pre_hook(lambda m, args: stages.append([e.stage for e in extensions]))
    )
    assert not torch.equal(run(**WIDE), plain)
    hook.remove()
    assert [(5, 12, 10)] * 2 in stages
    sparsereel.restore(pipe)
    assert type(pipe) is Short
    assert torch.equal(run(**WIDE), plain)


def test_recipes_for_another_family(build, tiny):
    from sparsereel.extend.hidiffusion import HiDiffusion

    pipe, _ = build()
    with pytest.raises(ValueError, match="hidiffusion is not for wan; a recipe for it may set time, space"):
        sparsereel.extend(pipe, height=2.0, method=Recipe(unet=HiDiffusion()))


def test_a_model_restored_alone_is_itself_though_its_pipeline_is_not(build):
    pipe, run = build()
    large = run(**WIDE)
    sparsereel.extend(pipe, height=256, width=192, method="cupscale")
    sparsereel.restore(pipe.transformer)
    assert torch.equal(run(**WIDE), large)


def test_two_pipelines_and_copies_are_their_own(build):
    pipe, run = build()
    long = run(num_frames=37)
    other = copy.deepcopy(pipe)
    sparsereel.extend(pipe, frames=37, method="freenoise")
    free = run(num_frames=37)
    twin = copy.deepcopy(pipe)
    sparsereel.restore(pipe)
    assert torch.equal(run(num_frames=37), long)
    assert type(twin).__name__ == "Short"
    assert type(other) is Short
    call = {"prompt_embeds": torch.zeros(1, 5, 12), "negative_prompt_embeds": torch.ones(1, 5, 12), "num_frames": 37}
    call |= {"output_type": "latent", "num_inference_steps": 2}

    def made(made_by):
        return made_by(**call, generator=torch.Generator().manual_seed(3)).frames

    assert not torch.equal(made(twin), made(other))
    assert torch.equal(made(other), made(pipe))
    assert not torch.equal(free, long)


# ------------------------------------------------------------------ views


@pytest.mark.parametrize(("length", "side", "stride"), [(10, 5, 2), (9, 4, 4), (5, 5, 1), (3, 5, 2), (11, 5, 5)])
def test_windows_cover_everything_and_stay_inside(length, side, stride):
    starts = window_starts(length, side, stride)
    assert starts[0] == 0
    covered = {place for start in starts for place in range(start, min(start + side, length))}
    assert covered == set(range(length))
    assert max(starts) + min(side, length) == length


def test_jittered_windows_cover_everything():
    for seed in range(20):
        seen = torch.zeros(5, 20, 23)
        for view in Views(time=False, jitter=True).cut((5, 20, 23), (5, 8, 8), (1, 1, 1), random.Random(seed)):
            seen[view.slices] += 1
        assert seen.min() >= 1


def test_views_over_time_equal_windows_run_one_by_one(build, tiny):
    pipe, _ = build()
    inputs = tiny.wan_inputs(10)
    latents, whole, weights = inputs["hidden_states"], 0.0, torch.zeros(10)
    ramp = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])
    total = torch.zeros_like(latents)
    for start in (0, 2, 4, 5):
        out = tiny.run(pipe.transformer, {**inputs, "hidden_states": latents[:, :, start : start + 5]})
        total[:, :, start : start + 5] += out * ramp[:, None, None]
        weights[start : start + 5] += ramp
    whole = total / weights[:, None, None]
    sparsereel.extend(pipe, frames=37, method=Recipe(views=Views(space=False)))
    torch.testing.assert_close(tiny.run(pipe.transformer, inputs), whole, rtol=1e-5, atol=1e-6)


def test_views_over_both_axes_and_an_axis_that_is_seen_whole(build, forward):
    pipe, _ = build()
    sparsereel.extend(pipe, frames=37, height=256, method="sliding+window")
    lengths = []
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    assert forward(pipe, 10, 32, 16).isfinite().all()
    hook.remove()
    assert lengths == [5 * 16 * 8] * 4
    # 5 x 16 x 8 tokens in windows of 5 x 9 x 8
    assert sparsereel.report(pipe).token_density == pytest.approx(9 / 16)


def test_dilated_views_are_strided_parts_of_the_blurred_latents(build, forward, tiny):
    pipe, _ = build()
    inputs = tiny.wan_inputs(5, 32, 32)
    latents = blur(inputs["hidden_states"], 2, 1.0)
    expected = torch.zeros_like(inputs["hidden_states"])
    for row in (0, 1):
        for column in (0, 1):
            part = {**inputs, "hidden_states": latents[..., row::2, column::2]}
            expected[..., row::2, column::2] = tiny.run(pipe.transformer, part)
    sparsereel.extend(pipe, height=256, width=256, method=Recipe(views=Views(time=False, dilated=1.0)))
    # The first step is all dilated views, the last hardly any.
    torch.testing.assert_close(forward(pipe, 5, 32, 32), expected, rtol=1e-4, atol=1e-5)


def test_blur_keeps_mean_and_deviation():
    x = torch.randn(2, 3, 4, 16, 16) * 3 + 1
    out = blur(x, 3, 0.5)
    torch.testing.assert_close(out.mean((2, 3, 4)), x.mean((2, 3, 4)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out.std((2, 3, 4)), x.std((2, 3, 4)), rtol=1e-3, atol=1e-4)
    assert (out - x).abs().max() > 0.1


# ------------------------------------------------------------------ noise


def test_rescheduled_noise_is_made_of_the_first_frames():
    noise = torch.randn(1, 2, 13, 3, 3)
    out = Rescheduled(0.5).apply(noise, 4, torch.Generator().manual_seed(0))
    assert torch.equal(out[:, :, :4], noise[:, :, :4])
    for start in range(4, 13, 2):
        earlier = [out[:, :, frame] for frame in range(start - 4, min(start - 2, 9 + start - 4))]
        for frame in range(start, min(start + 2, 13)):
            assert any(torch.equal(out[:, :, frame], old) for old in earlier)
    assert torch.equal(Rescheduled(0.5).apply(noise, 4, torch.Generator().manual_seed(0)), out)
    assert torch.equal(Rescheduled().apply(noise, 13, None), noise)


@pytest.mark.parametrize("scope", ["clip", "chunk"])
def test_antiphase_noise(scope):
    rule = Antiphase(-0.7, scope=scope, chunk=3)
    noise = torch.randn(1, 4, 6, 64, 64, generator=torch.Generator().manual_seed(0))
    out = rule.apply(noise, 6, None)
    flat = out[0].transpose(0, 1).flatten(1)
    near = torch.corrcoef(flat)
    assert flat.mean(1).abs().max() < 3 / 128
    assert (flat.std(1) - 1).abs().max() < 3 / 128
    for a in range(6):
        for b in range(6):
            same = scope == "clip" or a // 3 == b // 3
            expected = (-0.7) ** abs(a - b) if same else 0.0
            assert abs(float(near[a, b]) - expected) < 0.03
    # A clip can be made in pieces: each needs the frame before it.
    first = rule.correlate(noise[:, :, :4])
    rest = rule.correlate(noise[:, :, 4:], before=first[:, :, -1], start=4)
    torch.testing.assert_close(torch.cat([first, rest], 2), out)


def test_antiphase_between_steps(build):
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    pipe, run = build(stochastic)
    plain = run(num_frames=37)
    torch.manual_seed(0)
    sparsereel.extend(pipe, frames=37, method=Recipe(noise=Antiphase(apply_to="both")))
    assert not torch.equal(run(num_frames=37), plain)
    clean, fresh = torch.randn(1, 2, 6, 64, 64), torch.randn(1, 2, 6, 64, 64)
    rule = Antiphase(-0.5, scope="clip", apply_to="renoise")
    out = rule.renoise(0.4 * clean + 0.6 * fresh, clean, 0.6)
    torch.testing.assert_close(out, 0.4 * clean + 0.6 * rule.correlate(fresh), rtol=1e-4, atol=1e-4)
    assert torch.equal(rule.apply(fresh, 6, None), fresh)
    sparsereel.restore(pipe)
    other, _ = build()
    with pytest.raises(ValueError, match="adds no noise between its steps"):
        sparsereel.extend(other, frames=37, method=Recipe(noise=Antiphase(apply_to="both")))
    assert type(other) is Short


def test_latents_of_the_users_own_are_left_alone(build):
    pipe, run = build()
    latents = torch.randn(1, 4, 10, 16, 16)
    plain = run(num_frames=37, latents=latents)
    sparsereel.extend(pipe, frames=37, method=Recipe(noise=Rescheduled()))
    assert torch.equal(run(num_frames=37, latents=latents), plain)


# ------------------------------------------------------------------ guides


def test_skip_residual_is_the_formula():
    z, g = torch.randn(1, 2, 3, 8, 8), torch.randn(1, 2, 3, 8, 8)
    guide = Guide(power=3)
    for step in range(4):
        c = ((1 + math.cos(math.pi * step / 4)) / 2) ** 3
        torch.testing.assert_close(guide.blend(z, g, step, 4, (2, 2)), c * g + (1 - c) * z)
    assert torch.equal(guide.blend(z, g, 0, 4, (2, 2)), g)
    low = Guide(mode="lowpass")
    out = low.blend(z, g, 0, 4, (2, 2))
    torch.testing.assert_close(out, z + low_pass(g, (2, 2)) - low_pass(z, (2, 2)))


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_the_guide_is_the_small_clip_enlarged(build, scheduler):
    pipe, run = build(scheduler)
    small = run(steps=4)
    expected = enlarge(small, (32, 24))
    # With nearly all steps left out the result is the enlarged small clip, hardly changed.
    sparsereel.extend(pipe, height=256, width=192, method=Recipe(guide=Guide(mode="start", strength=0.1)))
    led = run(steps=4, **WIDE)
    assert torch.corrcoef(torch.stack([led.flatten(), expected.flatten()]))[0, 1] > 0.5
    sparsereel.extend(pipe, height=256, width=192, method=Recipe(guide=Guide(stages=2)))
    assert run(steps=4, **WIDE).isfinite().all()


def test_the_run_of_a_started_guide_leaves_out_its_first_steps(build):
    pipe, run = build()
    sparsereel.extend(pipe, height=256, width=192, method=Recipe(guide=Guide(mode="start", strength=0.5)))
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["hidden_states"].shape[-2]), with_kwargs=True
    )
    run(steps=4, **WIDE)
    hook.remove()
    # Guidance calls the model twice a step: four small steps, then two large ones.
    assert seen == [16] * 8 + [32] * 4


# ------------------------------------------------------------------ FreeSwim


@pytest.mark.parametrize(("length", "trained"), [(16, 8), (11, 8), (20, 5), (10, 8)])
def test_the_inward_window_has_the_same_number_of_keys_everywhere(length, trained):
    pattern = InwardWindow(time=False).pattern((2, length, length), (2, trained, trained), 0)
    mask = pattern.token_mask(TokenGrid(2, length, length))
    side = min(length, 2 * (trained // 2) + 1)
    assert set(mask.sum(1).tolist()) == {2 * side * side}
    d, grid = trained // 2, mask.view(2, length, length, 2, length, length)
    for y in range(length):
        centre = min(max(y, d), length - 1 - d)
        seen = grid[0, y, 0, 0, :, 0].nonzero().flatten().tolist()
        assert seen == list(range(centre - d, centre + d + 1))
    flipped = mask.view(2, length, length, 2, length, length).flip(1, 4)
    assert torch.equal(flipped.reshape(mask.shape), mask)


def test_a_window_no_smaller_than_the_grid_is_everything():
    assert InwardWindow().pattern((5, 8, 8), (5, 8, 8), 0) is None
    assert Alternating().pattern((5, 8, 8), (5, 8, 8), 1) is None
    assert LocalRegions().pattern((5, 8, 8), (5, 8, 8), 0) is None
    assert InwardWindow(space=False, sink=2).pattern((10, 8, 8), (5, 8, 8), 0).token_mask(TokenGrid(10, 2, 2)).any()


def test_two_hops_of_alternating_regions_reach_everything():
    grid = TokenGrid(1, 8, 8)
    hops = [Alternating().pattern((1, 8, 8), (1, 4, 4), layer).token_mask(grid).float() for layer in (0, 1)]
    assert (hops[0] @ hops[1] > 0).all()
    neighbours = [LocalRegions().pattern((1, 8, 8), (1, 4, 4), layer).token_mask(grid) for layer in (0, 1)]
    either = neighbours[0] | neighbours[1]
    places = torch.arange(64).view(8, 8)
    assert either[places[:, :-1], places[:, 1:]].all()
    assert either[places[:-1], places[1:]].all()


def test_entropy():
    assert Entropy(1.046).factor((5, 16, 16), (5, 8, 8), None) == 1.046
    found = Entropy().factor((5, 16, 16), (5, 8, 8), None)
    assert found == pytest.approx(math.sqrt(math.log(1280) / math.log(320)))
    assert Entropy().factor((5, 8, 8), (5, 8, 8), None) == 1.0
    window = InwardWindow().pattern((5, 16, 16), (5, 8, 8), 0)
    assert Entropy().factor((5, 16, 16), (5, 8, 8), window) == pytest.approx(math.sqrt(math.log(405) / math.log(320)))


def test_windows_equal_masked_attention(build, forward, tiny):
    pipe, _ = build()
    for window in (InwardWindow(), Alternating(), LocalRegions()):
        grid = TokenGrid(5, 16, 16)
        masks = [window.pattern((5, 16, 16), (5, 8, 8), layer).token_mask(grid) for layer in range(3)]
        with tiny.dense_under(lambda call, grid, masks=masks: masks[call], (grid,)):
            expected = forward(pipe, 5, 32, 32)
        sparsereel.extend(pipe, height=256, width=256, method=Recipe(window=window))
        torch.testing.assert_close(forward(pipe, 5, 32, 32), expected, rtol=1e-4, atol=2e-5)
        assert sparsereel.report(pipe).token_density < 0.5
        sparsereel.restore(pipe)


def test_the_dual_path_puts_the_whole_passes_cross_attention_in(build, forward):
    """Restated: record a whole pass by hand, then hand it to a windowed one."""
    pipe, _ = build()
    window = InwardWindow(time=False)
    kept, handed = [], []
    layers = [block.attn2 for block in pipe.transformer.blocks]
    hooks = [layer.register_forward_hook(lambda m, a, out: kept.append(out) or None) for layer in layers]
    forward(pipe, 5, 32, 32)
    for hook in hooks:
        hook.remove()
    sparsereel.extend(pipe, height=256, width=256, method=Recipe(window=window))
    windowed = forward(pipe, 5, 32, 32)
    handed = list(kept)
    hooks = [layer.register_forward_hook(lambda m, a, out: handed.pop(0)) for layer in layers]
    expected = forward(pipe, 5, 32, 32)
    for hook in hooks:
        hook.remove()
    sparsereel.extend(pipe, height=256, width=256, method=Recipe(window=window, dual=DualPath(every=1)))
    out = forward(pipe, 5, 32, 32)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert (out - windowed).abs().max() > 1e-4
    # After its share of the steps the second path ends.
    torch.testing.assert_close(forward(pipe, 5, 32, 32, step=8), windowed)


@pytest.mark.parametrize(("every", "whole"), [(1, 8), (2, 2), (3, 2)])
def test_how_often_the_whole_pass_runs(build, every, whole):
    pipe, run = build()
    method = Recipe(window=InwardWindow(time=False), dual=DualPath(every=every))
    sparsereel.extend(pipe, height=256, width=192, method=method)
    passes = []
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(
        lambda m, args: passes.append(pipe.transformer._sparsereel_injection.runtime.extension.whole)
    )
    run(steps=5, **WIDE)
    hook.remove()
    # Five steps, of which four have the second path; guidance calls twice.
    assert passes.count(True) == whole
    assert passes.count(False) == 10


def test_the_dual_path_needs_a_window(build):
    pipe, _ = build()
    with pytest.raises(ValueError, match="goes with a window"):
        sparsereel.extend(pipe, height=256, method=Recipe(dual=DualPath()))
    assert "forward" not in vars(pipe.transformer)


# ------------------------------------------------------------------ coarse attention


def tensors(grid, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, grid.seq_len, 8, generator=g, dtype=torch.float64) for _ in range(3)]


def cell_members(grid, cell):
    counts = cells_of(grid, cell)
    members = {}
    for index, (t, y, x) in enumerate(zip(*(axis.tolist() for axis in grid.coordinates()), strict=True)):
        key = ((t // cell[0]) * counts[1] + y // cell[1]) * counts[2] + x // cell[2]
        members.setdefault(key, []).append(index)
    return [members[key] for key in sorted(members)]


@pytest.mark.parametrize("weigh", [False, True])
def test_registers_are_one_softmax_over_window_and_proxies(weigh):
    grid, cell = TokenGrid(2, 5, 6), (1, 2, 4)
    q, k, v = tensors(grid)
    window = Neighborhood(window=(2, 3, 3)).token_mask(grid)
    members = cell_members(grid, cell)
    keys = torch.cat([k, torch.stack([k[:, :, m].mean(2) for m in members], 2)], 2)
    values = torch.cat([v, torch.stack([v[:, :, m].mean(2) for m in members], 2)], 2)
    bias = torch.where(window, 0.0, -math.inf).double()
    counts = torch.tensor([math.log(len(m)) if weigh else 0.0 for m in members], dtype=torch.float64)
    bias = torch.cat([bias, counts.expand(grid.seq_len, -1)], 1)
    expected = F.scaled_dot_product_attention(q, keys, values, bias, scale=0.3)

    def inner(q, k, v, *, lse=False):
        logits = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~window, -math.inf)
        out = logits.softmax(-1) @ v
        return (out, logits.logsumexp(-1).float()) if lse else out

    out = Registers(cell, weigh=weigh).attend(q, k, v, scale=0.3, grid=grid, inner=inner)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_compressed_branch_is_attention_among_means():
    grid = TokenGrid(2, 8, 8)
    q, k, v = tensors(grid)
    members = cell_members(grid, (1, 4, 4))
    small = [torch.stack([x[:, :, m].mean(2) for m in members], 2) for x in (q, k, v)]
    coarse = F.scaled_dot_product_attention(*small, scale=0.3)
    volume = coarse.flatten(0, 1).transpose(1, 2).unflatten(2, (2, 2, 2)).float()
    spread = F.interpolate(volume, size=(2, 8, 8), mode="trilinear").flatten(2).transpose(1, 2).unflatten(0, (1, 2))
    local = torch.zeros_like(q)
    out = Compressed(4, share=0.25).attend(q, k, v, scale=0.3, grid=grid, inner=lambda q, k, v: local)
    torch.testing.assert_close(out.float(), 0.25 * spread, rtol=1e-4, atol=1e-5)
    assert torch.equal(Compressed(4, share=0.0).attend(q, k, v, scale=0.3, grid=grid, inner=lambda q, k, v: q), q)
    pooled = pool_cells(q, grid, (1, 4, 4))
    assert torch.allclose(pooled, small[0])
    assert spread_cells(pooled, grid, (1, 4, 4)).shape == q.shape


def test_registers_with_a_plan(build, forward):
    pipe, _ = build()
    sparsereel.extend(pipe, height=256, width=256, method="registers", plan=AttentionPlan.uniform(Radial()))
    assert forward(pipe, 5, 32, 32).isfinite().all()
    with pytest.raises(ValueError, match="window combines with patterns, not with the selectors"):
        sparsereel.extend(pipe, height=256, method="window", plan=AttentionPlan.uniform(make("xattention")))


@pytest.mark.parametrize("method", ["sliding", "dual path"])
def test_a_compiled_model_gives_what_it_gives_without(build, forward, tiny, method):
    pipe, _ = build()
    frames, height = (10, 16) if method == "sliding" else (5, 32)
    size = {"frames": 37} if method == "sliding" else {"height": 256}
    dual = Recipe(window=InwardWindow(time=False), dual=DualPath(every=1))
    sparsereel.extend(pipe, **size, method=dual if method == "dual path" else method)
    expected = forward(pipe, frames, height, 16)
    compiled = torch.compile(pipe.transformer, backend="eager")
    with torch.no_grad():
        out = compiled(**tiny.wan_inputs(frames, height, 16)).sample
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
