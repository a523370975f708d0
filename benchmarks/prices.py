"""What calls are expected to cost beside what they take, and sparse calls beside dense ones, on the CPU kernel.

    python benchmarks/prices.py                              # fp32 and bf16, 1,296 to 24,960 tokens, head_dim 64

For windows, radial, spatial and temporal heads, in the order of tokens that `sparsify` gives them: the share of a dense
call that the table of `sparsereel bench cost` expects (or, without one, the share that is taken then), the share
measured, and the time over that of SDPA. Calls take turns; medians. The last lines say how far expectations were off
and which sparse call was the slowest beside each dense one: `max_density` leaves out what does not pay. Writes
benchmarks/results/prices.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu_runs import facts_of, options_of, where

from sparsereel.files import write_json
from sparsereel.grid import TokenGrid
from sparsereel.patterns import Neighborhood, Pattern, Radial, Spatial, Temporal
from sparsereel.timing import alternate
from sparsereel.token_order import best_mask
from sparsereel_kernels import cost, sparse_attention
from sparsereel_kernels.testing import make_qkv

RESULT = Path(__file__).parent / "results" / "prices.json"
GRIDS = ((9, 12, 12), (16, 12, 12), (33, 16, 16), (16, 30, 52))
PATTERNS: tuple[Pattern, ...] = (
    Neighborhood(window=(3, 9, 9)),
    Neighborhood(window=(0.6, 0.6, 0.6)),
    Neighborhood(window=(0.8, 0.8, 0.8)),
    Neighborhood(window=(0.9, 0.9, 0.9)),
    Radial(),
    Radial(decay=0.2),
    Spatial(1),
    Temporal(width=0.1),
)

NUMBERS = ("density", "cell_density", "expected", "measured", "over_sdpa")

Row = dict[str, Any]


@torch.inference_mode()
def measure(grid: TokenGrid, dtype: torch.dtype, options: argparse.Namespace) -> list[Row]:
    """One row for each pattern."""
    q, k, v = make_qkv(grid.seq_len, heads=options.heads, head_dim=options.head_dim, dtype=dtype)
    masks = {pattern: best_mask(pattern, grid, "cpu") for pattern in PATTERNS}
    calls: dict[str, Callable[[], object]] = {
        "sdpa": partial(F.scaled_dot_product_attention, q, k, v),
        "dense": partial(sparse_attention, q, k, v, None, backend="cpu"),
    }
    for pattern, mask in masks.items():
        calls[str(pattern)] = partial(sparse_attention, q, k, v, mask, backend="cpu")
    seconds = {name: statistics.median(taken) for name, taken in alternate(calls, options.repeat, q).items()}
    rows = []
    for pattern, mask in masks.items():
        row: Row = {
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": grid.seq_len,
            "pattern": str(pattern),
            "density": 1.0 if mask is None else mask.density,
            "cell_density": 1.0 if mask is None else mask.cell_density,
            "expected": cost.expected_share(mask, "cpu", dtype=dtype, head_dim=options.head_dim),
            "measured": seconds[str(pattern)] / seconds["dense"],
            "over_sdpa": seconds[str(pattern)] / seconds["sdpa"],
        }
        rows.append(row)
        numbers = "".join(f"{row[name]:>10.3f}" for name in NUMBERS)
        print(f"{row['dtype']:<9}{row['tokens']:>7}  {row['pattern']:<38}{numbers}", flush=True)
    return rows


def main() -> None:
    options = options_of(__doc__, 4, RESULT)
    facts = facts_of(options)
    found = cost.find("cpu", getattr(torch, options.dtype[0]), options.head_dim, "cpu")
    print(f"{where(facts)}; cost table: {'yes' if found else 'none'}")
    heads = "".join(f"{name:>10}" for name in ("blocks", "cells", "expected", "measured", "of SDPA"))
    print(f"{'dtype':<9}{'tokens':>7}  {'pattern':<38}{heads}")
    rows: list[Row] = []
    for dtype in options.dtype:
        for shape in GRIDS:
            rows += measure(TokenGrid(*shape), getattr(torch, dtype), options)
    off = sorted(abs(row["expected"] / row["measured"] - 1) for row in rows)
    slowest = {name: max(row[name] for row in rows) for name in ("measured", "over_sdpa")}
    print(f"expected off by {off[len(off) // 2]:.1%} (median), {off[int(0.9 * len(off))]:.1%} (nine of ten)")
    print(f"slowest sparse call: {slowest['measured']:.3f} of dense on this kernel, {slowest['over_sdpa']:.3f} of SDPA")
    write_json(
        options.output,
        {**facts, "cost_table": found is not None, "off_median": off[len(off) // 2], "slowest": slowest, "rows": rows},
    )
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
