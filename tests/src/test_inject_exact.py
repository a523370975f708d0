"""Injection is exact: all-seeing plans equal the untouched model, sparse plans equal dense attention under the token
mask, and restore leaves no trace."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch

import sparsereel
from sparsereel import AttentionPlan
from sparsereel.patterns import Full, Neighborhood, Radial, SlidingTile, Spatial

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["wan", "wan_i2v", "wan_ti2v", "wan_vace", "hunyuan_video", "hunyuan_i2v"]
NAMES += ["cogvideox", "cogvideox_odd", "cogvideox15", "unet", "unet_odd"]
#: windows over every grid; not Full, so kernels run
EVERYTHING = Neighborhood(window=(99, 99, 99))


@pytest.fixture(params=NAMES)
def case(request, tiny):
    return tiny.CASES[request.param]


def fingerprint(model):
    """Everything that restore promises to bring back."""
    hooks = []
    for name, module in model.named_modules():
        tables = [key for key in vars(module) if key.endswith("_hooks") or "_hooks_" in key]
        hooks += [(name, key, len(vars(module)[key])) for key in sorted(tables) if vars(module)[key] is not None]
    processors = [(name, id(m.processor)) for name, m in model.named_modules() if hasattr(m, "processor")]
    attributes = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    states = [(name, sorted(vars(m.processor))) for name, m in model.named_modules() if hasattr(m, "processor")]
    return hooks, processors, attributes, states, list(model.state_dict())


@pytest.mark.parametrize("pattern", [Full(), EVERYTHING], ids=["full", "window"])
def test_seeing_everything_equals_the_untouched_model(tiny, case, pattern):
    model, inputs = case.model(), case.inputs()
    before, trace = tiny.run(model, inputs), fingerprint(model)
    report = sparsereel.sparsify(model, AttentionPlan.uniform(pattern))
    assert report.replaced == len(report.layers) == case.layers
    during = tiny.run(model, inputs)
    torch.testing.assert_close(during, before, rtol=1e-5, atol=1e-5)
    after_call = sparsereel.report(model)
    assert all(layer.calls == 1 for layer in after_call)
    assert after_call.density == 1.0
    assert list(model.state_dict()) == trace[-1]
    sparsereel.restore(model)
    assert fingerprint(model) == trace
    assert torch.equal(tiny.run(model, inputs), before)


PATTERNS = [Radial(decay=0.25, sink_frames=0), Neighborhood(window=(3, 3, 5)), SlidingTile(window=1, tile=(2, 4, 4))]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_sparse_equals_dense_under_the_token_mask(tiny, case, pattern):
    model, inputs = case.model(), case.inputs()
    before = tiny.run(model, inputs)
    with tiny.dense_under(tiny.same_mask(pattern), case.grids) as masked:
        expected = tiny.run(model, inputs)
    assert len(masked) == case.layers
    with sparsereel.sparsified(model, pattern):
        actual = tiny.run(model, inputs)
        report = sparsereel.report(model)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert report.replaced == case.layers
    assert all(layer.calls == 1 and layer.dense_calls == 0 and layer.backend for layer in report)
    if not (pattern.name == "radial" and case.name.startswith("unet")):  # radial sees single frames whole
        assert report.token_density < report.density <= 1
        assert (actual - before).abs().max() > 1e-2
    assert torch.equal(tiny.run(model, inputs), before)


# ------------------------------------------------------------------ token order


def tiled_case(tiny, name: str, frames: int, height: int, width: int):
    """A Wan model over more tokens, where putting tiles side by side pays."""
    case = tiny.CASES[name]
    inputs = tiny.wan_inputs(frames, 2 * height, 2 * width)
    if name == "wan_ti2v":
        steps = torch.arange(frames * height * width) % 7 * 100
        inputs["timestep"] = steps.expand(tiny.BATCH, -1)
    if name == "wan_vace":
        g = torch.Generator().manual_seed(4)
        inputs["control_hidden_states"] = torch.randn(tiny.BATCH, 6, frames, 2 * height, 2 * width, generator=g)
    return case.model(), inputs, sparsereel.TokenGrid(frames, height, width)


@pytest.mark.parametrize("name", ["wan", "wan_ti2v", "wan_vace"])
@pytest.mark.parametrize("shape", [(4, 16, 16), (5, 10, 18)], ids=["whole", "ragged"])
def test_tile_order_equals_grid_order(tiny, name, shape):
    model, inputs, grid = tiled_case(tiny, name, *shape)
    pattern = SlidingTile(window=(1, 1, 1), tile=(4, 8, 8))
    before = tiny.run(model, inputs)
    with tiny.dense_under(tiny.same_mask(pattern), (grid,)):
        expected = tiny.run(model, inputs)
    with sparsereel.sparsified(model, pattern):
        actual = tiny.run(model, inputs)
        density = sparsereel.report(model).density
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (actual - before).abs().max() > 1e-2
    in_order = pattern.block_mask(grid, order=grid.tile_order((4, 8, 8)))
    assert in_order.density < pattern.block_mask(grid).density
    assert density == pytest.approx(in_order.density)
    assert torch.equal(tiny.run(model, inputs), before)


def test_control_tokens_of_fewer_frames_are_padded_as_the_model_does(tiny):
    """VACE fills missing control tokens at the end of the sequence; in tile order they are elsewhere."""
    model, inputs, grid = tiled_case(tiny, "wan_vace", 4, 16, 16)
    inputs["control_hidden_states"] = inputs["control_hidden_states"][:, :, :3]
    pattern = SlidingTile(window=(1, 1, 1), tile=(4, 8, 8))
    with tiny.dense_under(tiny.same_mask(pattern), (grid,)):
        expected = tiny.run(model, inputs)
    with sparsereel.sparsified(model, pattern):
        actual = tiny.run(model, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_sizes_may_change_between_calls(tiny):
    model = tiny.CASES["wan"].model()
    pattern = SlidingTile(window=(1, 1, 1), tile=(4, 8, 8))
    for shape in [(4, 16, 16), (5, 8, 8), (4, 16, 16), (2, 9, 15)]:
        inputs, grid = tiny.wan_inputs(shape[0], 2 * shape[1], 2 * shape[2]), sparsereel.TokenGrid(*shape)
        with tiny.dense_under(tiny.same_mask(pattern), (grid,)):
            expected = tiny.run(model, inputs)
        with sparsereel.sparsified(model, pattern):
            torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
        sparsereel.sparsify(model, pattern)
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ heads and layers


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox"])
def test_each_head_of_each_layer_follows_its_own_pattern(tiny, name):
    case = tiny.CASES[name]
    model, inputs = case.model(), case.inputs()
    plan = AttentionPlan.from_dict(
        {
            "version": 1,
            "patterns": {"near": {"neighborhood": {"window": [1, 5, 5]}}, "far": {"temporal": {"width": 1}}},
            "components": {
                "transformer": {
                    "layers": {
                        "0": {"default": "near", "heads": {"1": "far"}},
                        "1": {"default": "full", "heads": {"0": "far"}},
                    }
                }
            },
        }
    )
    grid = case.grids[0]
    near, far = (plan.pattern_of(dict(plan.patterns)[key]).token_mask(grid) for key in ("near", "far"))
    full = torch.ones_like(near)
    layers = [torch.stack([near, far]), torch.stack([far, full]), torch.stack([full, full])]
    with tiny.dense_under(lambda call, grid: layers[call], case.grids) as masked:
        expected = tiny.run(model, inputs)
    assert len(masked) == case.layers
    with sparsereel.sparsified(model, plan):
        actual = tiny.run(model, inputs)
        rows = list(sparsereel.report(model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert rows[0].token_density == pytest.approx(layers[0].float().mean().item(), abs=1e-6)
    assert rows[1].token_density == pytest.approx(layers[1].float().mean().item(), abs=1e-6)
    assert [row.dense_calls for row in rows[2:]] == [1] * (case.layers - 2)


def test_keep_sinks(tiny):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    pattern = Spatial(frames=1)
    allowed = pattern.token_mask(case.grids[0])
    allowed[:, :64] = True
    with tiny.dense_under(lambda call, grid: allowed, case.grids):
        expected = tiny.run(model, inputs)
    with sparsereel.sparsified(model, AttentionPlan.uniform(pattern, keep_sinks=True)):
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ padding


@pytest.mark.parametrize("kept", ["prefix", "holes"])
def test_padded_text_is_not_seen(tiny, kept):
    """HunyuanVideo's mask is a prefix a sample; other models may hand masks with holes (B, 1, 1, keys)."""
    case = tiny.CASES["hunyuan_video"]
    model, inputs = case.model(), case.inputs()
    if kept == "holes":
        puncture_masks(model)
    pattern = Neighborhood(window=(3, 3, 3))
    plain = tiny.run(model, inputs)
    with tiny.dense_under(tiny.same_mask(pattern), case.grids):
        expected = tiny.run(model, inputs)
    with sparsereel.sparsified(model, pattern):
        actual = tiny.run(model, inputs)
        again = tiny.run(model, {**inputs, "encoder_hidden_states": garbled(inputs)})
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (actual - plain).abs().max() > 1e-2
    torch.testing.assert_close(again, actual, rtol=1e-4, atol=1e-4)


