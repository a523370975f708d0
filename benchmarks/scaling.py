"""Seconds of attention against tokens: dense, radial and neighborhood, by frames and by frame size.

    python benchmarks/scaling.py                    # 4k to 64k tokens, bf16, 2 heads of 64
    python benchmarks/scaling.py --largest 16384 --repeat 1

For each way to grow, the exponent of time and the exponent of visited blocks are fitted on a log-log scale: a kernel
that wastes nothing has equal exponents. Writes benchmarks/results/scaling.json and scaling.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sparsereel.files import write_json
from sparsereel.generation import environment
from sparsereel.grid import TokenGrid
from sparsereel.kernel_choice import kernel_for
from sparsereel.patterns import Neighborhood, Pattern, Radial
from sparsereel.timing import alternate
from sparsereel.token_order import best_mask
from sparsereel_kernels import BlockMask, sparse_attention

RESULTS = Path(__file__).parent / "results"
# Grids with 4,096 to 65,536 tokens; the other axes stay as they are.
BY_FRAMES = [(frames, 32, 32) for frames in (4, 8, 16, 32, 64)]
BY_SIZE = [(16, side, side) for side in (16, 23, 32, 45, 64)]
# The window is smaller than every grid on every axis, so the work a query does is the same everywhere.
PATTERNS: dict[str, Pattern] = {"radial": Radial(decay=0.2), "neighborhood": Neighborhood(window=(3, 9, 9))}
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print one table, write JSON and a plot."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for way, grids in (("frames", BY_FRAMES), ("frame size", BY_SIZE)):
        for shape in grids:
            grid = TokenGrid(*shape)
            if grid.seq_len <= options.largest:
                rows += [{"by": way, **row} for row in _grid(grid, options)]
                print(_line(rows[-len(PATTERNS) - 1 :]), file=sys.stderr)
    fits = _fits(rows)
    _print(rows, fits)
    given = {name: value for name, value in vars(options).items() if name != "output"}
    result = {"environment": environment(), "options": given, "rows": rows, "exponents": fits}
    write_json(options.output / "scaling.json", result)
    _plot(rows, options.output / "scaling.png")
    print(json.dumps({"wrote": [str(options.output / "scaling.json"), str(options.output / "scaling.png")]}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contender; the median counts")
    parser.add_argument("--largest", type=int, default=65_536, help="leave out longer sequences")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


@torch.inference_mode()
def _grid(grid: TokenGrid, options: argparse.Namespace) -> list[Row]:
    shape = (1, options.heads, grid.seq_len, options.head_dim)
    q, k, v = (torch.randn(shape, dtype=getattr(torch, options.dtype)) for _ in range(3))
    contenders: dict[str, Callable[[], object]] = {"dense SDPA": lambda: F.scaled_dot_product_attention(q, k, v)}
    masks: dict[str, BlockMask] = {}
    for name, pattern in PATTERNS.items():
        found = best_mask(pattern, grid, kernel_for("auto", "cpu", q.dtype, grid.seq_len))
        assert found is not None
        masks[name] = found
        contenders[name] = lambda mask=masks[name]: sparse_attention(q, k, v, mask)  # type: ignore[misc]
    seconds = {name: statistics.median(taken) for name, taken in alternate(contenders, options.repeat, q).items()}
    rows = []
    for name in contenders:
        mask = masks.get(name)
        full = mask is None
        density, cells, allowed = (1.0,) * 3 if full else (mask.density, mask.cell_density, mask.token_density)
        rows.append(
            {
                "grid": [grid.segments[0].frames, grid.segments[0].height, grid.segments[0].width],
                "tokens": grid.seq_len,
                "method": name,
                "seconds": seconds[name],
                "density": density,
                "cell_density": cells,
                "token_density": allowed,
                "mask_bytes": 0 if mask is None else mask.nbytes,
            }
        )
    return rows


def _fits(rows: list[Row]) -> list[Row]:
    """Exponents of time, of visited blocks, of cells done and of allowed pairs for each method and way to grow."""
    fits = []
    for way in dict.fromkeys(row["by"] for row in rows):
        for name in dict.fromkeys(row["method"] for row in rows):
            chosen = [row for row in rows if row["by"] == way and row["method"] == name]
            if len(chosen) < 2:
                continue
            quantities = {
                "time": [row["seconds"] for row in chosen],
                "visited": [row["density"] * row["tokens"] ** 2 for row in chosen],
                "cells": [row["cell_density"] * row["tokens"] ** 2 for row in chosen],
                "allowed": [row["token_density"] * row["tokens"] ** 2 for row in chosen],
            }
            tokens = [row["tokens"] for row in chosen]
            exponents = {key: _slope(tokens, values) for key, values in quantities.items()}
            fits.append({"by": way, "method": name, **exponents})
    return fits


def _slope(x: list[float], y: list[float]) -> float:
    xs, ys = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(xs, ys, strict=True))
    return top / sum((a - mean_x) ** 2 for a in xs)


def _line(rows: list[Row]) -> str:
    parts = [f"{row['method']} {1000 * row['seconds']:.0f} ms" for row in rows]
    return f"{rows[0]['by']}: {rows[0]['tokens']} tokens, " + ", ".join(parts)


def _print(rows: list[Row], fits: list[Row]) -> None:
    print(f"{'by':<11}{'tokens':>8}  {'method':<13}{'ms':>9}{'density':>9}{'cells':>8}{'tokens':>8}{'speed-up':>10}")
    dense = {(row["by"], row["tokens"]): row["seconds"] for row in rows if row["method"] == "dense SDPA"}
    for row in rows:
        ratio = dense[row["by"], row["tokens"]] / row["seconds"]
        print(
            f"{row['by']:<11}{row['tokens']:>8}  {row['method']:<13}{1000 * row['seconds']:>9.1f}"
            f"{row['density']:>9.3f}{row['cell_density']:>8.3f}{row['token_density']:>8.3f}"
            f"{ratio:>9.2f}x"
        )
    print(f"\nexponent of{'':<18}time  visited blocks  cells done  allowed pairs")
    for fit in fits:
        name = f"{fit['method']} by {fit['by']}"
        print(f"{name:<28}{fit['time']:>5.2f}{fit['visited']:>16.2f}{fit['cells']:>12.2f}{fit['allowed']:>15.2f}")


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axes, way in zip(panels, ("frames", "frame size"), strict=True):
        for name in dict.fromkeys(row["method"] for row in rows):
            chosen = [row for row in rows if row["by"] == way and row["method"] == name]
            axes.loglog([r["tokens"] for r in chosen], [r["seconds"] for r in chosen], marker="o", label=name)
        ticks = [4096 * 2**n for n in range(5)]
        axes.set(xlabel="tokens", title=f"longer by {way}", xticks=ticks, xticklabels=[f"{t // 1024}k" for t in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("seconds a call")
    panels[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
