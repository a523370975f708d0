"""What the order of tokens is worth to the CPU kernel: blocks, cells and milliseconds of patterns in every order.

    python benchmarks/orders.py                                     # windows and radial, three grids, fp32 and bf16
    python benchmarks/orders.py --dtype float32 --heads 8

The kernel works in cells of at most 12 queries x 16 keys, so its time should follow the share of live cells and not
that of blocks. Orders take turns; medians. "chosen" is what `sparsify` takes. Writes benchmarks/results/orders.json.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_runs import facts_of, options_of, where

from sparsereel.files import write_json
from sparsereel.grid import TokenGrid
from sparsereel.patterns import Neighborhood, Pattern, Radial
from sparsereel.timing import alternate
from sparsereel.token_order import best_tile, candidate_tiles, mask_in_order
from sparsereel_kernels import sparse_attention
from sparsereel_kernels.testing import make_qkv

RESULT = Path(__file__).parent / "results" / "orders.json"
GRIDS = ((8, 32, 32), (33, 16, 16), (16, 45, 45))
PATTERNS: tuple[Pattern, ...] = (Neighborhood(window=(3, 9, 9)), Neighborhood(window=(5, 11, 11)), Radial())

Row = dict[str, Any]


@torch.inference_mode()
def measure(grid: TokenGrid, pattern: Pattern, dtype: torch.dtype, options: argparse.Namespace) -> list[Row]:
    """One row for each order."""
    q, k, v = make_qkv(grid.seq_len, heads=options.heads, head_dim=options.head_dim, dtype=dtype)
    orders = [None, *candidate_tiles([pattern], grid, "cpu")]
    masks = {tile: mask_in_order((pattern,), grid, tile) for tile in orders}
    calls = {str(tile): partial(sparse_attention, q, k, v, mask, backend="cpu") for tile, mask in masks.items()}
    taken = alternate(calls, options.repeat, q)
    chosen, rows = best_tile({pattern: 1}, grid, kernel="cpu"), []
    for tile, mask in masks.items():
        row: Row = {
            "dtype": str(dtype).removeprefix("torch."),
            "grid": list(grid.shape),
            "pattern": str(pattern),
            "tile": tile,
            "density": 1.0 if mask is None else mask.density,
            "cell_density": 1.0 if mask is None else mask.cell_density,
            "ms": 1e3 * statistics.median(taken[str(tile)]),
            "chosen": tile == chosen,
        }
        rows.append(row)
        order = "the model's own" if tile is None else "tiles of " + " x ".join(map(str, tile))
        print(
            f"{row['dtype']:<9}{'x'.join(map(str, grid.shape)):<10}{row['pattern']:<34}{order:<20}"
            f"{row['density']:>7.3f}{row['cell_density']:>7.3f}{row['ms']:>9.1f}{'  chosen' if row['chosen'] else ''}",
            flush=True,
        )
    return rows


def main() -> None:
    options = options_of(__doc__, 2, RESULT)
    facts = facts_of(options)
    print(f"{options.heads} heads of {options.head_dim}; {where(facts)}")
    print(f"{'dtype':<9}{'grid':<10}{'pattern':<34}{'order':<20}{'blocks':>7}{'cells':>7}{'ms':>9}")
    rows: list[Row] = []
    for dtype in options.dtype:
        for shape in GRIDS:
            for pattern in PATTERNS:
                rows += measure(TokenGrid(*shape), pattern, getattr(torch, dtype), options)
    write_json(options.output, {**facts, "rows": rows})
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
