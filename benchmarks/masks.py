"""How long block masks take to build, how much memory, and how radial masks grow.

    python benchmarks/masks.py                      # seconds and memory, up to 500k tokens
    python benchmarks/masks.py --frames 30 48 80    # one grid
    python benchmarks/masks.py --growth             # radial: pairs kept and blocks visited, by frames and by frame size

Sample output (2 threads):

    grid             order  pattern                     seconds  peak MB  mask MB  density  tokens  tiles
    30x48x80         grid   radial(decay=0.2)             0.091       85      3.2    0.228   0.196     14

`peak MB` is what the process took on top while building (Linux only), `mask MB` what the finished mask holds. Results
are also written as JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch

from sparsereel import patterns, presets
from sparsereel.grid import TokenGrid
from sparsereel.patterns import Pattern

RESULTS = Path(__file__).with_name("results")
GRIDS = ((9, 32, 32), (21, 30, 52), (21, 45, 80), (30, 48, 80), (65, 48, 80), (130, 48, 80))
BLOCK = (128, 64)


def subjects() -> dict[str, Pattern]:
    """What is built: the patterns of every preset, and the patterns that no preset uses."""
    found: dict[str, Pattern] = {}
    for name in presets.names():
        for pattern in presets.load(name).resolve("model", ["layer"], [2])[0].distinct():
            found[str(pattern)] = pattern
    others = (
        patterns.Radial(),
        patterns.Radial(0.8, flavour="released"),
        patterns.Neighborhood((5, 11, 11)),
        patterns.Causal(3),
        patterns.Diagonal(4000),
        patterns.MultiDiagonal(200),
        patterns.VerticalStripe((0, (0.5, 0.51))),
        patterns.Radial() & patterns.Causal(),
    )
    return found | {str(pattern): pattern for pattern in others}


def peak_bytes(*, reset: bool = False) -> int | None:
    """Peak memory of this process; None where Linux's /proc is missing."""
    try:
        if reset:
            # Memory that was freed but kept would hide what is taken next.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except (OSError, AttributeError):
        return None
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(pattern: Pattern, grid: TokenGrid, tile: bool, repeats: int) -> dict[str, Any]:
    """Best of `repeats` builds, and the peak of the first."""
    order = grid.tile_order() if tile else None
    before, best = peak_bytes(reset=True), math.inf
    for turn in range(repeats):
        begin = time.perf_counter()
        mask = pattern.block_mask(grid, BLOCK, order=order)
        best = min(best, time.perf_counter() - begin)
        if turn == 0:
            after = peak_bytes()
    return {
        "grid": "x".join(map(str, grid.shape)),
        "tokens": grid.seq_len,
        "order": "tile" if tile else "grid",
        "pattern": str(pattern),
        "seconds": round(best, 4),
        "peak_mb": None if before is None or after is None else round((after - before) / 2**20),
        "mask_mb": round(mask.nbytes / 2**20, 1),
        "density": round(mask.density, 4),
        "token_density": round(mask.token_density, 4),
        "tiles": mask.partial_bits.shape[0],
    }


def time_masks(grids: list[TokenGrid], repeats: int) -> list[dict[str, Any]]:
    """Measure every pattern on every grid in both orders, printing as it goes."""
    columns = f"{'grid':<16} {'order':<6} {'pattern':<42}"
    print(f"{columns} seconds  peak MB  mask MB  density  tokens  tiles")
    rows = []
    for grid in grids:
        for tile in (False, True):
            for name, pattern in subjects().items():
                row = measure(pattern, grid, tile, repeats)
                rows.append(row)
                peak = "-" if row["peak_mb"] is None else row["peak_mb"]
                print(
                    f"{row['grid']:<16} {row['order']:<6} {name[:42]:<42} {row['seconds']:>7.3f} {peak:>8} "
                    f"{row['mask_mb']:>8} {row['density']:>8.3f} {row['token_density']:>7.3f} {row['tiles']:>6}",
                    flush=True,
                )
    return rows


def growth(kind: str, grids: list[TokenGrid], pattern: Pattern) -> list[dict[str, Any]]:
    """Pairs kept and blocks visited of one pattern on growing grids, as a Markdown table.

    The exponents are those of the number of tokens between one row and the next: 1 is linear, 2 is dense attention.
    """
    print(f"\n| {kind} | tokens | pairs kept | exponent | pairs / (n log2 n) | blocks visited | exponent | density |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    rows: list[dict[str, Any]] = []
    for grid in grids:
        mask = pattern.block_mask(grid, BLOCK)
        n = grid.seq_len
        row: dict[str, Any] = {kind: grid.frames if kind == "frames" else grid.frame_len, "tokens": n}
        row["pairs"] = round(mask.token_density * n * n)
        row["blocks"] = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        row["density"] = mask.density
        for what in ("pairs", "blocks"):
            before = rows[-1] if rows else None
            row[f"{what}_exponent"] = (
                None if before is None else math.log(row[what] / before[what]) / math.log(n / before["tokens"])
            )
        rows.append(row)
        exponents = [_two_digits(row[f"{what}_exponent"]) for what in ("pairs", "blocks")]
        print(
            f"| {row[kind]:,} | {n:,} | {row['pairs']:.3g} | {exponents[0]} | {row['pairs'] / (n * math.log2(n)):.1f} "
            f"| {row['blocks']:,} | {exponents[1]} | {row['density']:.3f} |",
            flush=True,
        )
    return rows


def _two_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def grow() -> dict[str, Any]:
    """Radial by the number of frames, of two sizes, and by the size of a frame."""
    pattern = patterns.Radial()
    large = [TokenGrid(f, 48, 80) for f in (4, 8, 16, 32, 64, 128)]
    small = [TokenGrid(f, 16, 16) for f in (4, 8, 16, 32, 64, 128, 256, 512, 1024)]
    sizes = [TokenGrid(21, side, side) for side in (8, 16, 32, 64, 128)]
    return {
        "pattern": str(pattern),
        "by_frames_of_3840": growth("frames", large, pattern),
        "by_frames_of_256": growth("frames", small, pattern),
        "by_frame_size": growth("tokens a frame", sizes, pattern),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", nargs=3, type=int, metavar="N", help="one grid: frames height width, in tokens")
    parser.add_argument("--text", type=int, default=0, help="text tokens after the video")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--growth", action="store_true", help="how radial masks grow, instead of times")
    parser.add_argument("-o", "--output", type=Path, help="JSON file; default benchmarks/results/masks[_growth].json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = [tuple(options.frames)] if options.frames else GRIDS
    grids = [TokenGrid(f, h, w, options.text) for f, h, w in shapes]
    results: Any = grow() if options.growth else time_masks(grids, options.repeats)
    output = options.output or RESULTS / ("masks_growth.json" if options.growth else "masks.json")
    header = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "block": BLOCK}
    header |= {"threads": options.threads, "repeats": options.repeats}
    output.write_text(json.dumps({**header, "results": results}, indent=1) + "\n")
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
