"""Peak memory of a call, for tests and benchmarks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

_PAGE = 4096
_INTERVAL = 5e-4


def resident_bytes() -> int:
    """Memory of this process that lies in RAM (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def peak_extra_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """How far memory rises above where it was while `call` runs; its result is freed.

    On CUDA the allocator's own count; on CPU resident memory looked at every half millisecond, which is exact to a
    few megabytes. Raises OSError where the system has no /proc.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    before = peak = resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_INTERVAL):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak, resident_bytes()) - before
