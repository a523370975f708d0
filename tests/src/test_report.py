"""What the report says: before and after calls, reasons for dense calls, as a table and as plain data; and refusals."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

import sparsereel
from sparsereel import AttentionPlan
from sparsereel.patterns import Full, Neighborhood, Temporal

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = Neighborhood(window=(1, 3, 3))


@pytest.fixture
def wan(tiny):
    case = tiny.CASES["wan"]
    return case.model(), case.inputs()


# ------------------------------------------------------------------ what it says


def test_before_and_after_calls(tiny, wan):
    model, inputs = wan
    with pytest.raises(ValueError, match="sparsify has not been called"):
        sparsereel.report(model)
    first = sparsereel.sparsify(model, NEAR)
    assert [row.name for row in first] == [f"transformer.blocks.{i}.attn1" for i in range(3)]
    assert first.replaced == 3
    assert first.density is first.token_density is None
    assert all(
        (row.pattern, row.density, row.token_density, row.backend, row.calls, row.dense_calls, row.seconds, row.reason)
        == ("neighborhood(window=(1, 3, 3))", None, None, None, 0, 0, None, "")
        for row in first
    )
    for _ in range(2):
        tiny.run(model, inputs)
    report = sparsereel.report(model)
    grid = sparsereel.TokenGrid(5, 8, 8)
    mask = NEAR.block_mask(grid)
    assert report.token_density == pytest.approx(NEAR.token_mask(grid).float().mean().item(), abs=1e-6)
    assert mask.token_density < report.density <= mask.density
    assert all((row.calls, row.dense_calls, row.reason, row.seconds) == (2, 0, "", None) for row in report)
    assert all(row.backend in ("cpu", "torch") for row in report)
    assert first.layers[0].calls == 0  # a report is a receipt: it does not change afterwards
    sparsereel.restore(model)
    with pytest.raises(ValueError, match="sparsify has not been called"):
        sparsereel.report(model)


def test_table_and_plain_data(tiny, wan):
    model, inputs = wan
    plan = AttentionPlan.from_dict(
        {"version": 1, "components": {"transformer": {"layers": {"1": {"temporal": {}}, "2": {"skip": {}}}}}}
    )
    sparsereel.sparsify(model, plan)
    for called in (False, True):
        if called:
            tiny.run(model, inputs)
        report = sparsereel.report(model)
        lines = str(report).splitlines()
        assert lines[0].split() == [
            "layer",
            "runs",
            "pattern",
            "density",
            "tokens",
            "backend",
            "calls",
            "dense",
            "note",
        ]
        assert set(lines[1]) == {"-", " "}
        assert len(lines) == 2 + 3 + 1
        assert "temporal" in lines[3]
        assert "3 of 3 layers replaced" in lines[-1]
        assert ("mean density" in lines[-1]) == called
        data = json.loads(json.dumps(report.to_dict()))
        assert data["replaced"] == 3
        assert [layer["calls"] for layer in data["layers"]] == [int(called)] * 3
        assert data == report.to_dict()
    assert "1 dense: the plan says full" in lines[2]
    full, temporal, skip = report.layers
    assert (full.density, full.dense_calls) == (1.0, 1)
    assert 0 < temporal.token_density < 1
    assert (skip.density, skip.token_density) == (0.0, 0.0)
    assert report.density == pytest.approx((1 + temporal.density) / 3)


def test_profile(tiny, wan):
    model, inputs = wan
    sparsereel.sparsify(model, AttentionPlan.uniform(NEAR))
    tiny.run(model, inputs)
    assert {row.seconds for row in sparsereel.report(model)} == {None}
    asked = sparsereel.report(model, profile=True)
    assert all(row.seconds == 0 for row in asked)
    tiny.run(model, inputs)
    report = sparsereel.report(model)
    assert all(row.seconds > 0 for row in report)
    assert "seconds" in str(report).splitlines()[0]


def test_one_report_for_both_transformers(tiny):
    import diffusers

    pipe, _ = tiny.wan_pipe(
        diffusers.FlowMatchEulerDiscreteScheduler(), transformer_2=tiny.CASES["wan"].model(), boundary_ratio=0.5
    )
    layers = {"transformer_2": {"layers": {"*": {"temporal": {}}}}}
    report = sparsereel.sparsify(pipe, AttentionPlan.from_dict({"version": 1, "components": layers}))
    patterns = {row.name: row.pattern for row in report}
    assert patterns["transformer.blocks.0.attn1"] == "full"
    assert patterns["transformer_2.blocks.0.attn1"] == str(Temporal())
    sparsereel.restore(pipe)


# ------------------------------------------------------------------ reasons for dense calls


def reasons(model):
    return {row.reason for row in sparsereel.report(model)}


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ({"min_tokens": 321}, "1 dense: 320 tokens are fewer than the plan's min_tokens 321"),
        ({"max_density": 0.05}, "above the plan's max_density 0.05"),
        ({"dense_last": 2}, "step is unknown and the plan depends on it"),
    ],
)
def test_schedules_that_keep_a_call_dense(tiny, wan, caplog, schedule, text):
    model, inputs = wan
    before = tiny.run(model, inputs)
    sparsereel.sparsify(model, AttentionPlan.uniform(NEAR, **schedule))
    with caplog.at_level(logging.WARNING, logger="sparsereel"):
        torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-5, atol=1e-5)
    assert all(text in reason for reason in reasons(model))
    assert {row.dense_calls for row in sparsereel.report(model)} == {1}
    said = [record for record in caplog.records if record.name == "sparsereel"]
    assert len(said) == 1  # once, not once a layer
    assert "transformer.blocks.0.attn1 stays dense" in said[0].getMessage()


def test_min_tokens_and_max_density_let_others_through(tiny, wan):
    model, inputs = wan
    for schedule in ({"min_tokens": 320}, {"max_density": 1.0}):
        sparsereel.sparsify(model, AttentionPlan.uniform(NEAR, **schedule))
        tiny.run(model, inputs)
        assert {row.dense_calls for row in sparsereel.report(model)} == {0}


class Asking(torch.nn.Module):
    """Stands in for `dispatch_attention_fn` in Wan's processor: asks for self-attention in another way."""

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    def forward(self, query, key, value, **kwargs):
        changes = {k: v(query) if callable(v) else v for k, v in self.changes.items()}
        if key.shape[1] == query.shape[1]:
            kwargs |= changes
        return dispatch_attention_fn(query, key, value, **kwargs)


