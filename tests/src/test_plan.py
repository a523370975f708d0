"""What a plan does: schedules, layers, heads, steps, models, presets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from sparsereel import presets
from sparsereel.grid import TokenGrid
from sparsereel.patterns import Full, KeepSinks, Neighborhood, Radial, Sink, Skip, SlidingTile, Spatial, Temporal
from sparsereel.plan import AttentionPlan, Schedule
from sparsereel.presets import resolve_plan

NAMES = [f"blocks.{i}.attn1" for i in range(6)]


def plan_of(layers, **more):
    return AttentionPlan.from_dict({"version": 1, "components": {"transformer": {"layers": layers}}, **more})


def resolved(layers, heads=4, **more):
    return plan_of(layers, **more).resolve("transformer", NAMES, [heads] * 6)


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("first", "last", "dense"),
    [
        # Dense steps of 4, 8, 20 and 50 steps: shares are rounded up, whole numbers are steps.
        (0.1, 0.0, {4: [0], 8: [0], 20: [0, 1], 50: [0, 1, 2, 3, 4]}),
        (0.25, 0.0, {4: [0], 8: [0, 1], 20: [0, 1, 2, 3, 4], 50: list(range(13))}),
        (2, 0, {4: [0, 1], 8: [0, 1], 20: [0, 1], 50: [0, 1]}),
        (0, 1, {4: [3], 8: [7], 20: [19], 50: [49]}),
        (1, 0.2, {4: [0, 3], 8: [0, 6, 7], 20: [0, 16, 17, 18, 19], 50: [0, *range(40, 50)]}),
        (1.0, 0.0, {4: list(range(4)), 8: list(range(8)), 20: list(range(20)), 50: list(range(50))}),
        (
            9,
            9,
            {4: list(range(4)), 8: list(range(8)), 20: [*range(9), *range(11, 20)], 50: [*range(9), *range(41, 50)]},
        ),
        (0, 0, {4: [], 8: [], 20: [], 50: []}),
    ],
)
def test_dense_steps(first, last, dense):
    schedule = Schedule(dense_first=first, dense_last=last)
    for total, steps in dense.items():
        assert [step for step in range(total) if schedule.dense_at(step, total)] == steps
    assert schedule.needs_step == any(dense.values())


def test_shares_are_not_rounded_up_by_the_last_bit():
    # 0.1 * 70 is 7.000000000000001 in binary.
    assert sum(Schedule(dense_first=0.1).dense_at(step, 70) for step in range(70)) == 7


@pytest.mark.parametrize(("step", "total"), [(-1, 4), (4, 4), (0, 0)])
def test_steps_outside_the_run_are_refused(step, total):
    with pytest.raises(ValueError, match=f"step must be in 0..total - 1, got step {step} of {total}"):
        Schedule().dense_at(step, total)
    with pytest.raises(ValueError, match="step must be in"):
        resolved({"*": "radial"})[0].at(step, total)


# ---------------------------------------------------------------- layers and heads


def test_layers_by_number_range_and_glob():
    layers = resolved({"0-1": "full", "3,5": "sink", "blocks.4.*": "spatial", "*": "radial"})
    assert [layer.at(0, 1)[0] for layer in layers] == [Full(), Full(), Radial(), Sink(), Spatial(), Sink()]
    assert [layer.name for layer in layers] == NAMES
    assert [layer.index for layer in layers] == list(range(6))
    assert [layer.uniform_full for layer in layers] == [True, True, False, False, False, False]


def test_layers_that_are_not_named_are_full():
    assert [layer.uniform_full for layer in resolved({"2": "radial"})] == [True, True, False, True, True, True]
    assert all(layer.uniform_full for layer in plan_of({"*": "radial"}).resolve("unet", NAMES, [4] * 6))


def test_components_by_name_then_by_glob():
    data = {"transformer": {"layers": {"*": "sink"}}, "transf*": {"layers": {"*": "spatial"}}, "*": {"layers": {}}}
    plan = AttentionPlan.from_dict({"version": 1, "components": data})
    first = lambda component: plan.resolve(component, ["a"], [1])[0].at(0, 1)[0]  # noqa: E731
    assert [first(c) for c in ("transformer", "transformer_2", "unet")] == [Sink(), Spatial(), Full()]


def test_heads_by_number_range_and_parity():
    layer = resolved({"*": {"default": "radial", "heads": {"0,2-3": "sink", "5": "skip"}}}, heads=7)[0]
    assert layer.at(0, 1) == (Sink(), Radial(), Sink(), Sink(), Radial(), Skip(), Radial())
    layer = resolved({"*": {"heads": {"even": "spatial", "odd": "temporal"}}}, heads=5)[0]
    assert layer.at(0, 1) == (Spatial(), Temporal(), Spatial(), Temporal(), Spatial())
    layer = resolved({"*": {"heads": {"1": "spatial"}}}, heads=2)[0]
    assert layer.at(0, 1) == (Full(), Spatial())


def test_layers_may_have_different_numbers_of_heads():
    layers = plan_of({"*": "radial"}).resolve("transformer", ["a", "b"], [5, 20])
    assert [len(layer.at(0, 1)) for layer in layers] == [5, 20]


def test_steps_in_shares_and_whole_numbers():
    shares = [
        {"steps": "0.0-0.25", "use": "full"},
        {"steps": "0.25-0.5", "use": "sink"},
        {"steps": "0.5-1", "use": "skip"},
    ]
    layer = resolved({"0": shares})[0]
    kinds = {Full(): "f", Sink(): "s", Skip(): "-"}
    row = lambda total: "".join(kinds[layer.at(step, total)[0]] for step in range(total))  # noqa: E731
    assert (row(4), row(8), row(10), row(1)) == ("fs--", "ffss----", "fffss-----", "f")
    assert layer.needs_step
    assert not layer.uniform_full
    layer = resolved({"0": [{"steps": "2-3", "use": "sink"}, {"steps": 5, "use": "skip"}]})[0]
    assert row(7) == "ffssf-f", "steps that no stretch names are full"


def test_a_stretch_of_shares_covers_every_step_once():
    cuts = [0.0, 0.1, 0.15, 0.5, 0.9, 1.0]
    stretches = [{"steps": f"{a}-{b}", "use": {"spatial": {"frames": i}}} for i, (a, b) in enumerate(pairwise(cuts))]
    layer = resolved({"0": stretches})[0]
    for total in range(1, 60):
        frames = [layer.at(step, total)[0].frames for step in range(total)]
        assert frames == sorted(frames)


def test_named_patterns_and_combinations():
    layers = resolved(
        {"0": "both", "1": {"all": ["both", "causal"]}, "2": "again"},
        patterns={"r": {"radial": {"decay": 0.5}}, "both": {"any": ["r", "sink"]}, "again": "both"},
    )
    both = Radial(0.5) | Sink()
    from sparsereel.patterns import Causal

    assert [layer.at(0, 1)[0] for layer in layers[:3]] == [both, both & Causal(), both]


def test_kept_sinks_join_every_pattern_but_full_and_skip():
    heads = {"default": "temporal", "heads": {"0": "full", "1": "skip"}}
    layer = resolved({"*": heads}, keep_sinks=True, heads=3)[0]
    assert layer.at(0, 1) == (Full(), Skip(), KeepSinks(Temporal()))
    assert not layer.uniform_full
    assert resolved({"*": "full"}, keep_sinks=True)[0].uniform_full


def test_distinct_patterns_and_descriptions():
    layer = resolved({"0": {"default": "radial", "heads": {"1": [{"steps": "0-4", "use": "sink"}]}}})[0]
    assert layer.distinct() == {Radial(), Sink(), Full()}
    assert layer.describe() == "3 x radial, 1 x sink at steps 0-4"
    assert resolved({"*": {"radial": {"decay": 0.5}}})[0].describe() == "radial(decay=0.5)"
    plan = plan_of({"0": "sink", "1-2": {"default": "radial", "heads": {"0": "sink"}}})
    assert plan.describe().startswith("sink, radial (dense_first 0, ")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"4-6": "radial"}, r"layers '4-6': transformer has 6 layers \(0-5\)"),
        ({"down.*": "radial"}, "layers 'down.*' match none of the 6 layers of transformer, such as blocks.0.attn1"),
        ({"2": {"heads": {"4": "sink"}}}, r"heads '4': layer blocks.2.attn1 has 4 heads \(0-3\)"),
    ],
)
def test_plans_beyond_the_model_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        resolved(layers)


# ---------------------------------------------------------------- models


def test_check_model():
    spec = {"family": "wan", "class": "WanTransformer3DModel", "layers": 30, "heads": 12}
    plan = plan_of({}, model=spec)
    plan.check_model("wan", "WanTransformer3DModel", 30, 12)
    for given, message in [
        (("ltx", "WanTransformer3DModel", 30, 12), "this plan is for family wan, the model has family ltx"),
        (("wan", "Other", 30, 12), "this plan is for class WanTransformer3DModel, the model has class Other"),
        (("wan", "WanTransformer3DModel", 40, 12), "this plan is for layers 30, the model has layers 40"),
        (("wan", "WanTransformer3DModel", 30, 40), "this plan is for heads 12, the model has heads 40"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan.check_model(*given)
    plan_of({}, model={"family": "any"}).check_model("unet", "X", 1, 1)
    plan_of({}, model={"heads": 8}).check_model("unet", "X", 1, 8)


# ---------------------------------------------------------------- uniform plans, presets, and what sparsify accepts


def test_uniform():
    plan = AttentionPlan.uniform(Radial(), dense_first=0.2, min_tokens=64, keep_sinks=True)
    assert plan.schedule == Schedule(dense_first=0.2, min_tokens=64)
    layers = plan.resolve("unet", ["a", "b"], [2, 3])
    assert [layer.at(0, 1) for layer in layers] == [(KeepSinks(Radial()),) * 2, (KeepSinks(Radial()),) * 3]
    assert AttentionPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AttentionPlan.uniform("radial"),
            r"uniform needs a pattern or a selector, such as Radial\(\), got 'radial'",
        ),
        (lambda: AttentionPlan.uniform(Radial(), dense=3), "unknown plan option 'dense'; the options are dense_first"),
        (
            lambda: presets.load("radiall"),
            "unknown preset 'radiall'; the presets are minireel-large, .*, spatial-temporal; for one model: cogvideox/",
        ),
        (lambda: resolve_plan("radiall"), "'radiall' is neither a preset .* nor a plan file"),
        (lambda: resolve_plan("missing.yaml"), "there is no plan file missing.yaml"),
        (
            lambda: resolve_plan(7),
            "a plan is a preset name, a path, an AttentionPlan, a Pattern or a Selector, got int",
        ),
    ],
)
def test_bad_plans(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_counts_as_a_plan(tmp_path):
    plan = presets.load("sliding_tile")
    assert resolve_plan("sliding-tile") == resolve_plan("sliding_tile") == resolve_plan(plan) == plan
    path = tmp_path / "plan"
    plan.save(path)
    assert resolve_plan(path) == resolve_plan(str(path)) == plan
    every_step = resolve_plan(Radial())
    assert every_step == AttentionPlan.uniform(Radial())
    assert not every_step.schedule.dense_at(0, 1)


def test_presets_fit_every_model_and_are_sparse():
    general = ("neighborhood", "radial", "sliding-tile", "spatial-temporal")
    boxed = ("large", "length-2x", "length-4x", "native", "side-2x", "side-4x")
    boxed = tuple(f"minireel-{name}" for name in boxed)
    assert presets.names() == (*boxed, *general)
    for name in boxed:
        presets.load(name).check_model("wan", "WanTransformer3DModel", 6, 8)
    grid = TokenGrid(9, 32, 32)
    for name in general:
        plan = presets.load(name)
        plan.check_model("anything", "Any", 1, 1)
        assert (plan.schedule.dense_first, plan.schedule.min_tokens, plan.schedule.max_density) == (0.1, 1024, 0.7)
        layer = plan.resolve("unet", ["x"], [4])[0]
        orders = (None, grid.tile_order())
        for pattern in layer.distinct():
            assert min(pattern.block_mask(grid, order=order).density for order in orders) < plan.schedule.max_density


def test_plans_are_hashable_and_immutable():
    plan = presets.load("radial")
    assert hash(plan) == hash(presets.load("radial"))
    with pytest.raises(AttributeError):
        plan.keep_sinks = True
    assert plan.with_schedule(dense_first=3).schedule.dense_first == 3


def test_preferred_tiles():
    grid = TokenGrid(9, 32, 32)
    assert SlidingTile(3).preferred_tile(grid) == (4, 8, 8)
    assert Neighborhood(0.6, stride=(2, 8, 8)).preferred_tile(grid) == (2, 8, 8)
    assert Radial().preferred_tile(grid) is None
    columns = Temporal(1).preferred_tile(grid)
    assert columns[0] == grid.frames
    order = grid.tile_order(columns)
    assert Temporal(1).block_mask(grid, order=order).density < 0.7 * Temporal(1).block_mask(grid).density
    assert Temporal(1).preferred_tile(TokenGrid(1, 8, 8)) is None
    assert (Sink() | KeepSinks(SlidingTile(1))).preferred_tile(grid) == (4, 8, 8)


def test_preset_files_are_package_data():
    assert Path(presets.FOLDER).is_dir()
