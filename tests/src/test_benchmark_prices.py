"""The benchmark of expectations: a row for each pattern, what was expected beside what was measured, in a file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from sparsereel_kernels import cpu

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "prices.py"


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(cpu.build_status().reason), reason=cpu.build_status().reason),
]


def test_a_small_run_is_written(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("bench_prices", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "GRIDS", ((4, 8, 8),))
    output = tmp_path / "prices.json"
    small = ["--heads", "1", "--head-dim", "16", "--dtype", "float32", "--repeat", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["prices.py", *small, "--output", str(output)])
    bench.main()
    result = json.loads(output.read_text())
    assert [row["pattern"] for row in result["rows"]] == [str(pattern) for pattern in bench.PATTERNS]
    for row in result["rows"]:
        assert row["cell_density"] <= row["density"]
        assert row["measured"] > 0 < row["over_sdpa"]
        assert row["expected"] > 0
    assert result["slowest"]["measured"] == max(row["measured"] for row in result["rows"])
    assert "slowest sparse call" in capsys.readouterr().out
