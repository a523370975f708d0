"""What decay of far logits (UltraViCo) adds to the time of a sparse attention call.

    python benchmarks/decay.py                               # fp32, D = 32, 64 and 128, by frames and by tokens
    python benchmarks/decay.py --grid 33x16x16 --head-dim 64 --dtype bfloat16

The clip is `--ratio` times as long as trained. Each mask runs without and with the decay in alternation; the medians of
the runs and of their ratios are printed, and written as JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sparsereel import patterns
from sparsereel.extend.ultravico import UltraViCo
from sparsereel.files import write_json
from sparsereel.generation import machine
from sparsereel.grid import TokenGrid
from sparsereel_kernels import sparse_attention
from sparsereel_kernels.testing import make_qkv

RESULTS = Path(__file__).with_name("results")
BLOCK = (64, 64)


def measure(grid: TokenGrid, trained: int, head_dim: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each mask and each way to count distance."""
    dtype = getattr(torch, options.dtype)
    q, k, v = make_qkv(grid.seq_len, grid.seq_len, heads=options.heads, head_dim=head_dim, dtype=dtype)
    subjects = {
        "radial": patterns.Radial(),
        "neighborhood": patterns.Neighborhood((trained, grid.height, grid.width)),
        "dense": None,
    }
    rows = []
    for name, pattern in subjects.items():
        mask = None if pattern is None else pattern.block_mask(grid, BLOCK)
        for by in ("frames", "tokens"):
            decay = UltraViCo(by=by).modifier(grid, trained, None, torch.device("cpu"))
            seconds: dict[str, list[float]] = {"without": [], "with": []}
            for turn in range(options.repeat + 1):
                for which, modifier in (("without", None), ("with", decay)):
                    begin = time.perf_counter()
                    sparse_attention(q, k, v, mask, modifier=modifier, backend="cpu")
                    # The first turn pays for memory.
                    seconds[which] += [time.perf_counter() - begin] if turn else []
            ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
            row = {
                "head_dim": head_dim,
                "mask": name,
                "density": 1.0 if mask is None else mask.density,
                "distance": by,
                **{f"{which}_ms": 1e3 * statistics.median(values) for which, values in seconds.items()},
                "added": statistics.median(ratios) - 1,
            }
            rows.append(row)
            print(
                f"{head_dim:4}  {name:13}{row['density']:8.3f}  {by:9}{row['without_ms']:9.1f}{row['with_ms']:9.1f}"
                f"{row['added']:9.1%}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="33x16x16", help="frames x rows x columns of tokens")
    parser.add_argument("--ratio", type=float, default=4.0, help="length of the clip over the trained length")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeat", type=int, default=7, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="default benchmarks/results/decay-DTYPE.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid = TokenGrid(*(int(part) for part in options.grid.split("x")))
    trained = max(1, round(grid.frames / options.ratio))
    print(f"{grid.seq_len} tokens, trained {trained} of {grid.frames} frames, {options.dtype}, {options.heads} heads;")
    print(f"{options.threads} threads of {machine()}")
    print(f"{'D':>4}  {'mask':13}{'density':>8}  {'distance':9}{'ms':>9}{'decay':>9}{'added':>9}")
    rows = [row for head_dim in options.head_dim for row in measure(grid, trained, head_dim, options)]
    settings = {name: getattr(options, name) for name in ("grid", "ratio", "heads", "dtype", "repeat", "threads")}
    output = options.output or RESULTS / f"decay-{options.dtype}.json"
    write_json(output, {**settings, "machine": machine(), "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
