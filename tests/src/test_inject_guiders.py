"""Guiders that perturb attention (PAG, SLG, SEG) and other hooks of diffusers on a sparsified model."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode, _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import sparsereel
from sparsereel.patterns import Full, Neighborhood, SlidingTile

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = Neighborhood(window=(1, 3, 3))
#: where each model keeps the blocks that guiders number
STACKS = {
    "wan": "blocks",
    "hunyuan_video": "transformer_blocks",
    "cogvideox": "transformer_blocks",
    "unet": "down_blocks.1.attentions.0.transformer_blocks",
}
SKIPS = "a guider replaces the attention scores in this pass"


@pytest.fixture
def wan_known_to_guiders(monkeypatch):
    """diffusers registers its Wan processor under an old name only; projects that use PAG on Wan add this."""
    AttentionProcessorRegistry._register()
    metadata = AttentionProcessorMetadata(skip_processor_output_fn=lambda module, x, *args, **kwargs: x)
    monkeypatch.setitem(AttentionProcessorRegistry._registry, WanAttnProcessor, metadata)
    return metadata


def perturbed(kind, stack, model, call):
    """The output of a pass for which a guider of that kind prepares the first block of a stack."""
    if kind == "seg":
        config = SmoothedEnergyGuidanceConfig(indices=[0], fqn=stack)
        _apply_smoothed_energy_guidance_hook(model, config, blur_sigma=1.0, name="guider")
    else:
        scores = {"skip_attention_scores": True, "skip_attention": False} if kind == "pag" else {}
        _apply_layer_skip_hook(model, LayerSkipConfig([0], fqn=stack, skip_ff=False, **scores), name="guider")
    try:
        return call(model)
    finally:
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("guider", recurse=True)


@pytest.mark.parametrize("name", list(STACKS))
def test_skipped_scores_equal_those_of_the_untouched_model(tiny, name):
    """Whoever enters the mode that replaces scores: all layers run as they did before."""
    case = tiny.CASES[name]
    model, inputs = case.model(), case.inputs()
    plain = tiny.run(model, inputs)
    with AttentionScoreSkipFunctionMode():
        expected = tiny.run(model, inputs)
    assert (expected - plain).abs().max() > 1e-2
    sparsereel.sparsify(model, NEAR)
    with AttentionScoreSkipFunctionMode():
        actual = tiny.run(model, inputs)
    assert torch.equal(actual, expected) if name != "wan" else torch.allclose(actual, expected, atol=1e-5)
    assert all(SKIPS in row.reason and row.dense_calls == 1 for row in sparsereel.report(model))
    tiny.run(model, inputs)
    assert all(row.dense_calls == 1 and row.calls == 2 for row in sparsereel.report(model))


@pytest.mark.parametrize("kind", ["pag", "slg", "seg"])
@pytest.mark.parametrize("name", ["wan", "unet"])
def test_guiders_on_a_sparse_model(tiny, wan_known_to_guiders, name, kind):
    """Their one perturbed layer runs as in the untouched model; the others are sparse as planned."""
    case = tiny.CASES[name]
    model, inputs = case.model(), case.inputs()
    before = tiny.run(model, inputs)
    names = list(sparsereel.sparsify(model, Full()))
    sparsereel.restore(model)
    touched = next(i for i, row in enumerate(names) if STACKS[name] + ".0." in row.name)

    def mask_of(call, grid):
        index = call + (kind == "slg" and call >= touched)  # a skipped layer makes no call
        if index != touched:
            return NEAR.token_mask(grid)
        # Whoever sees only itself gives its own value, which is what replaced scores give.
        return torch.eye(grid.seq_len).bool() if kind == "pag" else torch.ones(grid.seq_len, grid.seq_len).bool()

    with tiny.dense_under(mask_of, case.grids):
        if kind == "pag":
            expected = tiny.run(model, inputs)
        else:
            expected = perturbed(kind, STACKS[name], model, lambda m: tiny.run(m, inputs))
    assert (expected - before).abs().max() > 1e-2
    sparsereel.sparsify(model, NEAR)
    actual = perturbed(kind, STACKS[name], model, lambda m: tiny.run(m, inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    rows = list(sparsereel.report(model))
    assert [row.dense_calls for row in rows] == [int(i == touched and kind != "slg") for i in range(case.layers)]
    if kind != "slg":
        assert "a guider" in rows[touched].reason
    sparsereel.restore(model)
    assert torch.equal(tiny.run(model, inputs), before)


def test_blurred_queries_keep_the_models_own_token_order(tiny):
    model = tiny.CASES["wan"].model()
    inputs, grid = tiny.wan_inputs(4, 32, 32), sparsereel.TokenGrid(4, 16, 16)
    pattern = SlidingTile(window=(1, 1, 1), tile=(4, 8, 8))

    def mask_of(call, grid):
        return pattern.token_mask(grid) if call != 0 else torch.ones(grid.seq_len, grid.seq_len, dtype=torch.bool)

    with tiny.dense_under(mask_of, (grid,)):
        expected = perturbed("seg", "blocks", model, lambda m: tiny.run(m, inputs))
    sparsereel.sparsify(model, pattern)
    actual = perturbed("seg", "blocks", model, lambda m: tiny.run(m, inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    tiny.run(model, inputs)
    assert sparsereel.report(model).layers[1].density < 1


@pytest.mark.slow
def test_guiders_on_a_compiled_model(tiny, wan_known_to_guiders):
    """The hook is seen while the graph is made, and its removal makes another graph."""
    torch._dynamo.reset()
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    sparsereel.sparsify(model, NEAR)
    compiled = torch.compile(model, backend="eager")
    for kind in ("pag", "seg"):
        expected = perturbed(kind, "blocks", model, lambda m: tiny.run(m, inputs))
        actual = perturbed(kind, "blocks", model, lambda m: tiny.run(compiled, inputs))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tiny.run(compiled, inputs), tiny.run(model, inputs), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_layer_that_is_not_reached_is_named_once(tiny, caplog):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    sparsereel.sparsify(model, NEAR)
    with caplog.at_level(logging.WARNING, logger="sparsereel"):
        apply_layer_skip(model, LayerSkipConfig([1], fqn="blocks"))
        for _ in range(2):
            tiny.run(model, inputs)
    messages = [r.getMessage() for r in caplog.records if "did not reach" in r.getMessage()]
    assert len(messages) == 1
    assert "blocks.1.attn1" in messages[0]
    assert "blocks.0.attn1" not in messages[0]
    assert [row.calls for row in sparsereel.report(model)] == [2, 0, 2]
