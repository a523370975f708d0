"""Sparse attention beside other accelerations: diffusers' block and attention caches, cache-dit, layerwise casting,
fused LoRA, compiled blocks. Each is compared with the same acceleration on the model under a dense mask."""

from __future__ import annotations

import diffusers
import pytest
import torch

import sparsereel
from sparsereel import AttentionPlan, TokenGrid, selectors
from sparsereel.patterns import Neighborhood

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = Neighborhood(window=(1, 3, 3))
GRID = TokenGrid(5, 8, 8)
STEPS = 6


def caches(pipe):
    """diffusers' caches, set so that each leaves out work in a run of six steps."""
    step = {"current_timestep_callback": lambda: pipe.current_timestep}
    return {
        "first_block": diffusers.FirstBlockCacheConfig(threshold=0.5),
        # Its default names match none of Wan's layers.
        "taylor_seer": diffusers.TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"blocks\.\d+\.attn1"],
        ),
        "pyramid": diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000), **step
        ),
        "mag": diffusers.hooks.MagCacheConfig(
            mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, threshold=0.5, max_skip_steps=2, retention_ratio=0.2
        ),
        "faster": diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1000),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 0),
            is_guidance_distilled=True,
            **step,
        ),
    }


@pytest.mark.parametrize("name", ["first_block", "taylor_seer", "pyramid", "mag", "faster"])
def test_caches(tiny, name):
    """The cache leaves out the same calls, and what runs is sparse; without it the outputs differ."""
    pipe, call = tiny.wan_pipe(diffusers.FlowMatchEulerDiscreteScheduler())

    def generate():
        pipe.transformer.enable_cache(caches(pipe)[name])
        try:
            options = {**call, "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
            return torch.as_tensor(pipe(**options).frames)
        finally:
            pipe.transformer.disable_cache()

    with tiny.dense_under(tiny.same_mask(NEAR), (GRID,)) as masked:
        expected = generate()
    assert len(masked) < STEPS * 2 * 3, "the cache left nothing out"
    with sparsereel.sparsified(pipe, NEAR):
        actual = generate()
        report = sparsereel.report(pipe)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert sum(row.calls for row in report) == len(masked)
    assert all(row.dense_calls == 0 for row in report)


@pytest.mark.parametrize("cache_first", [True, False])
def test_cache_dit(tiny, cache_first):
    """DBCache runs the first block of every step and leaves out others where little changes."""
    cache_dit = pytest.importorskip("cache_dit")
    pipe, call = tiny.wan_pipe(diffusers.FlowMatchEulerDiscreteScheduler())
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=2,
        residual_diff_threshold=0.5,
        num_inference_steps=STEPS,
    )

    def generate():
        options = {**call, "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
        return torch.as_tensor(pipe(**options).frames)

    untouched = generate()
    with tiny.dense_under(tiny.same_mask(NEAR), (GRID,)) as masked:
        cache_dit.enable_cache(pipe, cache_config=config)
        expected = generate()
        cache_dit.disable_cache(pipe)
    assert len(masked) < STEPS * 2 * 3, "the cache left nothing out"
    actions = [lambda: cache_dit.enable_cache(pipe, cache_config=config), lambda: sparsereel.sparsify(pipe, NEAR)]
    for act in actions if cache_first else reversed(actions):
        act()
    torch.testing.assert_close(generate(), expected, rtol=1e-3, atol=1e-3)
    report = sparsereel.report(pipe)
    assert sum(row.calls for row in report) == len(masked)
    assert all(row.dense_calls == 0 for row in report)
    for undo in (lambda: sparsereel.restore(pipe), lambda: cache_dit.disable_cache(pipe)):
        undo()
    assert torch.equal(generate(), untouched)


def test_layerwise_casting(tiny):
    """Weights rest in another dtype; attention sees the compute dtype."""
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = tiny.run(model, inputs)
    assert {p.dtype for p in model.blocks[0].attn1.to_q.parameters()} == {torch.bfloat16}
    with sparsereel.sparsified(model, NEAR):
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
        assert sparsereel.report(model).layers[0].dense_calls == 0


def test_a_fused_lora(tiny):
    """Fused into the weights and taken out again, before and after `sparsify`."""
    peft = pytest.importorskip("peft")
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = tiny.run(model, inputs)
    sparsereel.sparsify(model, NEAR)
    model.fuse_lora()
    torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    sparsereel.restore(model)
    with sparsereel.sparsified(model, NEAR):
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
        model.unfuse_lora()
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", [NEAR, AttentionPlan.uniform(selectors.BlockTopk(0.4), compensation="mean_key")])
def test_regional_compilation(tiny, plan):
    """Repeated blocks compiled by themselves equal eager ones."""
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    with sparsereel.sparsified(model, plan):
        expected = tiny.run(model, inputs)
        torch.compiler.reset()
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
        assert sparsereel.report(model).layers[0].calls == 2
    torch.compiler.reset()
