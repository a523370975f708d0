"""Pictures of patterns: who sees whom, token by token, and which blocks a kernel visits.

python -m sparsereel.patterns.radial -o radial.png
python -m sparsereel.patterns.sliding_tile --grid 6 8 8 --text 16 --block 16 16 --order tile
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsereel.grid import Permutation, TokenGrid
from sparsereel.patterns.base import Pattern

if TYPE_CHECKING:
    from sparsereel_kernels import BlockMask

# Rows of the token mask: more would be both slow and too fine to see.
LARGEST = 4096
EMPTY_COLOUR, PARTIAL_COLOUR, FULL_COLOUR = "#f4f1ea", "#f2b155", "#27567b"
TEXT_COLOUR, LINE_COLOUR = "#b5473c", "#8a8f98"


def main(pattern: Pattern, *, tile_order: bool = False, argv: Sequence[str] | None = None) -> None:
    """Command line of a pattern file: draw `pattern` on a grid.

    Args:
        pattern: With its example arguments.
        tile_order: Whether tile order is the default.
        argv: Arguments; None = those of the process.
    """
    options = _parser(pattern, tile_order).parse_args(argv)
    try:
        frames, height, width = options.grid
        grid = TokenGrid(frames, height, width, options.text)
        order = grid.tile_order(pattern.preferred_tile(grid) or (4, 8, 8)) if options.order == "tile" else None
        draw(pattern, grid, block=tuple(options.block), order=order).savefig(options.output, dpi=150)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{pattern} on {grid}: wrote {options.output}")


def _parser(pattern: Pattern, tile_order: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=f"Draw the pattern {pattern}.")
    sizes: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--grid", nargs=3, default=[10, 8, 8], help="frames height width, in tokens", **sizes)
    parser.add_argument("--text", default=0, help="text tokens after the video", **sizes)
    parser.add_argument("--block", nargs=2, default=[16, 16], help="query and key tokens of a block", **sizes)
    parser.add_argument("--order", choices=["grid", "tile"], default="tile" if tile_order else "grid")
    parser.add_argument("-o", "--output", type=Path, default=Path(f"{pattern.name}.png"))
    return parser


def draw(
    pattern: Pattern, grid: TokenGrid, *, block: tuple[int, int] = (16, 16), order: Permutation | None = None
) -> Any:
    """A matplotlib figure: on the left the token mask, on the right the blocks.

    Args:
        block: (query, key) tokens of a block.
        order: Order of the tokens on both axes; None = grid order.

    Raises:
        ValueError: a grid of more than 4096 tokens.
    """
    from matplotlib.figure import Figure

    if grid.seq_len > LARGEST:
        raise ValueError(f"a picture holds at most {LARGEST} tokens, the grid has {grid.seq_len}")
    tokens = pattern.token_mask(grid)
    tokens = tokens if order is None else tokens[order.indices][:, order.indices]
    mask = pattern.block_mask(grid, block, order=order)
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_tokens(left, tokens)
    _draw_blocks(right, mask)
    for axes in (left, right):
        _mark_frames(axes, grid, order)
    figure.suptitle(f"{pattern}\n{grid}, {'grid' if order is None else 'tile'} order", fontsize=11)
    return figure


def _draw_tokens(axes: Any, tokens: Tensor) -> None:
    from matplotlib.colors import ListedColormap

    size = tokens.shape[0]
    axes.imshow(tokens, cmap=ListedColormap([EMPTY_COLOUR, FULL_COLOUR]), vmin=0, vmax=1, extent=(0, size, size, 0))
    axes.set_title(f"tokens: {tokens.float().mean():.1%} of pairs allowed (blue)", fontsize=10)


def _draw_blocks(axes: Any, mask: BlockMask) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    block_map = mask.block_map()[0, 0]
    state = torch.where(block_map == -1, 0, torch.where(block_map == -2, 2, 1))
    rows, columns = (n * b for n, b in zip(state.shape, mask.BLOCK_SIZE, strict=True))
    colours = [EMPTY_COLOUR, PARTIAL_COLOUR, FULL_COLOUR]
    axes.imshow(state, cmap=ListedColormap(colours), vmin=0, vmax=2, extent=(0, columns, rows, 0), aspect="auto")
    axes.set_aspect("equal")
    axes.set_xlim(0, mask.seq_lengths[1])
    axes.set_ylim(mask.seq_lengths[0], 0)
    block = " x ".join(map(str, mask.BLOCK_SIZE))
    shares = f"density {mask.density:.1%}, token density {mask.token_density:.1%}"
    axes.set_title(f"blocks of {block}: {shares}", fontsize=10)
    counts = [int((state == n).sum()) for n in range(3)]
    names = [f"{name} ({count})" for name, count in zip(("empty", "partial", "full"), counts, strict=True)]
    handles = [Patch(facecolor=c, edgecolor=LINE_COLOUR, label=n) for c, n in zip(colours, names, strict=True)]
    axes.figure.legend(handles=handles, loc="outside lower center", ncol=3, fontsize=9, frameon=False)


def _mark_frames(axes: Any, grid: TokenGrid, order: Permutation | None) -> None:
    """Lines between frames (in grid order) and around the video; axis labels."""
    start, stop = grid.video_start, grid.video_start + grid.video_len
    if order is None:
        for edge in range(start + grid.frame_len, stop, grid.frame_len):
            axes.axhline(edge, color=LINE_COLOUR, linewidth=0.5)
            axes.axvline(edge, color=LINE_COLOUR, linewidth=0.5)
    for edge in (start, stop):
        if 0 < edge < grid.seq_len:
            axes.axhline(edge, color=TEXT_COLOUR, linewidth=1.2)
            axes.axvline(edge, color=TEXT_COLOUR, linewidth=1.2)
    lines = "lines: frames" if order is None else "tokens of a tile side by side"
    axes.set_xlabel(f"keys ({lines}{', red: text' if grid.seq_len > grid.video_len else ''})", fontsize=9)
    axes.set_ylabel("queries", fontsize=9)
    axes.tick_params(labelsize=8)
