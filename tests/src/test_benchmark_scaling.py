"""The scaling benchmark: writes its table, its JSON with a fitted exponent for every line, and a plot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import imageio.v3 as iio
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


def test_a_small_run_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("bench_scaling", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    small = ["--largest", "8464", "--heads", "1", "--head-dim", "16", "--dtype", "float32", "--repeat", "1"]
    bench.main([*small, "--threads", "1", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert [(row["by"], row["tokens"]) for row in result["rows"][::3]] == [
        ("frames", 4096),
        ("frames", 8192),
        ("frame size", 4096),
        ("frame size", 8464),
    ]
    assert len(result["exponents"]) == 6
    for row in result["rows"]:
        assert row["token_density"] <= row["cell_density"] <= row["density"]
    assert iio.imread(tmp_path / "scaling.png").std() > 10
    assert "exponent of" in capsys.readouterr().out
