"""Sparse attention against dense SDPA and compiled FlexAttention, in one run on one machine.

    python benchmarks/attention.py                                          # 16,384 tokens, bf16, four densities
    python benchmarks/attention.py --dtype float32 --head-dim 128 --density 0.2 0.05
    python benchmarks/attention.py --pattern radial --tokens 16384          # 16 frames of 32 x 32, in sparsify's order
    python benchmarks/attention.py --backward --backends torch cpu
    python benchmarks/attention.py --json -                                 # JSON to standard output, no table

Share of ideal = (seconds dense / seconds sparse) x density: 1.00 means that work skipped is time saved. The second
share counts only pairs that the mask allows, so that masks that waste half of their blocks do not look good.
Every figure is the median of runs that alternate between the contenders. Nothing is timed before every backend has
matched the fp64 definition on a small problem. Sample output (columns shortened):

    1 × 4 × 16384 × 64 bfloat16, random, forward; 2 threads of AMD EPYC, torch 2.14.1
    density  tokens  backend    ms  speed-up  share  share (tokens)  memory / (q+k+v)
      1.000   1.000  dense    1523     1.00×   1.00            1.00
      0.199   0.180  cpu        72    21.14×   4.21            3.80
      0.199   0.180  flex      692     2.20×   0.44            0.40
      0.199   0.180  torch     212     7.18×   1.43            1.29             1.01×
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sparsereel_kernels import BlockMask, cpu, dispatch, sparse_attention, speed_table
from sparsereel_kernels.memory import peak_extra_bytes
from sparsereel_kernels.run import Wants, problem_of
from sparsereel_kernels.testing import assert_matches_reference, make_qkv, random_block_mask

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GATE_TOKENS = 300
FRAME = 32
WINDOW = (5, 11, 11)
WIDTH = 110
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Row = dict[str, Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; argparse exits with 2 on wrong use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="sequence length (default 16384)")
    parser.add_argument("--heads", type=int, default=4, help="heads (default 4)")
    parser.add_argument("--head-dim", type=int, default=64, help="features of a head, 8 to 256 (default 64)")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05], help="shares of key blocks")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--pattern", choices=("random", "radial", "neighborhood"), default="random")
    parser.add_argument("--block", type=int, nargs=2, default=(128, 64), metavar=("Q", "KV"), help="tokens a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each contender (default 5)")
    names = [backend.name for backend in dispatch.BACKENDS if backend.name != "reference"]
    parser.add_argument("--backends", nargs="+", choices=names, default=names)
    parser.add_argument("--json", default=None, help="path, or - for standard output; default benchmarks/results/")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    if args.tokens < 1 or args.heads < 1 or args.repeat < 1 or args.threads < 1:
        parser.error("--tokens, --heads, --repeat and --threads must be at least 1")
    if not all(0 < density <= 1 for density in args.density):
        parser.error(f"--density must lie above 0 and up to 1, got {args.density}")
    if args.pattern != "random" and args.tokens % FRAME**2:
        parser.error(f"--pattern {args.pattern} needs --tokens in frames of {FRAME} x {FRAME}, got {args.tokens}")
    return args


# ---------------------------------------------------------------- what is run


def masks(args: argparse.Namespace) -> list[BlockMask]:
    """The masks to time, densest first."""
    block = (args.block[0], args.block[1])
    if args.pattern == "random":
        wanted = sorted(args.density, reverse=True)
        made = [random_block_mask(args.tokens, density=d, partial_share=0.2, block=block) for d in wanted]
        return [mask.to(args.device) for mask in made]
    from sparsereel import TokenGrid, patterns
    from sparsereel.kernel_choice import kernel_for
    from sparsereel.token_order import best_tile

    grid = TokenGrid(args.tokens // FRAME**2, FRAME, FRAME)
    options = {"window": WINDOW} if args.pattern == "neighborhood" else {}
    pattern = patterns.make(args.pattern, **options)
    kernel = kernel_for("auto", torch.device(args.device).type, DTYPES[args.dtype], grid.seq_len)
    tile = best_tile({pattern: 1}, grid, kernel=kernel)
    order = None if tile is None else grid.tile_order(tile)
    return [pattern.block_mask(grid, block, order=order).to(args.device)]


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(contenders: dict[str, Callable[[], object]], repeat: int, device: str) -> dict[str, list[float]]:
    """Seconds of each contender, taken in turns after one warm-up each, so that a slow minute hits all alike."""
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, call in contenders.items():
            seconds[name].append(timed(call, device))
    return seconds


def with_gradients(attend: Callable[..., torch.Tensor], tensors: Tensors, backward: bool) -> Callable[[], object]:
    """`attend(q, k, v)`, or that and the gradients of q, k and v."""
    if not backward:
        return torch.no_grad()(lambda: attend(*tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    grad = torch.randn_like(tensors[0])

    def run() -> object:
        return torch.autograd.grad(attend(*leaves), leaves, grad)

    return run


def sparse_call(backend: str, mask: BlockMask) -> Callable[..., torch.Tensor]:
    """`attend(q, k, v)` through one backend."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q, k, v, mask, backend=backend)

    return attend


def runnable(args: argparse.Namespace, tensors: Tensors, mask: BlockMask) -> tuple[list[str], dict[str, list[str]]]:
    """(backends that can run this, reasons of the others)."""
    problem = problem_of(*tensors, mask, None, None, Wants(backward=args.backward))
    reasons = {name: dispatch.BY_NAME[name].reasons(problem) for name in args.backends}
    return [name for name, said in reasons.items() if not said], {n: said for n, said in reasons.items() if said}


