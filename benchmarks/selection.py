"""How long selectors take beside the sparse attention that they serve, in one run on one machine.

    python benchmarks/selection.py                                  # every selector at 8,192 and 32,768 tokens
    python benchmarks/selection.py --tokens 8192 --only block_topk hip
    python benchmarks/selection.py --json -                         # JSON to standard output, no table

Inputs have structure: scores fall off with distance in time and place, at rates that differ by head. Settings bring
each method near a tenth of the blocks. Three things are timed in turns, best of each: choosing (`refreshing` with
everything new), attending to what was chosen (native kernel), and attending to a tenth of the blocks, the same for
all methods. `ratio` is choosing / attending in seconds on the wall. `cpu` is the same in seconds of processor time,
which depends less on what else runs on the machine (with one thread: with more, waiting threads count too); `at 0.1` is
choosing / attending to a tenth, in processor time too, and `every 4` what is left of it where scores are computed every
fourth step. Methods that remember (svg2, adaspa) are timed at their second call; `first` is what the first takes.
`move` is the time to put q, k, v and the output in order.

Sample output:

    1 threads of AMD EPYC, torch 2.14.1; [1, 4, tokens, 64] bfloat16, blocks of 128 x 64
    selector          tokens  density  select ms  attend ms   ratio     cpu   at 0.1  every 4  first ms  move ms
    block_topk        32,768    0.102       24.0     1513.7   0.016   0.020    0.020    0.005      47.9      0.0
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsereel import TokenGrid
from sparsereel.selectors import BlockTopk, SelectionContext, Selector, make, names, refreshing
from sparsereel_kernels import sparse_attention, speed_table

RESULTS = Path(__file__).parent / "results"
GRIDS = {8192: (8, 32, 32), 32768: (8, 64, 64)}
BLOCK = (128, 64)
SHARPNESS = 1.6
# What brings each method near a tenth of the blocks on these inputs.
SETTINGS: dict[str, dict[str, Any]] = {
    "block_topk": {"density": 0.1},
    "block_topp": {"threshold": 0.4},
    "spargeattn": {"density": 0.1},
    "xattention": {"threshold": 0.55},
    "vertical_slash": {"vertical": 0.05, "slash": 0.02},
    "svg": {"density": 0.06},
    "svg2": {"threshold": 0.7, "min_density": 0.0},
    "vsa": {"density": 0.07},
    "sparsed": {"density": 0.1},
    "adaspa": {"density": 0.1},
    "hip": {"density": 0.08, "window": 128},
    "biformer": {"density": 0.1},
    "anchor": {"theta": 2.0, "group": 4},
    "dhsa": {"density": 0.1},
}
COLUMNS = "selector          tokens  density  select ms  attend ms   ratio     cpu   at 0.1  every 4  first ms  move ms"
# Seconds of a first call from which on one turn is timed.
LONG = 4.0
Row = dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; argparse exits with 2 on wrong use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--only", nargs="+", choices=names(), default=list(names()), help="selectors (default all)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5, help="timed turns of each side (default 5)")
    parser.add_argument("--json", default=None, help="path, or - for standard output; default benchmarks/results/")
    args = parser.parse_args(arguments)
    if args.heads < 1 or args.head_dim < 8 or args.threads < 1 or args.repeat < 1:
        parser.error("--heads, --threads and --repeat must be at least 1, --head-dim at least 8")
    return args


def structured_qkv(grid: TokenGrid, heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 q, k, v [1, H, S, D] whose scores fall off with distance in time and place, at a rate of each head."""
    generator = torch.Generator().manual_seed(0)
    t, h, w = (axis.float() for axis in grid.coordinates())
    position = torch.stack([t, h, w], -1)
    rates = 0.05 + 0.4 * torch.rand(heads, 3, head_dim // 2, generator=generator)
    angles = position @ (rates * torch.randn(heads, 3, head_dim // 2, generator=generator))
    waves = torch.cat([angles.cos(), angles.sin()], -1)[None]
    noise = [torch.randn(waves.shape, generator=generator) for _ in range(3)]
    q, k = (SHARPNESS * waves + 0.5 * noise[i] for i in range(2))
    return q, k, noise[2]


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """(wall, processor) seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def best(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """Least wall and least processor seconds."""
    walls, processors = zip(*samples, strict=True)
    return min(walls), min(processors)


@torch.no_grad()
def measure(selector: Selector, grid: TokenGrid, args: argparse.Namespace) -> Row:
    """All sides of one selector, in turns."""
    q, k, v = (x.to(getattr(torch, args.dtype)) for x in structured_qkv(grid, args.heads, args.head_dim))
    context = SelectionContext(grid, BLOCK, steps=args.repeat + 2)
    tenth = BlockTopk(0.1)(q, k, context).mask
    first, _ = timed(lambda: refreshing(selector, q, k, context))
    second = replace(context, step=1)
    again = timed(lambda: refreshing(selector, q, k, second))
    selection = second.memory(selector, q, k).selection
    assert selection is not None
    arranged = selection.arrange(q, k, v)
    sparse_attention(*arranged, selection.mask)
    sparse_attention(q, k, v, tenth)
    # Methods that take so long are timed once.
    choose, attend, common = [again] if first > LONG else [], [], []
    for turn in range(args.repeat):
        later = replace(context, step=turn + 2)
        if first <= LONG:
            choose.append(timed(lambda later=later: refreshing(selector, q, k, later)))
        attend.append(timed(lambda: sparse_attention(*arranged, selection.mask)))
        common.append(timed(lambda: sparse_attention(q, k, v, tenth)))
    select, attention, at_tenth = best(choose), best(attend), best(common)
    move, _ = timed(lambda: selection.restore(selection.arrange(q, k, v)[0]))
    return {
        "selector": selector.name,
        "arguments": selector.to_mapping(),
        "tokens": grid.seq_len,
        "density": round(selection.mask.density, 4),
        "select_seconds": select[0],
        "attention_seconds": attention[0],
        "ratio": select[0] / attention[0],
        "select_cpu_seconds": select[1],
        "attention_cpu_seconds": attention[1],
        "cpu_ratio": select[1] / attention[1],
        "attention_cpu_seconds_at_tenth": at_tenth[1],
        "cpu_ratio_at_tenth": select[1] / at_tenth[1],
        "first_select_seconds": first,
        "move_seconds": move if selection.order_q is not None else 0.0,
        "formula_flops": selector.cost(grid, BLOCK, args.heads, args.head_dim),
        "turns": len(choose),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def describe(args: argparse.Namespace) -> Row:
    """Machine and problem."""
    return {
        "device": speed_table.device_name("cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": [1, args.heads, "tokens", args.head_dim],
        "dtype": args.dtype,
        "block": list(BLOCK),
        "repeat": args.repeat,
    }


def show(row: Row) -> None:
    """One line of the table."""
    print(
        f"{row['selector']:<16} {row['tokens']:>7,} {row['density']:>8.3f} {row['select_seconds'] * 1e3:>10.1f} "
        f"{row['attention_seconds'] * 1e3:>10.1f} {row['ratio']:>7.3f} {row['cpu_ratio']:>7.3f} "
        f"{row['cpu_ratio_at_tenth']:>8.3f} {row['cpu_ratio_at_tenth'] / 4:>8.3f} "
        f"{row['first_select_seconds'] * 1e3:>9.1f} {row['move_seconds'] * 1e3:>8.1f}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 130 when interrupted."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    header, rows = describe(args), []
    quiet = args.json == "-"
    if not quiet:
        shape = f"[1, {args.heads}, tokens, {args.head_dim}] {args.dtype}, blocks of {BLOCK[0]} x {BLOCK[1]}"
        print(f"{header['threads']} threads of {header['device']}, torch {header['torch']}; {shape}")
        print(COLUMNS)
    try:
        for tokens in args.tokens:
            for name in args.only:
                # Every turn computes anew, whatever the method's own policy: that is what is timed.
                selector = make(name, **{**SETTINGS[name], "refresh": 1})
                rows.append(measure(selector, TokenGrid(*GRIDS[tokens]), args))
                if not quiet:
                    show(rows[-1])
    except KeyboardInterrupt:
        return 130
    text = json.dumps({**header, "rows": rows}, indent=1) + "\n"
    if quiet:
        print(text, end="")
        return 0
    path = Path(args.json) if args.json else RESULTS / "selection.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
