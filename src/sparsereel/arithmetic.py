"""Which dtype is the fast one on a CPU: bf16 only where it multiplies that in hardware, as elsewhere it is emulated."""

from __future__ import annotations

from functools import cache

import torch


@cache
def arithmetic() -> torch.dtype:
    """torch.bfloat16 with AVX-512 bf16 or AMX, else torch.float32 (bf16 products took forty times as long on AVX2)."""
    capable = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if any(check is not None and check() for check in capable) else torch.float32