def _whole_mask(query):
    return torch.ones(query.shape[0], 1, query.shape[1], query.shape[1], dtype=torch.bool).tril()


def _head_mask(query):
    return torch.zeros(1, query.shape[2], 1, query.shape[1])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"is_causal": True}, "the model asks for causal attention"),
        ({"attn_mask": _whole_mask}, "an attention mask of shape (2, 1, 320, 320), not (B, 1, 1, keys)"),
        ({"attn_mask": _head_mask}, "an attention mask of shape (1, 2, 1, 320), not (B, 1, 1, keys)"),
    ],
    ids=["causal", "whole mask", "mask of heads"],
)
def test_calls_that_are_not_understood_stay_dense(tiny, wan, monkeypatch, changes, text):
    model, inputs = wan
    plain = tiny.run(model, inputs)
    module = "diffusers.models.transformers.transformer_wan.dispatch_attention_fn"
    monkeypatch.setattr(module, Asking(**changes))
    before = tiny.run(model, inputs)
    if "attn_mask" not in changes or changes["attn_mask"] is _whole_mask:
        assert (before - plain).abs().max() > 1e-2
    sparsereel.sparsify(model, NEAR)
    assert torch.equal(tiny.run(model, inputs), before)
    assert all(text in reason for reason in reasons(model))


def test_dropout_stays_dense(tiny, wan, monkeypatch):
    model, inputs = wan
    monkeypatch.setattr("diffusers.models.transformers.transformer_wan.dispatch_attention_fn", Asking(dropout_p=0.5))
    sparsereel.sparsify(model, NEAR)
    tiny.run(model, inputs)
    assert reasons(model) == {"1 dense: attention dropout is on"}


