"""CLIP scores of a folder of clips, with the prompts found for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def score_clips(clips: Path, prompts: Path | None, model: str, weights: Path | None, frames: int) -> dict[str, Any]:
    """Summaries over clips of the text match and of the likeness of neighbouring frames, and every clip's own.

    Raises:
        MissingWeights: no file of the model's weights.
        ValueError: unreadable clips, or a clip without a prompt.
    """
    from sparsereel_eval.clip_score import load_clip_model
    from sparsereel_eval.features import pick_frames
    from sparsereel_eval.folders import list_clips
    from sparsereel_eval.intervals import summarise
    from sparsereel_eval.readers import open_clip

    files = list_clips(clips)
    texts = find_prompts(files, prompts)
    scorer = load_clip_model(model, weights)
    rows: list[dict[str, Any]] = []
    for file, text in zip(files, texts, strict=True):
        found = scorer.score(pick_frames(open_clip(file), frames), text)
        rows.append({"clip": str(file), "prompt": text, "text": found.text, "steadiness": found.steadiness})
    steady = [row["steadiness"] for row in rows if row["steadiness"] is not None]
    return {
        "model": scorer.name,
        "frames_per_clip": frames,
        "text": summarise([row["text"] for row in rows], texts),
        "steadiness": summarise(steady) if steady else None,
        "clips": rows,
    }


def find_prompts(files: list[Path], prompts: Path | None) -> list[str]:
    """A prompt for every clip: from the file, else from the JSON that `sparsereel generate` wrote beside the clip.

    Raises:
        ValueError: the file has another number of prompts, or a clip has no JSON with a prompt.
    """
    if prompts is not None:
        from sparsereel.batch import read_prompts

        texts = read_prompts(prompts)
        if len(texts) != len(files):
            raise ValueError(f"{prompts} holds {len(texts)} prompts for {len(files)} clips")
        return texts
    texts = []
    for file in files:
        try:
            data = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            data = None
        text = data.get("prompt") if isinstance(data, dict) else None
        if not isinstance(text, str) or not text:
            raise ValueError(f"no prompt is known for {file}: give --prompts, or keep the JSON that generate wrote")
        texts.append(text)
    return texts
