"""The benchmarks of expectations and of orders: rows of what was expected or tried beside what was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from sparsereel_kernels import cpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--heads", "1", "--head-dim", "16", "--dtype", "float32", "--repeat", "1", "--threads", "1"]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(cpu.build_status().reason), reason=cpu.build_status().reason),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a benchmark on one small grid: its module and what it wrote."""

    monkeypatch.syspath_prepend(BENCHMARKS)

    def run(name):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
        bench = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bench)
        monkeypatch.setattr(bench, "GRIDS", ((4, 8, 8),))
        output = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL, "--output", str(output)])
        bench.main()
        return bench, json.loads(output.read_text())

    return run


def test_prices_are_held_against_the_clock(run, capsys):
    bench, result = run("prices")
    assert [row["pattern"] for row in result["rows"]] == [str(pattern) for pattern in bench.PATTERNS]
    for row in result["rows"]:
        assert row["cell_density"] <= row["density"]
        assert row["measured"] > 0 < row["over_sdpa"]
        assert row["expected"] > 0
    assert result["slowest"]["measured"] == max(row["measured"] for row in result["rows"])
    assert "slowest sparse call" in capsys.readouterr().out


def test_every_order_has_a_row_and_one_is_chosen(run, capsys):
    bench, result = run("orders")
    for pattern in map(str, bench.PATTERNS):
        rows = [row for row in result["rows"] if row["pattern"] == pattern]
        assert [row["tile"] for row in rows] == [None, [4, 8, 8], [1, 4, 4], [2, 4, 2]]
        assert sum(row["chosen"] for row in rows) == 1
        assert all(row["ms"] > 0 and row["cell_density"] <= row["density"] for row in rows)
    assert "chosen" in capsys.readouterr().out
