"""Layers whose heads differ: static patterns and selectors in one call, eager and compiled."""

from __future__ import annotations

import pytest
import torch

import sparsereel
from sparsereel import selectors
from sparsereel.launches import Choice, Launch, run_launches
from sparsereel.patterns import Full, Neighborhood, Spatial
from sparsereel.plan import AttentionPlan
from sparsereel_kernels import BlockMask, sparse_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def random_mask(heads: int, seed: int) -> BlockMask:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(1, heads, 300, 300, generator=generator) < 0.3
    dense |= torch.eye(300, dtype=torch.bool)
    return BlockMask.from_dense(dense, (128, 64))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_heads_come_back_in_their_places(kv_heads):
    q, k, v = (torch.randn(2, h, 300, 16) for h in (4, kv_heads, kv_heads))
    one, two = random_mask(2, 1), random_mask(1, 2)
    choice = Choice.of([Launch((1, 3), one), Launch((2,), two), Launch((0,), None)], 4)
    found = run_launches(q, k, v, choice, backend="torch")
    masks = {1: one.head(0), 3: one.head(1), 2: two, 0: None}
    for head, mask in masks.items():
        shared = head * kv_heads // 4
        alone = sparse_attention(q[:, [head]], k[:, [shared]], v[:, [shared]], mask, backend="torch")
        torch.testing.assert_close(found[:, [head]], alone)
    shares = (2 * one.density + two.density + 1) / 4
    assert choice.density == pytest.approx(shares)
    assert choice.only_mask is None


def test_a_single_plain_launch_is_its_mask():
    mask = random_mask(1, 3)
    assert Choice.of([Launch(None, mask)], 4).only_mask is mask
    assert Choice.of([Launch((0, 1), mask)], 2).only_mask is None


MIXED = {
    "version": 1,
    "patterns": {"top": {"selector": "block_topk", "density": 0.4}, "moved": {"selector": "svg2", "iterations": 1}},
    "components": {
        "transformer": {"layers": {"*": {"default": "top", "heads": {"0": {"spatial": {"frames": 1}}, "1": "moved"}}}}
    },
}


@pytest.fixture
def wan(tiny):
    """A tiny Wan with at least two query blocks, and its inputs."""
    case = tiny.CASES["wan"]
    return case.model(), tiny.wan_inputs()


def test_selectors_that_keep_everything_change_nothing(wan, tiny):
    model, inputs = wan
    before = tiny.run(model, inputs)
    for name, arguments in (("block_topk", {"density": 1.0}), ("svg2", {"threshold": 1.0})):
        with sparsereel.sparsified(model, selectors.make(name, **arguments)):
            after = tiny.run(model, inputs)
            report = sparsereel.report(model)
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        assert report.density == pytest.approx(1.0)
    assert torch.equal(tiny.run(model, inputs), before)


def test_a_mixed_layer_is_sparse_and_reports_the_mean(wan, tiny):
    model, inputs = wan
    plan = AttentionPlan.from_dict(MIXED)
    with sparsereel.sparsified(model, plan):
        tiny.run(model, inputs)
        report = sparsereel.report(model)
    assert 0 < report.density < 1
    assert "spatial" in report.layers[0].pattern
    assert "svg2" in report.layers[0].pattern


def test_heads_that_follow_patterns_are_as_without_the_selectors(wan, tiny):
    """In a layer of Spatial and selectors, a full-budget selector equals Full beside the same pattern."""
    model, inputs = wan
    layers = {"*": {"default": "full", "heads": {"0": {"spatial": {"frames": 0}}}}}
    plain = AttentionPlan.from_dict({"version": 1, "components": {"transformer": {"layers": layers}}})
    budget = {"selector": "block_topk", "density": 1.0}
    layers = {"*": {"default": budget, "heads": {"0": {"spatial": {"frames": 0}}}}}
    chosen = AttentionPlan.from_dict({"version": 1, "components": {"transformer": {"layers": layers}}})
    outputs = []
    for plan in (plain, chosen):
        with sparsereel.sparsified(model, plan):
            outputs.append(tiny.run(model, inputs))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def test_compiled_layers_with_selectors_equal_eager_ones(wan, tiny):
    model, inputs = wan
    with sparsereel.sparsified(model, AttentionPlan.from_dict(MIXED)):
        eager = tiny.run(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = tiny.run(compiled, inputs)
        assert sparsereel.report(model).layers[0].calls == 2
    torch.compiler.reset()
    torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-5)


def test_a_refresh_policy_reuses_blocks_between_steps_of_a_run(monkeypatch):
    """Two guidance branches, four steps, refresh every two: scores are computed twice a branch and layer."""
    from sparsereel import minireel

    pipe = minireel.load()
    pipe.set_progress_bar_config(disable=True)
    calls = []
    original = selectors.BlockTopk.block_map
    monkeypatch.setattr(
        selectors.BlockTopk, "block_map", lambda self, *a: calls.append(1) or original(self, *a), raising=True
    )
    plan = AttentionPlan.uniform(selectors.BlockTopk(density=0.5, refresh=2))
    with sparsereel.sparsified(pipe, plan):
        for _ in range(2):
            pipe("a red 3 on navy", num_frames=9, height=64, width=64, num_inference_steps=4, output_type="latent")
    assert len(calls) == 2 * 2 * 2 * 6, "runs x branches x refreshes x layers"


def test_uniform_takes_patterns_and_selectors_alone():
    assert AttentionPlan.uniform(Neighborhood(window=(3, 3, 3)) | Spatial()).describe()
    assert AttentionPlan.uniform(selectors.Svg()).resolve("transformer", ["a"], [2])[0].has_selectors
    assert not AttentionPlan.uniform(Full()).resolve("transformer", ["a"], [2])[0].has_selectors


def test_a_model_compiled_for_one_size_takes_another(wan, tiny):
    """torch compiles the second size for sizes of any kind; tokens are then still put in the order of this one."""
    model, _ = wan
    with sparsereel.sparsified(model, Neighborhood(window=(3, 3, 3))):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for frames in (5, 6, 7):
            other = tiny.wan_inputs(frames=frames)
            torch.testing.assert_close(tiny.run(compiled, other), tiny.run(model, other), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_choosing_blocks_counts_where_a_plan_bounds_the_cost(wan, tiny):
    """An exact probe at every step costs more than dense attention; once in a long run it does not."""
    from sparsereel.selectors.refresh import served_steps

    model, inputs = wan
    probe = selectors.Sparsed(density=0.2, refresh=1)
    with sparsereel.sparsified(model, AttentionPlan.uniform(probe, max_density=0.9)):
        tiny.run(model, inputs)
        row = sparsereel.report(model).layers[0]
        assert row.dense_calls == 1
        assert "and choosing blocks" in row.reason
    with sparsereel.sparsified(model, AttentionPlan.uniform(selectors.BlockTopk(density=0.2), max_density=0.9)):
        tiny.run(model, inputs)
        assert sparsereel.report(model).layers[0].dense_calls == 0
    with sparsereel.sparsified(model, AttentionPlan.uniform(probe)):
        tiny.run(model, inputs)
        assert sparsereel.report(model).layers[0].dense_calls == 0, "1 means: whatever it costs"
    assert served_steps(selectors.Sparsed(), 50) == 50
    assert served_steps(probe, 50) == 1
    assert served_steps(selectors.BlockTopk(refresh=4), 50) == 4
    assert served_steps(selectors.BlockTopk(refresh=(0.2, 0.6)), 30) == 10
