"""Settings of a search, its candidates, the plan that choices become, and plans used elsewhere."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsereel
from sparsereel import AttentionPlan, TokenGrid
from sparsereel.families.layout import video
from sparsereel.patterns import Full, Neighborhood, Radial, Skip, Spatial, Temporal
from sparsereel.plan import ModelSpec
from sparsereel.schedule import share_of
from sparsereel.search.candidates import default_grid, resolve
from sparsereel.search.costs import Item
from sparsereel.search.drive import _best
from sparsereel.search.emit import numbers, plan_of
from sparsereel.search.forecast import Anchor, Forecast
from sparsereel.search.reach import probes_of, weights_of
from sparsereel.search.record import Study
from sparsereel.search.settings import Settings, Target, cut_steps
from sparsereel.search.transfer import difference
from sparsereel.search.watch import LayerFacts, ModelFacts
from sparsereel.selectors import BlockTopk, Selector

OPTIONS = {
    "steps": None, "frames": None, "height": None, "width": None, "guidance": None,
    "seed": 0, "held_out": 1, "buckets": 3, "dense_first": 0.1, "backend": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((None, None, None), "exactly one of .* got none"),
        ((30.0, None, 0.5), "got target_psnr=30.0, budget=0.5"),
        ((None, None, 1.5), "budget is a density"),
        ((None, 0.5, None), "target_speedup must be at least 1"),
        ((float("nan"), None, None), "finite"),
        ((-3, None, None), "target_psnr must be above 0"),
    ],
)
def test_wrong_targets_are_refused(given, text):
    with pytest.raises(ValueError, match=text):
        Target.of(*given)


@pytest.mark.parametrize(
    ("prompts", "changed", "text"),
    [
        (["a"], {}, "leave none to calibrate on; at least 2"),
        ("a prompt", {}, "list of texts"),
        (["a", " "], {}, "list of texts"),
        (["a", "b"], {"buckets": 0}, "buckets must be a whole number, 1 or more, got 0"),
        (["a", "b"], {"steps": 2.5}, "steps must be a whole number"),
        (["a", "b"], {"dense_first": 1.0}, r"dense_first must be a share of the steps in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(prompts, changed, text):
    with pytest.raises(ValueError, match=text):
        Settings.of(prompts, Target("budget", 0.5), **{**OPTIONS, **changed})


def test_wrong_input_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="exactly one of"):
        sparsereel.search(object(), ["a", "b", "c"])
    with pytest.raises(ValueError, match="expected a diffusers pipeline"):
        sparsereel.search(object(), ["a", "b", "c"], budget=0.5)


@pytest.mark.parametrize("total", [3, 7, 20, 30, 50, 999])
@pytest.mark.parametrize("dense", [0.0, 0.1, 0.3])
def test_stretches_cover_every_step_once(total, dense):
    buckets = cut_steps(total, dense, 3)
    first = share_of(dense, total)
    covered = [step for bucket in buckets for step in range(bucket.first, bucket.last)]
    assert covered == list(range(first, total))
    for bucket in buckets:
        inside = [step for step in range(first, total) if (step, total) in bucket.stretch]
        assert inside == list(range(bucket.first, bucket.last))
        assert set(bucket.sampled(2)) <= set(inside)
    with pytest.raises(ValueError, match="none of the 1 steps"):
        cut_steps(1, 0.5, 3)


def test_candidates_are_distinct_and_sparse():
    grid = TokenGrid(9, 12, 12)
    found = resolve(None, None, grid)
    assert found[0] == Full()
    assert Skip() in found
    static = [m for m in found[1:] if not isinstance(m, (Selector, Skip))]
    masks = [m.token_mask(grid) for m in static]
    assert len(masks) > 10
    assert all(mask.float().mean() <= 0.9 for mask in masks)
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_candidates_by_name_and_by_plan():
    grid = TokenGrid(9, 12, 12)
    assert resolve(["skip", "block-topk"], None, grid) == (Full(), Skip(), *default_grid()["block_topk"])
    assert resolve([Temporal(1), Temporal(1)], None, grid) == (Full(), Temporal(1))
    from_plan = resolve(None, "spatial-temporal", grid)
    assert [str(m) for m in from_plan] == ["full", "any(spatial, sink)", "any(temporal(width=0.1), sink)"]
    with pytest.raises(ValueError, match="unknown candidate 'radail'; allowed: full, skip, radial"):
        resolve(["radail"], None, grid)
    with pytest.raises(ValueError, match="no candidate besides full"):
        resolve(["full"], None, grid)
    with pytest.raises(ValueError, match="either candidates or a plan"):
        resolve(["skip"], "radial", grid)


CANDIDATES = (Full(), Skip(), Radial(0.5), Spatial(1) | Temporal(1), BlockTopk(0.2), Neighborhood((0.5, 0.5, 0.5)))


def study(layers: int = 5, heads: int = 6) -> Study:
    settings = Settings.of(["a", "b"], Target("budget", 0.5), **OPTIONS)
    facts = ModelFacts(
        spec=ModelSpec("wan", "WanTransformer3DModel", layers, heads),
        layers={("transformer", n): LayerFacts(f"blocks.{n}.attn1", video(5, 8, 8), heads, 16) for n in range(layers)},
        steps=20,
        ordered=True,
        dtype=torch.float32,
        device_type="cpu",
        extended="",
        fingerprint="x",
    )
    return Study.of(settings, facts, CANDIDATES, cut_steps(20, 0.1, 3), None)


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_says_what_was_chosen_and_round_trips(seed, tmp_path: Path):
    searched = study()
    items = [Item("transformer", n, head, b) for n in range(5) for b in range(3) for head in range(6)]
    rng = np.random.default_rng(seed)
    choice = rng.integers(0, len(CANDIDATES), len(items))
    # Some layers alike, some heads alike over all stretches.
    for n, item in enumerate(items):
        if item.layer in (1, 2) or item.head == 3:
            choice[n] = 2
    plan = plan_of(searched, items, choice)
    for path in (tmp_path / "plan.yaml", tmp_path / "plan.json"):
        plan.save(path)
        assert AttentionPlan.load(path) == plan
    resolved = plan.resolve("transformer", [f"blocks.{n}.attn1" for n in range(5)], [6] * 5)
    for item, number in zip(items, choice.tolist(), strict=True):
        bucket = searched.buckets[item.bucket]
        for step in range(bucket.first, bucket.last):
            assert resolved[item.layer].at(step, 20)[item.head] == CANDIDATES[number]
    assert plan.schedule.dense_at(0, 20)
    assert plan.schedule.dense_at(1, 20)


def test_a_choice_of_full_everywhere_is_a_dense_plan():
    items = [Item("transformer", n, head, b) for n in range(5) for b in range(3) for head in range(6)]
    plan = plan_of(study(), items, np.zeros(len(items), dtype=int))
    assert all(layer.uniform_full for layer in plan.resolve("transformer", ["x"] * 5, [6] * 5))


def test_numbers_are_written_as_ranges():
    assert numbers([0, 3, 7, 8, 9]).text == "0,3,7-9"
    assert 8 in numbers([0, 3, 7, 8, 9])


def test_recordings_of_other_settings_are_not_taken_up():
    one = study()
    assert one.identity() == study().identity()
    assert one.identity() != replace(one, settings=replace(one.settings, seed=1)).identity()
    assert one.identity() != replace(one, candidates=CANDIDATES[:-1]).identity()
    assert one.identity() != replace(one, facts=replace(one.facts, fingerprint="y")).identity()
    # Targets and held-out prompts do not change what is recorded.
    assert one.identity() == replace(one, settings=replace(one.settings, target=Target("target_psnr", 30))).identity()


def test_weights_are_what_reached_the_output_for_what_was_put_in():
    searched = study(layers=2, heads=2)
    items = [Item("transformer", n, head, b) for n in range(2) for b in range(3) for head in range(2)]
    errors = np.zeros((len(items), len(CANDIDATES)))
    errors[:, 2] = 0.1
    # The second layer reaches the output three times as far, the first stretch five times as far as the others.
    found = {"layers 0": 0.1, "layers 1": 0.3, "stretch 0": 0.5, "stretch 1": 0.1, "stretch 2": 0.1, "all": 0.7}
    weights = weights_of(searched, items, errors, 2, found)
    assert (weights * errors[:, 2]).sum() == pytest.approx(0.7)
    table = weights.reshape(2, 3, 2)
    assert table[1] == pytest.approx(3 * table[0])
    assert table[:, 0] == pytest.approx(5 * table[:, 1])
    # A run without visible effect leaves a small weight, never none.
    blind = weights_of(searched, items, errors, 2, {**found, "layers 0": 0.0})
    assert (blind > 0).all()
    assert {probe.name for probe in probes_of(items)} == set(found)


def test_a_model_alone_cannot_be_searched(tiny):
    with pytest.raises(ValueError, match="needs a pipeline, got the model WanTransformer3DModel alone"):
        sparsereel.search(tiny.CASES["wan"].model(), ["a", "b", "c"], budget=0.5)


def test_forecasts_follow_what_was_measured():
    forecast = Forecast(Anchor(seconds=10, attention=6, own_attention=5, psnr=20), ((1.0, 20.0),))
    assert forecast.psnr(0) == 100
    assert forecast.psnr(0.1) == pytest.approx(30)
    assert forecast.psnr(forecast.error_for(27)) == pytest.approx(27)
    assert forecast.speedup(0.2) == pytest.approx(2)
    assert forecast.share_for(2.0) == pytest.approx(0.2)
    measured = {"psnr": 26.0, "seconds": 6.0, "dense_seconds": 10.0}
    learnt = forecast.learn(0.1, 0.2, measured)
    assert learnt.psnr(0.1) == pytest.approx(26)
    assert learnt.seconds(0.2) == pytest.approx(6)
    # Dense costs what it did, and the way back from a speed-up to a share holds.
    assert learnt.seconds(1.0) == pytest.approx(9)
    assert learnt.speedup(learnt.share_for(1.3)) == pytest.approx(1.3)


def test_forecasts_tell_attention_from_the_rest_of_a_clip():
    """A slow decode is no reason to skip more: 3 seconds in attention stay 3 however long the rest took."""
    forecast = Forecast(Anchor(seconds=10, attention=6, own_attention=5, psnr=20), ((1.0, 20.0),))
    timed = {"psnr": 26.0, "dense_seconds": 20.0, "dense_attention_seconds": 12.0, "attention_seconds": 6.0}
    learnt = forecast.learn(0.1, 0.5, {**timed, "seconds": 16.0})
    # The machine ran at half its pace: 3 seconds in attention, 5 in the rest.
    assert learnt.seconds(0.5) == pytest.approx(8)
    assert learnt.seconds(1.0) == pytest.approx(10)
    assert learnt.gain == pytest.approx(forecast.learn(0.1, 0.5, {**timed, "seconds": 14.0}).gain)
    assert learnt.speedup(learnt.share_for(1.2)) == pytest.approx(1.2)


def test_a_speedup_missed_by_chance_keeps_the_exact_plan():
    target = Target("target_speedup", 2.0)

    def tried(*pairs):
        return [(None, None, {"speedup": speedup, "psnr": psnr}) for speedup, psnr in pairs]

    exact, emptier, slower = (1.97, 31.0), (1.99, 14.0), (1.6, 40.0)
    (_, _, taken), met = _best(target, tried(exact, emptier, slower))
    assert (taken["psnr"], met) == (31.0, False)
    # One that does reach it comes first, and the most exact of those.
    (_, _, taken), met = _best(target, tried(exact, (2.01, 14.0), (2.3, 15.0)))
    assert (taken["psnr"], met) == (15.0, True)
    # PSNR does not vary from run to run.
    found = [(None, None, {"psnr": psnr}) for psnr in (28.0, 29.5)]
    assert _best(Target("target_psnr", 30.0), found)[0][2]["psnr"] == 29.5


def test_forecasts_start_from_the_middling_clip():
    """Calls cost something however few blocks they visit: 3 of 5 seconds at a third of the work, not 1.7."""
    anchor = Anchor(seconds=10, attention=6, own_attention=5, psnr=20, sparse_attention=3)
    forecast = Forecast.of(anchor, 1.0, 1 / 3)
    assert forecast.seconds(1 / 3) == pytest.approx(4 + 3)
    assert forecast.seconds(1.0) == pytest.approx(4 + 5)
    assert forecast.seconds(0.0) == pytest.approx(4 + 2)
    # Slower than dense: no plan is promised to be faster; nearly dense: nothing can be said.
    assert Forecast.of(replace(anchor, sparse_attention=7), 1.0, 0.3).seconds(0.3) == pytest.approx(9, abs=0.2)
    assert Forecast.of(anchor, 1.0, 0.95).gain == 1.0
    # An older recording did not time it.
    assert Forecast.of(replace(anchor, sparse_attention=None), 1.0, 0.3).gain == 1.0


@pytest.mark.parametrize(
    ("layout", "steps", "text"),
    [
        (video(5, 8, 8), 20, ""),
        (video(9, 8, 8), 20, "a grid of 5x8x8 tokens and runs on 9x8x8 tokens"),
        (video(5, 8, 8), 30, "20 steps and runs with 30"),
        (video(5, 8, 8), None, ""),
    ],
)
def test_what_differs_is_said(layout, steps, text):
    assert difference([list(video(5, 8, 8))], 20, layout, steps) == text


def test_a_plan_used_elsewhere_warns_once(tiny, caplog):
    case = tiny.CASES["wan"]
    model = case.model()
    calibrated = AttentionPlan(
        components=AttentionPlan.uniform(Radial()).components, calibration={"geometry": [[0, 9, 8, 8]], "steps": 20}
    )
    with caplog.at_level(logging.WARNING, logger="sparsereel"), sparsereel.sparsified(model, calibrated):
        tiny.run(model, case.inputs())
        tiny.run(model, case.inputs())
    said = [r.getMessage() for r in caplog.records if "searched for" in r.getMessage()]
    assert said == [
        "this plan was searched for a grid of 9x8x8 tokens and runs on 5x8x8 tokens; "
        "it may cost or change more than it says"
    ]
    caplog.clear()
    same = AttentionPlan(components=calibrated.components, calibration={"geometry": [[0, 5, 8, 8]], "steps": 20})
    with caplog.at_level(logging.WARNING, logger="sparsereel"), sparsereel.sparsified(model, same):
        tiny.run(model, case.inputs())
    assert not [r for r in caplog.records if "searched for" in r.getMessage()]
