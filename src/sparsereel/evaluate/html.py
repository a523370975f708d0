"""One self-contained HTML page of a study: nothing is loaded from elsewhere, every text is escaped."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsereel.files import write_text

_SHOWN = 40  # cases with pictures; the JSON beside the report holds all
_DIFFERENCE_GAIN = 4
_PLOT = {"width": 560, "height": 320, "left": 60, "right": 150, "top": 16, "bottom": 44}


def write_report(path: Path, result: Mapping[str, Any], clips: Mapping[str, Path]) -> None:
    """Write the page.

    Args:
        result: What `run_study` returns.
        clips: Name of a clip in `result` to its file, for the pictures.
    """
    write_text(path, render(result, clips))


def render(result: Mapping[str, Any], clips: Mapping[str, Path]) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = list(dict.fromkeys(f for row in result["summary"].values() for f in row["figures"]))
    return pages.get_template("report.html.j2").render(
        result=result,
        figures=figures,
        plot=pareto(result["summary"]),
        cases=_cases(result, clips),
        shown=_SHOWN,
        gain=_DIFFERENCE_GAIN,
        details=json.dumps({k: result[k] for k in ("config", "environment", "plans")}, indent=2, ensure_ascii=False),
    )


def pareto(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Places of points, whiskers and ticks of speed (x) against PSNR (y), in pixels of the drawing."""
    rows = {name: (row, row["figures"]["psnr"]) for name, row in summary.items()}
    speeds = [v for row, _ in rows.values() for v in (row["speedup_interval"] or []) + [row["speedup"], 1.0]]
    levels = [v for _, psnr in rows.values() for v in (psnr["interval"] or []) + [psnr["mean"]]]
    x_ticks, y_ticks = _ticks(min(speeds), max(speeds)), _ticks(min(levels), max(levels))
    inner_w = _PLOT["width"] - _PLOT["left"] - _PLOT["right"]
    inner_h = _PLOT["height"] - _PLOT["top"] - _PLOT["bottom"]

    def x(value: float) -> float:
        return round(_PLOT["left"] + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * inner_w, 1)

    def y(value: float) -> float:
        return round(_PLOT["top"] + (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0]) * inner_h, 1)

    points = [
        {
            "name": name,
            "x": x(row["speedup"]),
            "y": y(psnr["mean"]),
            "across": [x(v) for v in row["speedup_interval"] or [row["speedup"]] * 2],
            "along": [y(v) for v in psnr["interval"] or [psnr["mean"]] * 2],
            "front": row["on_front"],
        }
        for name, (row, psnr) in rows.items()
    ]
    line = " ".join(f"{p['x']},{p['y']}" for p in sorted(points, key=lambda p: p["x"]) if p["front"])
    return {
        **_PLOT,
        "points": points,
        "line": line,
        "x_ticks": [(x(v), f"{v:g}") for v in x_ticks],
        "y_ticks": [(y(v), f"{v:g}") for v in y_ticks],
    }


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from below `low` to above `high`."""
    span = max(high - low, 1e-3 * max(abs(high), 1))
    step = 10 ** np.floor(np.log10(span / 4))
    step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 5)
    first, last = np.floor(low / step - 1e-9), np.ceil(high / step + 1e-9)
    return [round(float(k * step), 10) for k in range(int(first), int(last) + 1)]


def _cases(result: Mapping[str, Any], clips: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Every clip with its figures, lowest PSNR first; the first of them with pictures."""
    cases = [{"plan": name, **run} for name, runs in result["runs"].items() for run in runs]
    cases.sort(key=lambda case: (case["values"]["psnr"], case["clip"]))
    for place, case in enumerate(cases):
        case["picture"] = _picture(clips[case["dense_clip"]], clips[case["clip"]]) if place < _SHOWN else None
    return cases


def _picture(dense: Path, test: Path) -> str:
    """First, middle and last frame of dense, tested and their difference, as a PNG in base64."""
    from PIL import Image

    from sparsereel.media import side_by_side, to_uint8
    from sparsereel_eval.readers import open_clip

    rows: list[np.ndarray] = []
    left, right = open_clip(dense), open_clip(test)
    last = (left.frames or 1) - 1
    wanted = sorted({0, last // 2, last})
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if index in wanted:
            a, b = to_uint8(a), to_uint8(b)
            change = (np.abs(a.astype(int) - b) * _DIFFERENCE_GAIN).clip(0, 255).astype(np.uint8)
            row = side_by_side(side_by_side(a[None], b[None]), change[None])[0]
            rows += [np.full((4, row.shape[1], 3), 128, np.uint8)] * bool(rows) + [row]
    image = Image.fromarray(np.concatenate(rows))
    image.thumbnail((720, 720))
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
