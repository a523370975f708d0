"""Compiles every shipped configuration for its architecture, on a machine without a GPU, and checks the machine code.

    python -m sparsereel_kernels.triton.compile_check                       # everything, some minutes on two cores
    python -m sparsereel_kernels.triton.compile_check --architecture sm90 --kernel forward --width 128
    python -m sparsereel_kernels.triton.compile_check --json benchmarks/results/triton_compile.json

Prints one line a kernel: registers, spills, shared memory, tensor-core and TMA instructions. Exit code 1 where
- a forward kernel spills or uses local memory,
- a kernel on 16-bit or tf32 numbers has no tensor-core instruction, or one on bytes none for them,
- a forward kernel on sm_90 or later that was asked for TMA has no TMA load,
- any kernel needs more shared memory than a block of threads may have there;
2 for arguments that name nothing, 4 where Triton or its tools are missing. Spills in backward are reported only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import util
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..block_lists import EMPTY, FULL
from ..block_mask import BlockMask
from ..modifiers import FrameDecay, KeyBias, Modifier
from . import configs

if TYPE_CHECKING:
    from .launch import Launch

TOKENS, BLOCK = 512, (128, 64)
# What a call may carry besides q, k, v and the mask ("bias" has key lengths, too), or how it may differ: fp16 in place
# of bf16, lists cut in parts for few queries ("split"), q k^T in bytes ("int8"). Every configuration is compiled plain;
# forward for 16-bit numbers and the commonest head dim with the others as well, and what is fp32 with tf32 products.
VARIANTS = ("plain", "decay", "bias", "dense", "fp16", "split", "int8", "tf32")
FULLY_CHECKED = ("forward", 16, 128)
DTYPES = {16: torch.bfloat16, 32: torch.float32}
QUERIES_OF_A_SPLIT, PROCESSORS = 128, 108


@dataclass(frozen=True)
class Case:
    """One kernel to compile: a row of the table, and with what it is called."""

    architecture: str
    kernel: str
    bits: int
    width: int
    variant: str
    tma: bool


def cases() -> Iterator[Case]:
    """Every shipped configuration; where TMA is on, the variant without it too, which serves unaligned inputs."""
    for architecture, table in configs.TABLE.items():
        for (kernel, bits, width), config in table.items():
            for tma in (True, False) if config.tma else (False,):
                for variant in _variants(kernel, bits, width):
                    yield Case(architecture, kernel, bits, width, variant, tma)


def _variants(kernel: str, bits: int, width: int) -> tuple[str, ...]:
    if bits == 32:
        return ("plain", "tf32")
    return VARIANTS[:-1] if (kernel, bits, width) == FULLY_CHECKED else ("plain",)


def check(case: Case) -> dict[str, Any]:
    """Compile one case: its resources, and in `problems` what is wrong with them."""
    from . import aot

    launch = launch_of(case)
    started = time.perf_counter()
    found = aot.inspect(aot.compile_launch(launch, aot.TARGETS[case.architecture]))
    limit = aot.SHARED_LIMIT[case.architecture]
    problems = []
    if case.kernel == "forward" and (found.spills or found.local_accesses):
        problems.append(f"spills {found.spills} with {found.local_accesses} accesses to local memory")
    if (case.bits == 16 or case.variant == "tf32") and not found.tensor_core:
        problems.append("no tensor-core instruction")
    if case.variant == "int8" and not any(name in found.tensor_core for name in aot.BYTES):
        problems.append("no tensor-core instruction on bytes")
    if case.kernel == "forward" and case.tma and not found.tma:
        problems.append("no TMA load")
    if found.shared > limit:
        problems.append(f"{found.shared} bytes of shared memory, more than {limit}")
    return {
        **asdict(case),
        **asdict(launch.config),
        **asdict(found),
        "tma": case.tma,
        "tma_instructions": found.tma,
        "shared_limit": limit,
        "seconds": round(time.perf_counter() - started, 2),
        "problems": problems,
    }


def launch_of(case: Case) -> Launch:
    """The launch of one kernel for a small call; only shapes and alignment matter."""
    from . import launch

    k = torch.empty(1, 2, TOKENS, case.width, dtype=torch.float16 if case.variant == "fp16" else DTYPES[case.bits])
    splits = case.variant == "split"
    q = k[:, :, :QUERIES_OF_A_SPLIT] if splits else k
    mask = None if case.variant == "dense" else _mask(q.shape[2])
    lengths = torch.tensor([TOKENS], dtype=torch.int32) if case.variant == "bias" else None
    target = launch.Target("compile_check", case.architecture, PROCESSORS if splits else 1)
    precision = "tf32" if case.variant == "tf32" else "ieee"
    call = launch.Call(q, k, k, mask, 0.1, lengths, _modifier(case.variant), target, case.tma, precision=precision)
    call = replace(call, int8=case.variant == "int8")
    lse = torch.empty(q.shape[:3])
    if case.kernel == "forward":
        made = list(launch.forward_launches(call, q, lse))
    else:
        given = launch.Given(q, lse, q, lse, lse)
        made = list(launch.backward_launches(call, given, launch.Gradients(q, k, k, lse)))
    name = {"forward": "forward", "queries": "query_gradient", "keys": "key_gradient"}[case.kernel]
    (chosen,) = (x for x in made if x.kernel.__name__ == f"{name}_kernel")
    return chosen


def _mask(queries: int) -> BlockMask:
    """Full, partial and empty blocks."""
    kinds = torch.tensor([FULL, 0, EMPTY, FULL]).repeat(queries // BLOCK[0], TOKENS // BLOCK[1] // 4)
    tile = torch.full((1, BLOCK[0], BLOCK[1] // 8), 0x55, dtype=torch.uint8)
    return BlockMask.from_block_map(kinds[None, None].to(torch.int32), tile, (queries, TOKENS), BLOCK)


def _modifier(variant: str) -> Modifier | None:
    if variant == "decay":
        frames = torch.zeros(TOKENS, dtype=torch.int32)
        return FrameDecay(frames, frames, torch.ones(16))
    return KeyBias(torch.zeros(TOKENS)) if variant == "bias" else None


def run(chosen: list[Case]) -> list[dict[str, Any]]:
    """`check` of every case, on all processors, in order."""
    workers = max(1, min(len(chosen), os.cpu_count() or 1))
    if workers == 1:
        return [check(case) for case in chosen]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(check, chosen, chunksize=4))


def table(results: list[dict[str, Any]]) -> str:
    """One line a kernel."""
    head = f"{'kernel':42} {'tile':>8} {'warps':>5} {'stages':>6} {'regs':>5} {'spill':>6} {'shared':>7}  instructions"
    lines = [head]
    for row in results:
        dtype = "bf16" if row["bits"] == 16 else "fp32"
        name = f"{row['architecture']} {row['kernel']} {dtype} D={row['width']} {row['variant']}"
        found = {**row["tensor_core"], **row["tma_instructions"]}
        instructions = " ".join(f"{name}:{count}" for name, count in found.items())
        numbers = f"{row['registers']:5} {row['spills']:6} {row['shared']:7}"
        tile = f"{row['tile_m']}x{row['tile_n']}"
        lines.append(f"{name:42} {tile:>8} {row['num_warps']:5} {row['num_stages']:6} {numbers}  {instructions}")
        lines += [f"    {problem}" for problem in row["problems"]]
    wrong = sum(bool(row["problems"]) for row in results)
    return "\n".join([*lines, f"{len(results)} kernels compiled, {wrong} with problems"])


def report(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON holds."""
    import triton

    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "block": list(BLOCK),
        "kernels": results,
        "problems": sum(bool(row["problems"]) for row in results),
    }


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=tuple(configs.TABLE), help="only this one")
    parser.add_argument("--kernel", choices=configs.KERNELS, help="only this one")
    parser.add_argument("--width", type=int, choices=configs.WIDTHS, help="only this padded head dim")
    parser.add_argument("--bits", type=int, choices=tuple(DTYPES), help="only numbers of so many bits")
    parser.add_argument("--variant", choices=VARIANTS, help="only calls of this kind")
    parser.add_argument("--json", metavar="PATH", help="write the results there; - is standard output")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = _arguments(given)
    if util.find_spec("triton") is None:
        print("triton is not installed (pip install triton)", file=sys.stderr)
        return 4
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: Triton would interpret the kernels, not compile them", file=sys.stderr)
        return 2
    wished = {name: getattr(arguments, name) for name in ("architecture", "kernel", "width", "bits", "variant")}
    chosen = [case for case in cases() if all(v in (None, getattr(case, n)) for n, v in wished.items())]
    if not chosen:
        print("no shipped configuration fits these arguments", file=sys.stderr)
        return 2
    try:
        results = run(chosen)
    except FileNotFoundError as error:
        print(f"a tool that comes with Triton is missing: {error}", file=sys.stderr)
        return 4
    text = json.dumps(report(results), indent=1) + "\n"
    print(table(results), file=sys.stderr if arguments.json == "-" else sys.stdout)
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        Path(arguments.json).write_text(text, encoding="utf-8")
    return 1 if any(row["problems"] for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
