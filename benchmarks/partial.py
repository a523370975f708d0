"""What partial blocks, odd lengths, padded keys and a key bias add to a sparse attention call of the CPU kernel.

    python benchmarks/partial.py                             # fp32, 8,192 tokens, D = 64 and 128, forward
    python benchmarks/partial.py --backward --head-dim 64

The same random blocks are visited every time: all of them full, or with half of the pairs in so many of them hidden.
Each variant runs in alternation with full blocks; medians of the runs and of their ratios, for the same number of
visited pairs of blocks, are printed and written as JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsereel.files import write_json
from sparsereel.generation import machine
from sparsereel_kernels import KeyBias, sparse_attention
from sparsereel_kernels.testing import make_qkv, random_block_mask

RESULTS = Path(__file__).with_name("results")
ODD = 37

Variant = Callable[[], object]


def variants(tokens: int, head_dim: int, options: argparse.Namespace) -> dict[str, tuple[Variant, float]]:
    """A call for every variant, and how many pairs of blocks it visits."""
    dtype, heads = getattr(torch, options.dtype), options.heads
    lengths = torch.tensor([tokens - ODD], dtype=torch.int32)

    def call(tokens: int = tokens, partial: float = 0.0, **given: Any) -> tuple[Variant, float]:
        tensors = make_qkv(tokens, heads=heads, head_dim=head_dim, dtype=dtype)
        mask = random_block_mask(tokens, density=options.density, partial_share=partial)
        visited = float(mask.density) * tokens**2
        if not options.backward:
            return lambda: sparse_attention(*tensors, mask, backend="cpu", **given), visited
        leaves = [x.requires_grad_() for x in tensors]
        grad = torch.randn_like(tensors[0])
        return lambda: torch.autograd.grad(
            sparse_attention(*leaves, mask, backend="cpu", **given), leaves, grad
        ), visited

    return {
        "full": call(),
        "a fifth partial": call(partial=0.2),
        "all partial": call(partial=1.0),
        f"{tokens - ODD:,} tokens": call(tokens - ODD),
        "padded keys": call(key_lengths=lengths),
        "key bias": call(modifier=KeyBias(torch.randn(tokens))),
    }


def seconds(run: Variant) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(head_dim: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each variant."""
    runs = variants(options.tokens, head_dim, options)
    base, base_visits = runs["full"]
    rows = []
    for name, (run, visits) in runs.items():
        base(), run()  # the first turn pays for memory
        pairs = [(seconds(base), seconds(run)) for _ in range(options.repeat)]
        added = statistics.median(b / a for a, b in pairs) * base_visits / visits - 1
        row = {
            "head_dim": head_dim,
            "variant": name,
            "ms": 1e3 * statistics.median(b for _, b in pairs),
            "added": added,
        }
        rows.append(row)
        print(f"{head_dim:4}  {name:16}{row['ms']:9.1f}{added:9.1%}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--density", type=float, default=0.2, help="share of key blocks that a query block visits")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--repeat", type=int, default=9, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="default benchmarks/results/partial-DTYPE[-backward].json")
    options = parser.parse_args()
    if options.tokens <= ODD:
        parser.error(f"--tokens must be above {ODD}, got {options.tokens}")
    torch.set_num_threads(options.threads)
    which = "forward and backward" if options.backward else "forward"
    print(f"{options.tokens} tokens, {options.dtype}, {options.heads} heads, density {options.density}, {which};")
    print(f"{options.threads} threads of {machine()}")
    print(f"{'D':>4}  {'variant':16}{'ms':>9}{'added':>9}")
    rows = [row for head_dim in options.head_dim for row in measure(head_dim, options)]
    names = ("tokens", "heads", "density", "dtype", "backward", "repeat", "threads")
    output = options.output or RESULTS / f"partial-{options.dtype}{'-backward' * options.backward}.json"
    settings = {name: getattr(options, name) for name in names}
    write_json(output, {**settings, "machine": machine(), "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
