"""Generate videos with the causal minireel and let the judge score them over time: the figures of the model card.

    python -m sparsereel.minireel.causal_scorecard --clips 6 --chunks 9 --sheet causal.png --json causal.json
    python -m sparsereel.minireel.causal_scorecard --weights out/minireel/causal --sink 0

Prompts and seeds are those of `sparsereel.minireel.scorecard`. A chunk is three latent frames; three make a native
clip, 33 frames, and every further one adds 12. Figures are of the native beginning and of every 32 frames after it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsereel.minireel.sizes import NATIVE


def judge_stretches(judge: Any, video: np.ndarray, prompt: str) -> list[Any]:
    """Scores of frames 0 to 32, and of every 32 frames after them; direction is judged in the first only."""
    from sparsereel_eval.drift import without_directions

    later = without_directions(prompt)
    starts = [0, *range(NATIVE.frames, len(video) - 15, NATIVE.frames - 1)]
    ends = [*starts[1:], len(video)]
    return [judge.score(video[start:end], later if start else prompt) for start, end in zip(starts, ends, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """Make the videos one after another and print a table of the stretches."""
    from sparsereel.minireel import CAUSAL_WEIGHTS, load_causal
    from sparsereel.minireel.scorecard import contact_sheet, prompts_for
    from sparsereel_eval.judge import Judge, average

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=6, help="videos to generate; the first of a fixed list")
    parser.add_argument("--first", type=int, default=0, help="number of the first, to go on with the list")
    parser.add_argument("--chunks", type=int, default=9, help="chunks of three latent frames; three are a native clip")
    parser.add_argument("--sink", type=int, default=3, help="latent frames of the start that stay in the window")
    parser.add_argument("--steps", type=int, default=NATIVE.steps)
    parser.add_argument("--weights", type=Path, default=CAUSAL_WEIGHTS, help="folder of the causal transformer")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet (PNG) here")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    given = parser.parse_args(arguments)
    prompts = prompts_for(NATIVE, given.first + given.clips, 0.0)[given.first :]
    pipeline, judge = load_causal(weights=given.weights), Judge()
    pipeline.set_progress_bar_config(disable=True)
    videos, scores = [], []
    for number, prompt in enumerate(prompts, start=given.first):
        start = time.monotonic()
        frames = pipeline(
            prompt,
            num_frames=12 * given.chunks - 3,
            num_inference_steps=given.steps,
            sink_frames=given.sink,
            generator=torch.Generator().manual_seed(number),
        ).frames[0]
        videos.append(np.rint(frames * 255).astype(np.uint8))
        scores.append(judge_stretches(judge, videos[-1], prompt))
        sound = "".join("+" if score.sound else "-" for score in scores[-1])
        print(f"{number:3d}  {time.monotonic() - start:6.1f} s  {prompt}  sound {sound}", flush=True)
    table = [average(column) for column in zip(*scores, strict=True)]
    for stretch, row in enumerate(table):
        print(f"stretch {stretch}  " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if given.sheet:
        contact_sheet(videos, prompts, given.sheet, columns=12)
    if given.json:
        details = [
            {"prompt": prompt, "stretches": [score.to_dict() for score in own]}
            for prompt, own in zip(prompts, scores, strict=True)
        ]
        about = {"clips": len(videos), "chunks": given.chunks, "sink": given.sink, "steps": given.steps}
        given.json.write_text(json.dumps({**about, "stretches": table, "details": details}, indent=2) + "\n")


if __name__ == "__main__":
    main()
