"""Tiles that published neighborhoods visit, beside the kernel speed-ups that NATTEN publishes for them.

python benchmarks/gna_tiles.py            # prints the table and writes docs/gna.md (seconds; nothing is timed)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from sparsereel.patterns.tile_count import TileCount, count_tiles

DOCS = Path(__file__).parents[1] / "docs" / "gna.md"


@dataclass(frozen=True)
class Problem:
    """A published problem: grid, window and stride in tokens, tiles of a kernel, and what was published for it."""

    name: str
    shape: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    kernel: str = "-"
    with_permutes: str = "-"

    def count(self) -> TileCount:
        return count_tiles(self.shape, self.window, self.stride, self.q_tile, self.kv_tile)


FLUX, HUNYUAN, WAN = (256, 256), (30, 48, 80), (21, 45, 80)
PROBLEMS = (
    Problem("FLUX 4K, Hopper", FLUX, (80, 80), (1, 1), (16, 8), (16, 8), "6.0x", "5.2x"),
    Problem("FLUX 4K, Hopper", FLUX, (80, 80), (16, 16), (16, 8), (16, 8), "12.3x", "9.2x"),
    Problem("FLUX 4K, Blackwell", FLUX, (80, 80), (1, 1), (16, 16), (16, 8), "5.0x", "4.0x"),
    Problem("FLUX 4K, Blackwell", FLUX, (80, 80), (16, 16), (16, 16), (16, 8), "10.5x", "6.8x"),
    Problem("HunyuanVideo, Hopper", HUNYUAN, (18, 24, 24), (1, 1, 1), (2, 8, 8), (2, 8, 8), "3.6x", "3.4x"),
    Problem("HunyuanVideo, Hopper", HUNYUAN, (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), "12.1x", "9.7x"),
    Problem("HunyuanVideo, Blackwell", HUNYUAN, (18, 24, 24), (1, 1, 1), (4, 8, 8), (2, 8, 8), "3.2x", "2.9x"),
    Problem("HunyuanVideo, Blackwell", HUNYUAN, (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), "10.4x", "7.3x"),
    Problem("Wan 720p, 81 frames", WAN, (9, 27, 48), (1, 1, 1), (3, 9, 16), (3, 9, 16)),
    Problem("Wan 720p, 81 frames", WAN, (9, 27, 48), (3, 9, 16), (3, 9, 16), (3, 9, 16)),
    Problem("Wan 720p, 81 frames", WAN, (10, 24, 24), (2, 8, 8), (2, 8, 8), (2, 8, 8)),
)
INTRODUCTION = """# Tiles of neighborhoods

A kernel visits whole tiles, so the speed-up of a neighborhood is not what its FLOPs say. `count_tiles` in
`sparsereel.patterns.tile_count` counts the tiles that a window visits, axis by axis. This table counts the problems
that NATTEN publishes kernel times for (its profiler page; H100, or B200 where it says Blackwell) and sets both side
by side. The published figures are NATTEN's, nothing was timed here; several are over the bound, since they compare
with cuDNN's dense kernel, which is another one. Made by `python benchmarks/gna_tiles.py`.

What follows from it: with stride 1 half of the saving is lost to tiles that a window cuts; a stride that is a
multiple of the tile, a window of whole tiles and a grid that they divide lose nothing, and only then no tile needs a
mask.

| problem | grid | window | stride | tiles of q, k | by FLOPs | by tiles | none partial | NATTEN | with permutes |
|---|---|---|---|---|---:|---:|---|---:|---:|
"""


def line(problem: Problem) -> str:
    """One row of Markdown."""
    found = problem.count()
    sizes = (problem.shape, problem.window, problem.stride, problem.q_tile, problem.kv_tile)
    grid, window, stride, q, k = (" x ".join(map(str, size)) for size in sizes)
    figures = f"{found.flop_bound:.2f}x | {found.tile_bound:.2f}x | {'yes' if found.fully_sparse else 'no'}"
    ends = f"{problem.kernel} | {problem.with_permutes}"
    return f"| {problem.name} | {grid} | {window} | {stride} | {q}, {k} | {figures} | {ends} |"


def main() -> int:
    """Exit code 0."""
    lines = [line(problem) for problem in PROBLEMS]
    print("\n".join(lines))
    DOCS.write_text(INTRODUCTION + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {DOCS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
