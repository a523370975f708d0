"""What benchmarks of single calls of the CPU kernel share: their options, and what a reader has to know of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from sparsereel.generation import machine
from sparsereel_kernels.cpu.binding import chosen_isa


def options_of(description: str | None, heads: int, result: Path) -> argparse.Namespace:
    """The command line; threads are set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=heads)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=7, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=result)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    """Machine and settings, for the file."""
    settings = {name: getattr(options, name) for name in ("heads", "head_dim", "repeat", "threads")}
    return {"machine": machine(), "instruction_set": chosen_isa(), "torch": torch.__version__, **settings}


def where(facts: dict[str, Any]) -> str:
    """The machine, in words."""
    return f"{facts['threads']} threads of {facts['machine']}, {facts['instruction_set']}"
