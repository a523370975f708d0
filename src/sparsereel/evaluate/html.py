"""One self-contained HTML page of a study: nothing is loaded from elsewhere, every text is escaped."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsereel.evaluate.plots import pareto
from sparsereel.files import write_text
from sparsereel.media import Frames, side_by_side, to_uint8, write_mp4

_SHOWN = 40  # cases with pictures; the JSON beside the report holds all
_PLAYER_BYTES = 12_000_000  # of all players together
_DIFFERENCE_GAIN = 4
_SMALL = 160  # pixels of height below which clips are enlarged to be seen


def write_report(path: Path, result: Mapping[str, Any], clips: Mapping[str, Path]) -> None:
    """Write the page.

    Args:
        result: What `run_study` returns.
        clips: Name of a clip in `result` to its file, for pictures and players.
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
    cases = _cases(result, clips)
    shown = ("config", "environments", "plans")
    return pages.get_template("report.html.j2").render(
        result=result,
        figures=figures,
        plots=[pareto(result["summary"], figure) for figure in figures],
        cases=cases,
        case_figures=list(dict.fromkeys(f for case in cases for f in case["values"])),
        shown=_SHOWN,
        gain=_DIFFERENCE_GAIN,
        lower=[f for f in figures if not _higher(result, f)],
        details={key: json.dumps(result[key], indent=2, ensure_ascii=False) for key in shown},
    )


def _higher(result: Mapping[str, Any], figure: str) -> bool:
    rows = (row["figures"] for row in result["summary"].values())
    return all(figures[figure].get("higher_is_better", True) for figures in rows if figure in figures)


def _cases(result: Mapping[str, Any], clips: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Every clip with its figures, lowest PSNR first; the first of them with pictures and a player."""
    cases = [{"plan": name, **run} for name, runs in result["runs"].items() for run in runs]
    cases.sort(key=lambda case: (case["values"]["psnr"], case["clip"]))
    spent = 0
    for place, case in enumerate(cases):
        case["values"] = {**case["values"], **case["judged"]}
        case["picture"] = case["player"] = None
        if place < _SHOWN:
            frames = _beside(clips[case["dense_clip"]], clips[case["clip"]])
            case["picture"] = _picture(frames)
            player = _player(frames, spent)
            spent += len(player or "")
            case["player"] = player
    return cases


def _beside(dense: Path, test: Path) -> Frames:
    """Dense, tested and their enlarged difference beside each other: (F, H, W, 3) uint8."""
    from sparsereel_eval.readers import open_clip

    rows = []
    for a, b in zip(open_clip(dense), open_clip(test), strict=True):
        a, b = to_uint8(a), to_uint8(b)
        change = (np.abs(a.astype(int) - b) * _DIFFERENCE_GAIN).clip(0, 255).astype(np.uint8)
        rows.append(side_by_side(side_by_side(a[None], b[None]), change[None])[0])
    return np.stack(rows)


def _picture(frames: Frames) -> str:
    """First, middle and last frame below each other, as a PNG in base64."""
    from PIL import Image

    last = len(frames) - 1
    wanted = sorted({0, last // 2, last})
    line = np.full((4, frames.shape[2], 3), 128, np.uint8)
    parts = [part for index in wanted for part in (line, frames[index])][1:]
    image = Image.fromarray(np.concatenate(parts))
    image.thumbnail((720, 720))
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def _player(frames: Frames, spent: int) -> str | None:
    """The clips as an mp4 in base64; None where the page would grow too large, or for a single frame."""
    if len(frames) < 2 or spent >= _PLAYER_BYTES:
        return None
    scale = max(1, -(-_SMALL // frames.shape[1]))
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames)
        data = path.read_bytes()
    return base64.b64encode(data).decode() if spent + len(data) <= _PLAYER_BYTES else None