def test_key_padding_masks_of_the_model_are_kept(tiny, wan, monkeypatch):
    """(B, 1, 1, keys), as bool and as a bias, on a model that usually has none."""
    model, inputs = wan
    keep = torch.ones(2, 1, 1, 320, dtype=torch.bool)
    keep[0, ..., 250:] = False
    bias = torch.where(keep, 0.0, float("-inf"))
    soft = torch.linspace(-2, 0, 320).expand(2, 1, 1, 320)
    grid = tiny.CASES["wan"].grids
    for mask in (keep, bias, soft):
        monkeypatch.setattr(
            "diffusers.models.transformers.transformer_wan.dispatch_attention_fn", Asking(attn_mask=mask)
        )
        with tiny.dense_under(tiny.same_mask(NEAR), grid):
            expected = tiny.run(model, inputs)
        with sparsereel.sparsified(model, NEAR):
            actual = tiny.run(model, inputs)
            assert {row.dense_calls for row in sparsereel.report(model)} == {0}
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_tokens_that_are_not_on_the_grid(tiny):
    """A U-Net whose layers see something else than one level's pixels: gligen-like extra tokens."""
    case = tiny.CASES["unet"]
    model, inputs = case.model(), case.inputs()
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.register_forward_pre_hook(lambda m, args: (torch.cat([args[0], args[0][:, :3]], 1), *args[1:]))
    layer.register_forward_hook(lambda m, args, out: out[:, :-3])
    before = tiny.run(model, inputs)
    sparsereel.sparsify(model, Full())
    torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-5, atol=1e-5)
    rows = {row.name: row.reason for row in sparsereel.report(model)}
    assert rows["unet.mid_block.attentions.0.transformer_blocks.0.attn1"].endswith(
        "do not lie on the model's token grid"
    )
    assert sum("token grid" in reason for reason in rows.values()) == 1


# ------------------------------------------------------------------ refusals


def test_unknown_models_are_refused():
    known = "WanTransformer3DModel, .*HunyuanVideoTransformer3DModel, .*UNet2DConditionModel"
    for given in (torch.nn.Linear(2, 2), torch.nn.Sequential()):
        for verb in (sparsereel.report, sparsereel.restore, lambda m: sparsereel.sparsify(m, NEAR)):
            with pytest.raises(ValueError, match=f"no model of a known family in {type(given).__name__}; .*{known}"):
                verb(given)
    with pytest.raises(ValueError, match="expected a diffusers pipeline or one of its models, got str"):
        sparsereel.sparsify("pipe", NEAR)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"family": "cogvideox"}, "this plan is for family cogvideox, the model has family wan"),
        ({"family": "wan", "class": "WanVACETransformer3DModel"}, "class WanVACE.*has class WanTransformer3DModel"),
        ({"family": "wan", "layers": 30}, "this plan is for layers 30, the model has layers 3"),
        ({"family": "wan", "heads": 12}, "this plan is for heads 12, the model has heads 2"),
    ],
)
def test_plans_for_other_models_are_refused(wan, model, text):
    plan = AttentionPlan.from_dict({"version": 1, "model": model, "components": {}})
    with pytest.raises(ValueError, match=text):
        sparsereel.sparsify(wan[0], plan)
    assert not hasattr(wan[0], "_sparsereel_injection")


def test_layers_and_heads_that_are_not_there(wan):
    for layers, text in (
        ({"0-3": "full"}, "transformer has 3 layers"),
        ({"blocks.7.*": "full"}, "match none of the 3 layers"),
        ({"0": {"default": "full", "heads": {"2": "full"}}}, r"has 2 heads \(0-1\)"),
    ):
        plan = AttentionPlan.from_dict({"version": 1, "components": {"transformer": {"layers": layers}}})
        with pytest.raises(ValueError, match=text):
            sparsereel.sparsify(wan[0], plan)


def test_unknown_plans_and_backends(wan, tmp_path):
    model, _ = wan
    with pytest.raises(ValueError, match=r"'radical' is neither a preset \(.*radial.*\) nor a plan file"):
        sparsereel.sparsify(model, "radical")
    with pytest.raises(
        ValueError, match=r"unknown backend 'cuda'; allowed: auto, triton, cpu, flex, torch, triton_int8, reference"
    ):
        sparsereel.sparsify(model, NEAR, backend="cuda")
    with pytest.raises(ValueError, match="got int"):
        sparsereel.sparsify(model, 3)
    assert not hasattr(model, "_sparsereel_injection")


def test_a_backend_that_cannot_run_says_so(tiny, wan):
    model, inputs = wan
    sparsereel.sparsify(model, NEAR, backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(sparsereel.BackendUnavailable, match="triton"):
            tiny.run(model, inputs)
    before = case_output(tiny, NEAR)
    for backend in ("torch", "reference"):
        sparsereel.sparsify(model, NEAR, backend=backend)
        torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-4, atol=1e-4)
        assert {row.backend for row in sparsereel.report(model)} == {backend}


def case_output(tiny, pattern):
    case = tiny.CASES["wan"]
    model = case.model()
    with tiny.dense_under(tiny.same_mask(pattern), case.grids):
        return tiny.run(model, case.inputs())


def test_presets_by_either_spelling(wan):
    for name in ("sliding-tile", "sliding_tile", "radial", "neighborhood", "spatial-temporal"):
        assert sparsereel.sparsify(wan[0], name).replaced == 3
