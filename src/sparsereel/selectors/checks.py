"""Checks of selector arguments and of what a selector is given: each raises ValueError with one sentence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsereel.grid import TokenGrid

# How often scores are computed again; see `refresh.py`.
Refresh = int | str | tuple[int | float, ...]

REFRESH = 'a number of steps, "every step", "once" or an ascending list of steps or shares'


def share(name: str, value: Any) -> float:
    """A number above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    return float(value)


def number(name: str, value: Any, *, least: float, most: float) -> float:
    """A number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
    return float(value)


def refresh(value: Any) -> Refresh:
    """A cleaned refresh policy: a whole number of steps, "once", or a tuple of steps and shares."""
    if isinstance(value, str) and value.replace("_", " ").replace("-", " ") == "every step":
        return 1
    if value == "once":
        return "once"
    if isinstance(value, (list, tuple)) and value and all(_moment(moment) for moment in value):
        kinds = {type(moment) for moment in value}
        if len(kinds) == 1 and list(value) == sorted(set(value)):
            return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"refresh must be {REFRESH}, got {value!r}")


def _moment(value: Any) -> bool:
    if isinstance(value, float):
        return 0 <= value <= 1
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def attention_inputs(q: Tensor, k: Tensor, grid: TokenGrid, key_lengths: Tensor | None) -> None:
    """ValueError unless q and k are self-attention over the grid."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q and k must be [B, H, S, D], got {list(q.shape)} and {list(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q [B, H, S, D] and k [B, Hkv, S, D] must agree in B and D, and Hkv must divide H, "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    if q.shape[2] != grid.seq_len or k.shape[2] != grid.seq_len:
        raise ValueError(f"the grid has {grid.seq_len} tokens, q has {q.shape[2]} and k has {k.shape[2]}")
    if key_lengths is not None and tuple(key_lengths.shape) != (q.shape[0],):
        raise ValueError(
            f"key_lengths must hold one length for each of {q.shape[0]} samples, got {list(key_lengths.shape)}"
        )
