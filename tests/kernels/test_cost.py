"""The cost table: fits recover what they were made from, predictions follow the mask, broken files are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsereel_kernels import BlockMask, cells, cost, cpu, dispatch, measure_cost, speed_table
from sparsereel_kernels.measure_cost import Sample, Sweep

TRUTH = (2e-4, 3e-8, 4e-10, 1e-10)


def made_up(backend: str = "cpu", weights: tuple[float, ...] = TRUTH) -> list[Sample]:
    samples = []
    for tokens in (1024, 4096, 8192):
        for density, allowed in ((1.0, 1.0), (0.4, 0.4), (0.12, 0.12), (0.9, 0.2)):
            pairs = tokens**2
            features = (1.0, tokens, pairs * allowed, pairs * (density - allowed))
            seconds = sum(w * x for w, x in zip(weights, features, strict=True))
            samples.append(Sample("float32", 64, backend, False, tokens, density, allowed, seconds))
    return samples


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder for tables."""
    # Not through XDG_CACHE_HOME: the built kernels lie there too.
    monkeypatch.setattr(speed_table, "user_file", lambda: tmp_path / "sparsereel" / "speed.json")
    dispatch.forget()
    yield tmp_path / "sparsereel"
    dispatch.forget()


def store(folder, fits) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "cost.json").write_text(json.dumps(cost.to_table(fits, {})))
    dispatch.forget()


def test_a_fit_recovers_the_law_that_samples_follow():
    (fit,) = measure_cost.fit(made_up(), "cpu")
    assert (fit.fixed, fit.per_token, fit.per_pair, fit.per_waste) == pytest.approx(TRUTH, rel=1e-6)
    assert fit.error < 1e-6
    assert fit.seconds(30_000, 0.3, 0.1) == pytest.approx(2e-4 + 9e-4 + 4e-10 * 9e7 + 1e-10 * 0.2 * 9e8, rel=1e-6)


def test_weights_are_never_negative():
    noisy = [Sample(**{**vars(s), "seconds": s.seconds * (1.3 if s.tokens == 1024 else 1)}) for s in made_up()]
    (fit,) = measure_cost.fit(noisy, "cpu")
    assert min(fit.fixed, fit.per_token, fit.per_pair, fit.per_waste) >= 0
    assert fit.error < 0.3


def test_expected_share_uses_the_table_where_there_is_one(cache):
    stripes = (torch.arange(512)[:, None] - torch.arange(512)).abs() % 64 < 4
    mask = BlockMask.from_dense(stripes[None, None], (128, 64))
    assert mask.density > 0.9 > 0.2 > mask.token_density
    untold = cost.expected_share(mask, "cpu")
    done = mask.cell_density
    assert mask.token_density < done < 0.5
    assert untold == pytest.approx(done + 0.06 * (mask.density - done)) == cost.work_share(mask, "cpu")
    assert cost.expected_share(mask, "torch") == pytest.approx(mask.density)
    store(cache, measure_cost.fit(made_up(weights=(0, 0, 4e-10, 1e-10)), "cpu"))
    told = cost.expected_share(mask, "cpu")
    assert told == pytest.approx(done + 0.25 * (mask.density - done))
    assert cost.expected_share(None, "cpu") == cost.work_share(None, "cpu") == 1.0


def test_cells_are_those_of_the_kernels():
    source = Path(cpu.__file__).parent / "csrc"
    assert f"PANEL_ROWS = {cells.PANEL};" in (source / "forward.h").read_text()
    assert f"STRIP = {cells.STRIP};" in (source / "unit.h").read_text()


def test_head_dim_scales_and_the_nearest_is_taken(cache):
    small = measure_cost.fit(made_up(), "cpu")[0]
    large = cost.Fit(**{**vars(small), "head_dim": 128, "per_pair": 9e-10})
    store(cache, [small, large])
    found = cost.find("cpu", torch.float32, 120, "cpu")
    assert found is not None
    assert found.per_pair == pytest.approx(9e-10 * 120 / 128)
    assert cost.find("cpu", torch.float32, 64, "cpu", backward=True) is None
    assert cost.find("cpu", torch.bfloat16, 64, "cpu") is None


@pytest.mark.parametrize("text", ["", "{", '{"version": 9, "fits": []}', '{"version": 1, "fits": [{"device": "cpu"}]}'])
def test_a_broken_table_is_left_out_with_a_warning(cache, caplog, text):
    cache.mkdir()
    (cache / "cost.json").write_text(text)
    dispatch.forget()
    assert cost.load() == ()
    assert "is left out" in caplog.text


def test_a_table_of_another_machine_is_not_used(cache):
    fit = measure_cost.fit(made_up(), "cpu")[0]
    store(cache, [cost.Fit(**{**vars(fit), "name": "Another CPU"})])
    assert cost.load() == ()


def test_measuring_covers_every_backend_and_feeds_dispatch(cache):
    sweep = Sweep(dtypes=(torch.float32,), head_dims=(16,), tokens=(256,), heads=1, repeats=1)
    batches = list(measure_cost.measure(sweep))
    assert len(batches) == measure_cost.shapes(sweep) == 1
    samples = list(batches[0])
    assert {s.backend for s in samples} >= {"torch", "sdpa"}
    assert {s.density for s in samples if s.backend == "sdpa"} == {1.0}
    assert all(s.seconds > 0 for s in samples)
    entries = measure_cost.orders(samples, "cpu")
    cache.mkdir(exist_ok=True)
    swapped = [{**entry, "order": ["torch", "cpu"]} for entry in entries]
    speed_table.user_file().write_text(json.dumps({"version": speed_table.VERSION, "entries": swapped}))
    dispatch.forget()
    q = torch.randn(1, 1, 256, 16)
    from sparsereel_kernels.run import Wants, problem_of

    assert dispatch.choose("auto", problem_of(q, q, q, None, None, None, Wants()), None).name == "torch"
