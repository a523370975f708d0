"""The report of a search: one HTML page that opens offline.

Heads by layer (what each does, what it loses and costs), the attention picture of a head on click, the front with
presets and single patterns, predicted against measured, and clips of held-out prompts side by side. Plotly's script is
part of the page, everything that is text is escaped, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsereel.files import write_text

if TYPE_CHECKING:
    from sparsereel.search.result import SearchResult

#: bytes of clips that a page holds; later ones are left out and named
CLIP_BYTES = 500_000
#: pixels of the shorter side below which clips are enlarged to be seen
SMALL = 160


def write_report(path: Path, result: SearchResult) -> None:
    """Write the page in one move.

    Raises:
        ValueError: the result has no evidence, the folder is not writable, or plotly or jinja2 is missing.
    """
    write_text(path, render(result))


def render(result: SearchResult) -> str:
    """The page as text."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(f"the report needs {error.name}: pip install 'sparsereel[eval]'") from error
    if result.evidence is None:
        raise ValueError("this result has no evidence to report; only what `search` returns has")
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = result.plan.calibration
    clips, left_out = _clips(result)
    return pages.get_template("report.html.j2").render(
        plotly=get_plotlyjs(),
        data=as_script(page_data(result)),
        result=result,
        known=known,
        clips=clips,
        left_out=left_out,
        plan=json.dumps({k: v for k, v in result.plan.to_dict().items() if k != "calibration"}, indent=2),
        details=json.dumps({k: v for k, v in known.items() if k != "heads"}, indent=2, ensure_ascii=False),
    )


def page_data(result: SearchResult) -> dict[str, Any]:
    """What the page's script reads."""
    assert result.evidence is not None
    names = ("density", "seconds", "psnr")
    return {
        **result.evidence.data,
        "front": [asdict(point) for point in result.front],
        "predicted": {name: getattr(result.predicted, name) for name in names},
        "measured": {name: result.measured[name] for name in names if name in result.measured},
    }


def as_script(data: dict[str, Any]) -> str:
    """JSON that can stand inside a script element whatever its texts are; numbers with five digits, no NaN."""

    def tidy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tidy(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [tidy(entry) for entry in value]
        if isinstance(value, float):
            return float(f"{value:.5g}") if np.isfinite(value) else None
        return value

    text = json.dumps(tidy(data), separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _clips(result: SearchResult) -> tuple[list[dict[str, Any]], int]:
    """Clips as base64 mp4, dense and sparse side by side, as many as fit; and how many did not."""
    from sparsereel.media import side_by_side, write_mp4

    assert result.evidence is not None
    rows = {row["seed"]: row for row in result.measured.get("clips", [])}
    found: list[dict[str, Any]] = []
    spent, left_out = 0, 0
    for prompt, seed, dense, sparse in result.evidence.clips:
        pair = side_by_side(dense, sparse)
        factor = max(1, round(SMALL / min(dense.shape[1:3])))
        pair = pair.repeat(factor, axis=1).repeat(factor, axis=2)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_mp4(path, pair)
            data = path.read_bytes()
        if spent + len(data) > CLIP_BYTES:
            left_out += 1
            continue
        spent += len(data)
        found.append({"prompt": prompt, "seed": seed, "row": rows[seed], "mp4": base64.b64encode(data).decode()})
    return found, left_out