def gate(args: argparse.Namespace, backends: Sequence[str]) -> None:
    """Every backend matches the definition on a small problem; AssertionError otherwise."""
    q, k, v = make_qkv(GATE_TOKENS, head_dim=args.head_dim, dtype=DTYPES[args.dtype], device=args.device)
    mask = random_block_mask(GATE_TOKENS, block=(args.block[0], args.block[1]), device=args.device)
    for name in backends:
        assert_matches_reference(q, k, v, mask, backend=name, lse=args.backward, gradients=args.backward)


# ---------------------------------------------------------------- results


def measure(args: argparse.Namespace) -> tuple[list[Row], dict[str, list[str]]]:
    """A row for every mask and contender, and why backends were left out."""
    shape = {"heads": args.heads, "head_dim": args.head_dim, "dtype": DTYPES[args.dtype], "device": args.device}
    tensors = make_qkv(args.tokens, **shape)
    rows: list[Row] = []
    chosen = masks(args)
    backends, refused = runnable(args, tensors, chosen[0])
    gate(args, backends)
    size = sum(x.nbytes for x in tensors)
    for mask in chosen:
        contenders = {"dense": with_gradients(F.scaled_dot_product_attention, tensors, args.backward)}
        for name in backends:
            contenders[name] = with_gradients(sparse_call(name, mask), tensors, args.backward)
        seconds = alternate(contenders, args.repeat, args.device)
        for name, taken in seconds.items():
            rows.append(row(name, mask, taken, statistics.median(seconds["dense"])))
    if "torch" in backends:
        # Last, because measuring memory leaves the allocator in another state.
        for mask in chosen:
            extra = peak_extra_bytes(with_gradients(sparse_call("torch", mask), tensors, args.backward), args.device)
            line = next(r for r in rows if r["backend"] == "torch" and r["mask_density"] == mask.density)
            line["peak_extra_of_qkv"] = extra / size
    return rows, refused


def row(name: str, mask: BlockMask, taken: list[float], dense: float) -> Row:
    """One line of the table."""
    median, whole = statistics.median(taken), name == "dense"
    density, token_density = (1.0, 1.0) if whole else (mask.density, mask.token_density)
    return {
        "mask_density": mask.density,
        "backend": name,
        "density": density,
        "token_density": token_density,
        "seconds_median": median,
        "seconds": [round(t, 6) for t in taken],
        "speedup": dense / median,
        "share_of_ideal": dense / median * density,
        "share_of_ideal_tokens": dense / median * token_density,
    }


def describe(args: argparse.Namespace) -> Row:
    """Machine and problem: what a reader needs to take the figures seriously."""
    return {
        "device": speed_table.device_name(torch.device(args.device).type),
        "instruction_set": instruction_set() if args.device == "cpu" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": [1, args.heads, args.tokens, args.head_dim],
        "dtype": args.dtype,
        "pattern": args.pattern,
        "block": list(args.block),
        "backward": args.backward,
        "repeat": args.repeat,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def instruction_set() -> str | None:
    """What the native CPU kernels use here; None where they are not built."""
    try:
        return cpu.binding.chosen_isa()
    except cpu.BuildError:
        return None


def show(header: Row, rows: list[Row], refused: dict[str, list[str]]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    shape = " × ".join(map(str, header["shape"]))
    kind = "forward and backward" if header["backward"] else "forward"
    machine = f"{header['threads']} threads of {header['device']}, torch {header['torch']}"
    table = Table(title=f"{shape} {header['dtype']}, {header['pattern']}, {kind}; {machine}", title_justify="left")
    for column in ("density", "tokens", "backend", "ms", "speed-up", "share", "share (tokens)", "memory / (q+k+v)"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for line in rows:
        table.add_row(
            f"{line['density']:.3f}",
            f"{line['token_density']:.3f}",
            line["backend"],
            f"{line['seconds_median'] * 1e3:.0f}",
            f"{line['speedup']:.2f}×",
            f"{line['share_of_ideal']:.2f}",
            f"{line['share_of_ideal_tokens']:.2f}",
            f"{line['peak_extra_of_qkv']:.2f}×" if "peak_extra_of_qkv" in line else "",
            end_section=line is rows[-1] or rows[rows.index(line) + 1]["backend"] == "dense",
        )
    console = Console(width=WIDTH)
    console.print(table)
    for name, reasons in refused.items():
        console.print(f"{name} was left out: {'; '.join(reasons)}")


def default_path(header: Row) -> Path:
    """benchmarks/results/attention-<device>-<dtype>[-<pattern>][-backward].json"""
    parts = [header["device"], header["dtype"], header["pattern"] if header["pattern"] != "random" else ""]
    parts.append("backward" if header["backward"] else "")
    slugs = (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)
    return RESULTS / ("-".join(["attention", *filter(None, slugs)]) + ".json")


def write(path: Path, text: str) -> None:
    """Write beside `path`, then rename: an interrupted run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when everything was measured, 1 when a backend missed the definition, 130 when interrupted."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    try:
        rows, refused = measure(args)
    except AssertionError as error:
        print(f"nothing was timed, because {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    header = describe(args)
    text = json.dumps({**header, "refused": refused, "rows": rows}, indent=1) + "\n"
    if args.json == "-":
        print(text, end="")
        return 0
    show(header, rows, refused)
    path = Path(args.json) if args.json else default_path(header)
    write(path, text)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