def garbled(inputs):
    """The prompt with other values where it is padding."""
    prompt = inputs["encoder_hidden_states"].clone()
    prompt[inputs["encoder_attention_mask"] == 0] = 9.0
    return prompt


def puncture_masks(model):
    """Every attention layer's mask loses two keys in the middle of the video."""

    def pre_hook(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., 70] = mask[..., 133] = False
        return args, {**kwargs, "attention_mask": mask}

    for name, module in model.named_modules():
        if name.endswith(".attn") and "transformer_blocks." in name:
            module.register_forward_pre_hook(pre_hook, with_kwargs=True)


# ------------------------------------------------------------------ pipelines, caches, threads


PIPELINES = {
    "wan": lambda tiny: tiny.wan_pipe(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction")),
    "cogvideox": lambda tiny: tiny.cogvideox_pipe(diffusers.CogVideoXDPMScheduler()),
    "unet": lambda tiny: tiny.sd_pipe(diffusers.EulerDiscreteScheduler()),
}


@pytest.mark.parametrize("name", list(PIPELINES))
def test_pipelines_with_guidance(tiny, name):
    pipe, call = PIPELINES[name](tiny)
    grids = tiny.CASES[name].grids if name != "unet" else [sparsereel.TokenGrid(1, n, n) for n in (20, 10, 5)]
    pattern = Neighborhood(window=(3, 3, 3))

    def generate():
        seeded = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(**call, num_inference_steps=3, generator=seeded, return_dict=False)[0])

    before = generate()
    with tiny.dense_under(tiny.same_mask(pattern), grids):
        expected = generate()
    with sparsereel.sparsified(pipe, pattern):
        actual = generate()
        report = sparsereel.report(pipe)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert (actual - before).abs().max() > 1e-2
    assert {(row.calls, row.dense_calls) for row in report} == {(6 if name == "wan" else 3, 0)}
    assert report.token_density < 1
    assert torch.equal(generate(), before)


