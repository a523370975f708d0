"""The attention benchmark: runs, writes JSON, and times nothing when a backend is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sparsereel_kernels import torch_blocks

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention.py"
SMALL = ["--tokens", "300", "--heads", "2", "--head-dim", "16", "--repeat", "2", "--backends", "torch", "triton"]


@pytest.fixture(scope="module")
def bench():
    """The script as a module; `benchmarks` is no package."""
    spec = importlib.util.spec_from_file_location("bench_attention", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_writes_a_table_and_json(bench, tmp_path, capsys):
    path = tmp_path / "deep" / "result.json"
    assert bench.main([*SMALL, "--density", "0.5", "0.2", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [row["backend"] for row in result["rows"]] == ["dense", "torch"] * 2
    for row in result["rows"]:
        assert row["share_of_ideal"] == pytest.approx(row["speedup"] * row["density"])
        assert len(row["seconds"]) == 2
    assert "peak_extra_of_qkv" in result["rows"][1]
    assert "triton" in result["refused"]
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    printed = capsys.readouterr().out
    assert "share (tokens)" in printed
    assert "triton was left out" in printed


def test_json_to_standard_output(bench, capsys):
    assert bench.main([*SMALL, "--backward", "--dtype", "float32", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["backward"] is True


def test_nothing_is_timed_when_a_backend_is_wrong(bench, monkeypatch, capsys, tmp_path):
    right = torch_blocks.forward
    monkeypatch.setattr(torch_blocks, "forward", lambda *a: (right(*a)[0] * 1.1, right(*a)[1]))
    assert bench.main([*SMALL, "--json", str(tmp_path / "x.json")]) == 1
    assert "nothing was timed, because torch: out is off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0"], "--density must lie above 0 and up to 1"),
        (["--tokens", "0"], "must be at least 1"),
        (["--pattern", "radial", "--tokens", "1000"], "frames of 32 x 32, got 1000"),
        (["--backends", "cuda"], "invalid choice"),
    ],
)
def test_wrong_use(bench, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_results_are_named_by_machine_and_kind(bench):
    header = {"device": "AMD EPYC 9B45", "dtype": "bfloat16", "pattern": "radial", "backward": True}
    assert bench.default_path(header).name == "attention-amd-epyc-9b45-bfloat16-radial-backward.json"
