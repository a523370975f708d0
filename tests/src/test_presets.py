"""Published settings: every file loads, names its source, fits its family, and costs what is predicted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import sparsereel
from sparsereel import AttentionPlan, TokenGrid, presets
from sparsereel.families import FAMILIES
from sparsereel.patterns import Neighborhood, Radial

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "benchmarks" / "presets.py"
    spec = importlib.util.spec_from_file_location("presets_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", presets.published())
def test_every_published_setting_says_where_it_comes_from(name):
    plan = presets.load(name)
    family = name.split("/")[0]
    assert plan.model.family == family
    assert family in {known.name for known in FAMILIES}
    assert set(plan.source) - {"text"} == {"paper", "setting", "from", "grid", "steps", "layers", "claim"}
    assert "arXiv" in plan.source["paper"]
    assert presets.load(name.replace("_", "-")) == plan == presets.load(name.replace("-", "_"))
    assert AttentionPlan.from_dict(plan.to_dict()) == plan
    layers = plan.source["layers"]
    resolved = plan.resolve("transformer", [f"blocks.{n}" for n in range(layers)], [2] * layers)
    assert not all(layer.uniform_full for layer in resolved)


def test_the_numbers_of_the_papers(script):
    """Settings of the digest that have a closed form or were published beside a figure."""
    radial = script.predict("wan/radial")
    assert (radial["dense_steps"], radial["dense_layers"]) == (12, 1)
    grid = TokenGrid(1, 256, 256)
    window = Neighborhood(window=(1, 80, 80), stride=(1, 16, 16)).block_mask(grid, order=grid.tile_order((1, 16, 16)))
    assert window.density == pytest.approx(1 / 10.24)
    assert script.predict("hunyuan_video/rectified")["flops"] == pytest.approx(0.2)
    sparse = script.predict("wan/rectified")
    # 5 of 50 steps and 2 of 40 layers dense, the rest at no less than a quarter.
    assert sparse["flops"] == pytest.approx((5 * 40 + 45 * 2 + 45 * 38 * 0.25) / (50 * 40))
    assert sparse["least"]
    assert script.predict("hunyuan_video/xattention")["flops"] is None
    assert "from q and k" in script.row_of(script.predict("hunyuan_video/xattention"))


@pytest.mark.parametrize(("decay", "density"), [(0.2, 0.287), (0.8, 0.377)])
def test_released_radial_masks_have_the_published_density(decay, density):
    """768 x 1280, 69 frames, blocks of 128: 0.2871 and 0.3768 were measured with the authors' code."""
    mask = Radial(decay, flavour="released").block_mask(TokenGrid(18, 48, 80), (128, 128))
    assert round(mask.density, 3) == density


def test_a_published_setting_runs_by_name(tiny):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), tiny.wan_inputs(5, 32, 32)
    with sparsereel.sparsified(model, "wan/vsa"):
        tiny.run(model, inputs)
        report = sparsereel.report(model)
    assert report.density < 0.6
    with pytest.raises(ValueError, match="this plan is for family hunyuan_video, the model has family wan"):
        sparsereel.sparsify(model, "hunyuan_video/svg")
    with pytest.raises(ValueError, match="this plan is for layers 40, the model has layers 3"):
        sparsereel.sparsify(model, "wan/rectified")
    with pytest.raises(ValueError, match="for one model: cogvideox/rectified"):
        sparsereel.sparsify(model, "wan/radail")
