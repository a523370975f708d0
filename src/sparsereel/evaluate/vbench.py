"""VBench's custom-input mode, as far as it goes without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def measure(clips: Path, names: Sequence[str] | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure dimensions on clips of any prompts.

    Returns:
        "vbench_like": dimension to its summary over clips; "left_out": dimension to what it would need. Apart from
        temporal flickering without the static filter, nothing here equals the official program's figures.

    Raises:
        ValueError: unknown dimension, or unreadable clips.
    """
    from sparsereel_eval.folders import list_clips
    from sparsereel_eval.intervals import summarise
    from sparsereel_eval.readers import open_clip
    from sparsereel_eval.vbench.dimensions import temporal_flickering
    from sparsereel_eval.vbench.names import DIMENSIONS, dimension

    chosen = [dimension(name) for name in names] if names else list(DIMENSIONS)
    left_out = {key: DIMENSIONS[key].needs for key in chosen if key != "temporal_flickering"}
    for key, needs in left_out.items():
        mode = "" if DIMENSIONS[key].custom else ", and the official prompts"
        say(f"{key} left out: it needs {needs}{mode}")
    rows: dict[str, Any] = {}
    files = list_clips(clips)
    if "temporal_flickering" in chosen:
        values = [temporal_flickering(open_clip(file)) for file in files]
        rows["temporal_flickering"] = {
            **summarise(values),
            "clips": {str(file): value for file, value in zip(files, values, strict=True)},
        }
    return {"vbench_like": rows, "left_out": left_out}
