"""`sparsereel bench attention`, `pipeline` and `tune`: what they print and refuse; never how fast anything is."""

from __future__ import annotations

import json

import pytest

from sparsereel import AttentionPlan, TokenGrid, patterns, selectors, timing
from sparsereel.cli.main import run as command
from sparsereel.generation import Request

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = TokenGrid(4, 8, 16)


def test_every_pattern_and_backend_gets_a_row_with_both_shares():
    plan = AttentionPlan.uniform(patterns.Spatial(0))
    found = timing.time_attention(plan, GRID, heads=1, head_dim=16, dtype="fp32", repeats=2, backends=("cpu", "torch"))
    dense, *sparse = found["rows"]
    assert dense["backend"] == "SDPA"
    assert (dense["speedup"], dense["density"]) == (1.0, 1.0)
    assert [row["backend"] for row in sparse] == ["cpu", "torch"]
    for row in sparse:
        assert row["token_density"] == pytest.approx(0.25)
        assert row["density"] >= row["token_density"]
        assert row["share_of_ideal"] == pytest.approx(row["speedup"] * row["density"])
        assert row["share_of_ideal_tokens"] == pytest.approx(row["speedup"] * row["token_density"])


def test_backward_runs_and_the_definition_only_by_name():
    found = timing.time_attention(
        patterns.Spatial(0), GRID, heads=1, head_dim=16, dtype="fp32", backward=True, repeats=1
    )
    names = {row["backend"] for row in found["rows"]}
    assert {"SDPA", "torch"} <= names
    assert not names & {"reference", "flex"}


@pytest.mark.parametrize(
    ("plan", "options", "said"),
    [
        (selectors.BlockTopk(0.2), {}, "no pattern to time"),
        (patterns.Spatial(0), {"dtype": "int8"}, "unknown dtype"),
        (patterns.Full(), {}, "no pattern to time"),
        (patterns.Spatial(0), {"backends": ("triton",)}, "triton"),
        (patterns.Spatial(0), {"backends": ("magic",)}, "backend must be one of"),
    ],
)
def test_what_cannot_be_timed(plan, options, said):
    with pytest.raises(ValueError, match=said):
        timing.time_attention(plan, GRID, **{"heads": 1, "head_dim": 16, "dtype": "fp32", "repeats": 1, **options})


def test_a_pipeline_beside_amdahl():
    from sparsereel import minireel

    pipe = minireel.load()
    pipe.set_progress_bar_config(disable=True)
    request = Request("a red 3 moving right on navy", steps=2, frames=9, height=64, width=64)
    found = timing.time_pipeline(pipe, request, patterns.Spatial(0))
    share, density = found["attention_share"], found["sparse"]["density"]
    assert 0 < share < 1
    assert density < 1
    assert found["dense"]["density"] == 1
    assert found["amdahl"] == pytest.approx(1 / (1 - share + share * density))
    assert found["share_of_amdahl"] == pytest.approx(found["speedup"] / found["amdahl"])


def test_the_commands(capsys):
    small = ["--grid", "2x8x16", "--heads", "1", "--head-dim", "16", "--repeats", "1", "--json", "-"]
    assert command(["bench", "attention", "--plan", "spatial-temporal", *small]) == 0
    printed = capsys.readouterr()
    assert {row["backend"] for row in json.loads(printed.out)["rows"]} >= {"SDPA", "torch"}
    assert "share of ideal" in " ".join(printed.err.split())
    size = ["--frames", "9", "--height", "64", "--width", "64", "--steps", "1", "--dtype", "fp32", "--json", "-"]
    assert command(["bench", "pipeline", *size]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["request"]["steps"] == 1
    assert "Amdahl's law" in printed.err
    assert command(["bench", "attention", "--plan", "nothing"]) == 2
    assert command(["bench", "tune", "--density", "0"]) == 2


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU to tune")
def test_tuning_needs_a_gpu(capsys):
    assert command(["bench", "tune"]) == 4
    assert "needs a CUDA device" in capsys.readouterr().err
