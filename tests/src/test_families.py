"""Every family: an all-seeing plan changes nothing, a sparse one equals dense attention under the token mask, the grid
is where the pixels are, and every model of diffusers is either covered or refused with a reason."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import sparsereel
from sparsereel import AttentionPlan
from sparsereel.families.layout import decode
from sparsereel.inject import injection_of
from sparsereel.patterns import Full, Neighborhood


def load(name: str):
    """A module beside this file: tests are no packages."""
    spec = importlib.util.spec_from_file_location(f"sparsereel_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cases = load("family_cases")
FAMILIES = {**load("family_videos").VIDEO_FAMILIES, **load("family_images").IMAGE_FAMILIES}
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(FAMILIES)
EVERYTHING = Neighborhood(window=(99, 99, 99))
NEAR = Neighborhood(window=(1, 3, 5))


def run(model, inputs):
    with torch.no_grad():
        out = model(**inputs, return_dict=False)
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack(out) if isinstance(out, list) else out


@pytest.fixture(params=NAMES)
def case(request):
    return FAMILIES[request.param]


def conditioned(model, inputs, before):
    """1e-5; of the output's scale where the model carries rounding so far that the definition itself misses 1e-5."""
    with sparsereel.sparsified(model, AttentionPlan.uniform(EVERYTHING), backend="reference"):
        exact = run(model, inputs)
    if torch.allclose(exact, before, rtol=1e-5, atol=1e-5):
        return 1e-5
    return 1e-5 * max(1.0, float(before.abs().max()))


def test_full_and_sparse_and_back(tiny, case):
    model = case.model()
    for shape in case.shapes:
        inputs, grids = case.inputs(shape), case.grids(shape)
        before = run(model, inputs)
        assert before.isfinite().all()
        for pattern in (Full(), EVERYTHING):
            with sparsereel.sparsified(model, AttentionPlan.uniform(pattern)) as report:
                assert report.replaced == len(report.layers) == case.layers
                actual = run(model, inputs)
            bound = 1e-5
            if not torch.allclose(actual, before, rtol=bound, atol=bound):
                bound = conditioned(model, inputs, before)
            torch.testing.assert_close(actual, before, rtol=1e-5, atol=bound)
        with tiny.dense_under(tiny.same_mask(NEAR), grids) as masked:
            expected = run(model, inputs)
        assert len(masked) == case.layers * case.calls
        assert set(masked) == {grid.seq_len for grid in grids}
        with sparsereel.sparsified(model, NEAR):
            actual = run(model, inputs)
            report = sparsereel.report(model)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert (actual - before).abs().max() > 1e-3
        assert all(row.calls == case.calls and row.dense_calls == 0 for row in report), str(report)
        assert report.token_density < 1
        assert torch.equal(run(model, inputs), before)


def seen(model, inputs):
    """Grid and keys (B, H, S, D) of the first attention call."""
    found = []
    with sparsereel.sparsified(model, NEAR):
        layer = injection_of(model).runtime.layers[0]
        attend = layer.attend

        def look(q, k, v, call):
            found.append((layer.runtime.layer_layout(q.shape[2]), k))
            return attend(q, k, v, call)

        layer.attend = look
        run(model, inputs)
    layout, keys = found[0]
    return decode(layout), keys


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].pixels])
def test_pixels_lie_where_the_grid_says(name):
    """Other pixels under one token change that token alone, in the first layer."""
    case = FAMILIES[name]
    model, shape = case.model(), case.shapes[1]
    inputs = case.inputs(shape)
    grid, keys = seen(model, inputs)
    place = (shape[0] - 1, 5, 7)
    _, others = seen(model, case.touched(inputs, shape, place))
    changed = ((keys - others).abs().amax((0, 1, 3)) > 1e-4).nonzero().flatten().tolist()
    t, h, w = (axis[changed].tolist() for axis in grid.coordinates())
    assert list(zip(t, h, w, strict=True)) == [place]


# ------------------------------------------------------------------ calls that are not understood


def dense_reasons(name, inputs, model=None):
    """Why layers stayed dense; their output has to be the untouched model's."""
    model = FAMILIES[name].model() if model is None else model
    before = run(model, inputs)
    with sparsereel.sparsified(model, NEAR):
        torch.testing.assert_close(run(model, inputs), before, rtol=1e-5, atol=1e-5)
        return {row.reason for row in sparsereel.report(model) if row.dense_calls == row.calls > 0}


def odd_ids(shape):
    inputs = FAMILIES["flux"].inputs(shape)
    ids = inputs["img_ids"].clone()
    ids[[3, 4]] = ids[[4, 3]]
    return {**inputs, "img_ids": ids}


def two_lengths(shape):
    return {**FAMILIES["lumina2"].inputs(shape), "encoder_attention_mask": cases.short().bool()}


def coordinates(shape):
    return {**FAMILIES["ltx"].inputs(shape), "num_frames": None, "video_coords": torch.rand(cases.BATCH, 3, 288)}


def added_to_logits(shape):
    inputs = FAMILIES["chroma"].inputs(shape)
    return {**inputs, "attention_mask": inputs["attention_mask"].float()}


def two_images(shape):
    # The model takes the first sample's shapes for all.
    shapes = [[shape], [(1, shape[2], shape[1])]]
    return {**FAMILIES["qwen_image"].inputs(shape), "img_shapes": shapes}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("flux", odd_ids, "img_ids are not the rows and columns"),
        ("lumina2", two_lengths, "prompts of different lengths"),
        ("ltx", coordinates, "coordinates of tokens"),
        ("chroma", added_to_logits, "an attention mask of shape"),
        ("qwen_image", two_images, "images of different sizes"),
    ],
)
def test_doubtful_layouts_stay_dense_with_the_reason(name, change, reason):
    case = FAMILIES[name]
    reasons = dense_reasons(name, change(case.shapes[0]))
    assert len(reasons) == 1
    assert reason in reasons.pop()


def test_a_compiled_model_does_not_guess_positions():
    case = FAMILIES["flux"]
    inputs = case.inputs(case.shapes[0])
    model = case.model()
    before = run(model, inputs)
    with sparsereel.sparsified(model, NEAR):
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(run(compiled, inputs), before, rtol=1e-5, atol=1e-5)
        assert all("whole compiled model" in row.reason for row in sparsereel.report(model))


def test_changed_ids_are_read_again():
    case = FAMILIES["flux"]
    model, inputs = case.model(), case.inputs((1, 16, 18))
    ids = inputs["img_ids"]
    columns = Neighborhood(window=(1, 99, 3))
    with sparsereel.sparsified(model, columns):
        run(model, inputs)
        ids.copy_(cases.places((1, 8, 36)))
        run(model, inputs)
        density = sparsereel.report(model).token_density
        run(model, inputs)
    wide, high = (columns.token_mask(case.grids((1, *s))[0]).float().mean() for s in ((16, 18), (8, 36)))
    assert density == pytest.approx(float(wide + high) / 2, abs=1e-6)
    assert wide != high


def test_arguments_may_be_positional():
    case = FAMILIES["flux"]
    model, inputs = case.model(), case.inputs(case.shapes[0])
    order = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    with sparsereel.sparsified(model, NEAR), torch.no_grad():
        by_name = model(**inputs, return_dict=False)[0]
        by_place = model(*(inputs[name] for name in order), return_dict=False)[0]
        assert all(row.dense_calls == 0 for row in sparsereel.report(model))
    assert torch.equal(by_name, by_place)
