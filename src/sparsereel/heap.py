"""The C heap of a process that computes on the CPU: keep what tensors free, since their successors need it at once."""

from __future__ import annotations

import ctypes
import os
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
SETTINGS = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: (1 << 31) - 1, M_TOP_PAD: 1 << 28, M_ARENA_MAX: 2}
VARIABLES = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES",
)


def keep_freed_memory() -> bool:
    """Stop glibc from handing large freed blocks back to the system; True = it was told so.

    By default large tensors (over 32 MiB at the latest) are mapped anew, and their pages faulted in one by one, layer
    after layer. The process then keeps the most it ever needed. Settings in the environment (MALLOC_...,
    GLIBC_TUNABLES) win; other allocators and systems are left alone. The command line calls this; a program of your
    own may, before its first pipeline call.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in VARIABLES):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        return False
    results = [library.mallopt(name, value) for name, value in SETTINGS.items()]
    return all(result == 1 for result in results)