def test_first_block_cache_in_tile_order(tiny):
    """Caches compare and keep permuted tokens; the order is the same in every call, so that is as good."""
    model, inputs, grid = tiled_case(tiny, "wan", 4, 16, 16)
    pattern = SlidingTile(window=(1, 1, 1), tile=(4, 8, 8))

    def two_calls():
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
        with model.cache_context("cond"):
            first = tiny.run(model, inputs)
            second = tiny.run(model, {**inputs, "hidden_states": 1.01 * inputs["hidden_states"]})
        model.disable_cache()
        return first, second

    with tiny.dense_under(tiny.same_mask(pattern), (grid,)) as masked:
        expected = two_calls()
    assert len(masked) == 4  # three layers, then the first alone
    with sparsereel.sparsified(model, pattern):
        actual = two_calls()
        assert [row.calls for row in sparsereel.report(model)] == [2, 1, 1]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_models_in_threads_do_not_mix(tiny, name):
    case, inputs = tiny.CASES[name], tiny.CASES[name].inputs()
    patterns = [Neighborhood(window=(1, 3, 3)), Spatial(frames=1)]
    models = [case.model() for _ in patterns]
    for model, pattern in zip(models, patterns, strict=True):
        sparsereel.sparsify(model, pattern)
    expected = [tiny.run(model, inputs) for model in models]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(lambda m: [tiny.run(m, inputs) for _ in range(12)], model) for model in models]
            found = [run.result() for run in runs]
    finally:
        sys.setswitchinterval(switch)
    for outputs, one in zip(found, expected, strict=True):
        assert all(torch.equal(output, one) for output in outputs)
