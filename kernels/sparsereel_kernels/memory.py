"""Peak memory of a call, for tests and benchmarks."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

INTERVAL_SECONDS = 5e-4
# From glibc's malloc.h: blocks of this size and more are mapped one by one and go back to the system when freed.
M_MMAP_THRESHOLD = -3
SMALL_THRESHOLD, LARGEST_THRESHOLD = 1 << 16, 1 << 25


def resident_bytes() -> int:
    """Memory of this process that lies in RAM. Raises OSError where the system has no /proc (all but Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_extra_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """How far memory rises above where it was while `call` runs; its result is freed.

    On CUDA the allocator's own count; on CPU resident memory, looked at every half millisecond: exact to a few
    megabytes. Run `call` once before, so that libraries have set themselves up. Timings taken inside mean nothing.

    Raises:
        OSError: on a CPU without /proc.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _freed_memory_goes_back():
        before = resident_bytes()
        return _peak_resident_bytes(call) - before


def _peak_resident_bytes(call: Callable[[], object]) -> int:
    peak, done = resident_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL_SECONDS):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak, resident_bytes())


@contextmanager
def _freed_memory_goes_back() -> Iterator[None]:
    """Make glibc hand freed memory back at once: what it keeps for later would hide what a call uses."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        yield
        return
    library.malloc_trim(0)
    library.mallopt(M_MMAP_THRESHOLD, SMALL_THRESHOLD)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
