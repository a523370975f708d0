"""Scatter plots of speed against a figure, as places on a drawing that a page's SVG fills in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_PLOT = {"width": 560, "height": 320, "left": 60, "right": 150, "top": 24, "bottom": 44}
_UNITS = {"psnr": "PSNR, dB", "temporal_psnr": "temporal PSNR, dB"}


def pareto(summary: Mapping[str, Mapping[str, Any]], figure: str = "psnr") -> dict[str, Any]:
    """Places of points, whiskers and ticks of speed (x) against a figure (y), in pixels of the drawing.

    Plans without the figure are left out. Filled points are on the front: no other plan is both faster and better.
    """
    rows = {name: (row, row["figures"][figure]) for name, row in summary.items() if figure in row["figures"]}
    speeds = [v for row, _ in rows.values() for v in (row["speedup_interval"] or []) + [row["speedup"], 1.0]]
    levels = [v for _, found in rows.values() for v in (found["interval"] or []) + [found["mean"]]]
    x_ticks, y_ticks = _ticks(min(speeds), max(speeds)), _ticks(min(levels), max(levels))
    inner_w = _PLOT["width"] - _PLOT["left"] - _PLOT["right"]
    inner_h = _PLOT["height"] - _PLOT["top"] - _PLOT["bottom"]

    def x(value: float) -> float:
        return round(_PLOT["left"] + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * inner_w, 1)

    def y(value: float) -> float:
        return round(_PLOT["top"] + (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0]) * inner_h, 1)

    higher = next(iter(rows.values()))[1].get("higher_is_better", True)
    front = on_front({name: (row["speedup"], found["mean"]) for name, (row, found) in rows.items()}, higher)
    points: list[dict[str, Any]] = [
        {
            "name": name,
            "x": x(row["speedup"]),
            "y": y(found["mean"]),
            "across": [x(v) for v in row["speedup_interval"] or [row["speedup"]] * 2],
            "along": [y(v) for v in found["interval"] or [found["mean"]] * 2],
            "front": name in front,
        }
        for name, (row, found) in rows.items()
    ]
    line = " ".join(f"{p['x']},{p['y']}" for p in sorted(points, key=lambda p: p["x"]) if p["front"])
    return {
        **_PLOT,
        "figure": figure,
        "label": _UNITS.get(figure, figure.replace("_", " ")) + ("" if higher else " (lower is better)"),
        "points": points,
        "line": line,
        "x_ticks": [(x(v), f"{v:g}") for v in x_ticks],
        "y_ticks": [(y(v), f"{v:g}") for v in y_ticks],
    }


def on_front(points: Mapping[str, tuple[float, float]], higher: bool = True) -> set[str]:
    """Names of the (speed, value) points that no other beats in both."""
    sign = 1 if higher else -1
    signed = {name: (speed, sign * value) for name, (speed, value) in points.items()}
    return {
        name
        for name, here in signed.items()
        if not any(there[0] >= here[0] and there[1] >= here[1] and there != here for there in signed.values())
    }


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from below `low` to above `high`."""
    span = max(high - low, 1e-3 * max(abs(high), 1))
    step = 10 ** np.floor(np.log10(span / 4))
    step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 5)
    first, last = np.floor(low / step - 1e-9), np.ceil(high / step + 1e-9)
    if first == last:
        last += 1
    return [round(float(k * step), 10) for k in range(int(first), int(last) + 1)]
