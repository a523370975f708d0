"""Whole searches on a clip of minireel too small to mean much: budgets, resuming, the command, what is left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsereel
from sparsereel import AttentionPlan, minireel, ministill
from sparsereel.cli.main import run as command
from sparsereel.patterns import Skip, Spatial, Temporal
from sparsereel.search import reach, record
from sparsereel.search.verify import HeldOut
from sparsereel.selectors import BlockTopk

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red 3 moving right on navy", "a green 7 moving up on black", "a white 5 moving left on navy"]
CANDIDATES = (Skip(), Spatial(0), Temporal(0.2), BlockTopk(0.4))
# 192 tokens: two query blocks, three key blocks.
SIZE: dict[str, Any] = {"frames": 9, "height": 64, "width": 64, "steps": 4}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return minireel.load()


def find(pipe: Any, folder: Path | None, **changed: Any) -> Any:
    options = {"budget": 0.6, "held_out": 1, "buckets": 2, "candidates": CANDIDATES, **SIZE, **changed}
    return sparsereel.search(pipe, PROMPTS, folder=folder, progress=False, **options)


@pytest.fixture(scope="module")
def searched(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished search and its folder."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("searched")
    try:
        return find(pipe, folder), folder
    finally:
        torch.set_num_threads(before)


def test_a_budget_is_kept_as_measured(searched, tmp_path):
    result, _ = searched
    assert result.met
    assert 0.3 < result.predicted.density <= 0.6
    assert result.measured["density"] == pytest.approx(result.predicted.density, abs=0.02)
    assert 5 < result.measured["psnr"] <= 100
    assert result.measured["sound"] in (0.0, 1.0)
    result.save(tmp_path / "plan.yaml")
    assert AttentionPlan.load(tmp_path / "plan.yaml") == result.plan


def test_the_front_runs_from_dense_to_the_cheapest(searched):
    front = searched[0].front
    assert front[0].density == pytest.approx(1.0)
    assert front[0].error == 0
    # One dense step of four; everything else skipped.
    assert front[-1].density == pytest.approx(0.25)
    assert all(a.error <= b.error for a, b in pairwise(front))
    assert all(a.seconds >= b.seconds - 1e-9 for a, b in pairwise(front))


def test_the_plan_says_where_it_comes_from(searched):
    known = searched[0].plan.calibration
    assert known["geometry"] == [[0, 3, 8, 8]]
    assert known["steps"] == 4
    assert known["prompts"] == PROMPTS[:2]
    assert known["held_out"] == PROMPTS[2:]
    assert known["target"] == {"budget": 0.6}
    heads = known["heads"]["transformer"]["0"]
    assert len(heads["error"]) == len(heads["cost"]) == len(heads["own_frame"]) == 8
    assert all(0 <= share <= 1.001 for share in heads["own_frame"])
    assert searched[0].plan.model.class_name == "WanTransformer3DModel"


def test_a_killed_search_goes_on_to_the_same_plan(pipe, searched, tmp_path, monkeypatch):
    result, folder = searched
    calls = 0
    measure = record.measure

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 50:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(record, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        find(pipe, tmp_path)
    kept = sorted(path.name for path in tmp_path.rglob("*.*") if path.is_file())
    assert kept == ["prompt-0000.safetensors"]
    assert not hasattr(pipe.transformer, "_sparsereel_injection")
    monkeypatch.setattr(record, "measure", measure)
    again = find(pipe, tmp_path)
    for path in sorted(folder.rglob("*.safetensors")):
        twin = tmp_path / path.relative_to(folder)
        assert twin.read_bytes() == path.read_bytes()
    reach = next(folder.rglob("reach.json")).relative_to(folder)
    assert json.loads((tmp_path / reach).read_text()) == json.loads((folder / reach).read_text())
    assert replace(again.plan, calibration={}) == replace(result.plan, calibration={})
    assert (again.predicted.error, again.predicted.density) == (result.predicted.error, result.predicted.density)


def test_a_finished_recording_serves_other_targets(pipe, searched, monkeypatch):
    _, folder = searched

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("recorded again")

    monkeypatch.setattr(record, "measure", never)
    cheap = find(pipe, folder, budget=0.25, held_out=1)
    assert cheap.predicted.density == pytest.approx(0.25)
    best = find(pipe, folder, budget=None, target_psnr=100.0)
    assert best.predicted.density == pytest.approx(1.0)
    assert best.measured["psnr"] > 60
    impossible = find(pipe, folder, budget=0.1)
    assert not impossible.met
    assert "budget 0.1 is not reached: 0.25 measured" in impossible.note


def test_a_damaged_recording_is_named(pipe, searched, tmp_path):
    _, folder = searched
    path = next(folder.rglob("prompt-0000.safetensors"))
    twin = tmp_path / path.relative_to(folder)
    twin.parent.mkdir(parents=True)
    twin.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"prompt-0000.safetensors is damaged .* delete it"):
        find(pipe, tmp_path)


def test_the_pipeline_is_left_as_it_was(pipe, searched):
    assert not hasattr(pipe.transformer, "_sparsereel_injection")
    assert {type(block.attn1.processor).__name__ for block in pipe.transformer.blocks} == {"WanAttnProcessor"}
    assert not getattr(pipe, "_progress_bar_config", None)


def test_wrong_use_of_the_command_is_one_sentence(tmp_path, capsys):
    assert command(["search", "-o", str(tmp_path / "plan.yaml")]) == 2
    assert "give exactly one of target_psnr, target_speedup, budget; got none" in capsys.readouterr().err
    assert command(["search", "--budget", "0.5", "-o", str(tmp_path / "plan.txt")]) == 2
    assert "-o must be a file that ends in .yaml or .json" in capsys.readouterr().err
    assert command(["search", "--budget", "0.5", "--model", "x/y"]) == 2
    assert "with --model give --prompts FILE" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_plan_and_says_what_it_missed(pipe, searched, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparsereel.generation.load_pipeline", lambda *args: pipe)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = ["search", "--prompts", str(prompts), "--held-out", "0", "--buckets", "1"]
    arguments += ["--candidates", "skip,temporal", "--dense-first", "0.5", "-o", str(tmp_path / "plan.yaml")]
    arguments += [part for name, value in SIZE.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(record, "measure", _interrupted)
    assert command([*arguments, "--budget", "0.8"]) == 130
    assert not (tmp_path / "plan.yaml").exists()
    monkeypatch.undo()
    monkeypatch.setattr("sparsereel.generation.load_pipeline", lambda *args: pipe)
    assert command([*arguments, "--budget", "0.3", "--json", str(tmp_path / "result.json")]) == 1
    assert "budget 0.3 is not reached: 0.5 predicted" in capsys.readouterr().err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["met"] is False
    assert result["predicted"]["density"] == pytest.approx(0.5)
    assert AttentionPlan.load(tmp_path / "plan.yaml").calibration["target"] == {"budget": 0.3}


def _interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("better", [True, False])
def test_what_stands_alone_is_measured_and_taken_where_it_is_better(pipe, searched, monkeypatch, better):
    _, folder = searched
    measured = HeldOut.measure

    def measure(self: HeldOut, plan: AttentionPlan) -> dict[str, Any]:
        found = measured(self, plan)
        ((_, layers),) = plan.components
        alone = len(layers) == 1 and not layers[0][1].heads
        return {**found, "psnr": 50.0 if alone == better else 20.0}

    monkeypatch.setattr(HeldOut, "measure", measure)
    result = find(pipe, folder)
    rival = result.plan.calibration["rival"]
    assert rival["method"] in result.plan.calibration["candidates"]
    assert rival["taken"] == better
    assert rival["density"] <= 0.6
    assert result.measured["psnr"] == 50.0
    heads = {
        str(method)
        for layer in result.plan.resolve("transformer", list("abcdef"), [8] * 6)
        for method in layer.at(3, 4)
    }
    assert (heads == {rival["method"]}) == better


def test_a_search_on_an_extended_pipeline_is_for_its_size_and_leaves_it_extended(pipe, tmp_path):
    sparsereel.extend(pipe, frames=37, method="pi_time")
    try:
        small = {"frames": None, "height": 64, "width": 64, "steps": 2, "candidates": ("skip", "temporal")}
        found = find(pipe, tmp_path, budget=0.8, buckets=1, dense_first=0.0, **small).plan.calibration
        assert found["size"] == {"frames": 37, "height": 64, "width": 64}
        assert found["extended"] == "pi in time"
        assert found["geometry"] == [[0, 10, 8, 8]]
        assert pipe.transformer._sparsereel_injection.runtime.extension is not None
        assert "forward" in vars(pipe.transformer.rope)
    finally:
        sparsereel.restore(pipe)
    sparsereel.extend(pipe, frames=37, method="window")
    try:
        with pytest.raises(ValueError, match="does not go with window; it takes methods that move tokens only: plain"):
            find(pipe, tmp_path)
    finally:
        sparsereel.restore(pipe)


def test_a_search_where_a_small_clip_leads_is_for_the_steps_of_the_large_one(pipe, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(reach, "GROUPS", 1)
    sparsereel.extend(pipe, height=128, width=128, method="upscale")
    few = {"buckets": 1, "dense_first": 0.0, "candidates": ("skip", "temporal"), "frames": 5, "steps": 4}
    large = {**few, "height": None, "width": None}
    try:
        with pytest.raises(ValueError, match="give target_psnr or target_speedup"):
            find(pipe, tmp_path, **large)
        caplog.clear()
        found = find(pipe, tmp_path, budget=None, target_psnr=25.0, **large)
    finally:
        sparsereel.restore(pipe)
    calibration = found.plan.calibration
    assert calibration["geometry"] == [[0, 2, 16, 16]]
    assert calibration["steps"] == 1  # an eighth of 4, at least one
    assert found.plan.schedule.min_tokens == 2 * 16 * 16
    assert found.measured["psnr"] > 20
    assert 0.5 < found.measured["density"] < 1  # the small clip is dense
    assert "was searched for" not in caplog.text
    assert "stays dense" not in caplog.text


def test_a_small_picture_cannot_stay_dense_beside_coarser_grids():
    pipe = ministill.load()
    sparsereel.extend(pipe, height=128, width=128, method="upscale")
    with pytest.raises(ValueError, match="layers of UNet2DConditionModel lie on grids of several sizes"):
        sparsereel.search(pipe, ["a red 3 on navy"], target_psnr=30, steps=2, held_out=0, progress=False)


def test_the_command_extends_before_it_searches(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparsereel.generation.load_pipeline", lambda *args: pipe)
    plan = ["-o", str(tmp_path / "plan.yaml"), "--budget", "0.5"]
    assert command(["search", *plan, "--extend", "pi_time"]) == 2
    assert "--extend needs the size to search for" in capsys.readouterr().err
    assert command(["search", *plan, "--extend", "ultravico", "--frames", "37"]) == 2
    assert "does not go with ultravico" in capsys.readouterr().err
    sparsereel.restore(pipe)
    assert not (tmp_path / "plan.yaml").exists()
