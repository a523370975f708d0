"""C-Upscale's regional priors on minireel at twice the side: digits that thresholds leave, and regional prompts.

    python benchmarks/extend_regions.py --clips 2 --thresholds 0,0.5,0.7,0.85 --sheet regions.png

A prompt of minireel names one digit. `pieces` counts what stands out from the background, the mean over frames: 1 is
what was asked for. The last clips have a prompt for the left half and one for the right; `red` and `yellow` are the
shares of bright places of that half that have its prompt's colour.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

import sparsereel
from sparsereel import minireel
from sparsereel.extend.recipes import NAMES, Recipe
from sparsereel.extend.regional import RegionalPrior
from sparsereel.files import write_json
from sparsereel.generation import environment
from sparsereel.minireel.scorecard import contact_sheet, prompts_for

HALVES = (
    ("a red 3 moving left on navy", (0.0, 0.0, 1.0, 0.5)),
    ("a yellow 2 moving left on navy", (0.0, 0.5, 1.0, 1.0)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=2, help="prompts; the first of the scorecard's list")
    parser.add_argument("--thresholds", default="0,0.5,0.7,0.85", help="comma-separated")
    parser.add_argument("--weights", default="0.5,0.9", help="of regional prompts, comma-separated")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/extend-regions.json"))
    parser.add_argument("--sheet", type=Path, help="write frames of the clips with regional prompts as a PNG here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pipe = minireel.load()
    pipe.set_progress_bar_config(disable=True)
    settings = {"steps": given.steps, "frames": given.frames, "side": 2.0}
    result: dict[str, Any] = {**settings, "environment": environment(), "clips": []}
    priors = [RegionalPrior(threshold=float(t)) for t in given.thresholds.split(",")]
    jobs = [
        (p, seed, prior)
        for seed, p in enumerate(prompts_for(minireel.NATIVE, given.clips, two=0.0))
        for prior in priors
    ]
    halves = [RegionalPrior(HALVES, threshold=0, weight=float(w), overlap=0.6) for w in given.weights.split(",") if w]
    jobs += [("a cyan 6 moving left on navy", 0, prior) for prior in halves]
    shown = []
    for prompt, seed, prior in jobs:
        video, seconds = _clip(pipe, prompt, seed, prior, given)
        row = {
            "prompt": prompt,
            "seed": seed,
            "threshold": prior.threshold,
            "pieces": _pieces(video),
            "seconds": seconds,
        }
        if prior.prompts:
            half = video.shape[2] // 2
            row |= {"weight": prior.weight, "red": _share(video[:, :, :half], "red")}
            row |= {"yellow": _share(video[:, :, half:], "yellow")}
            shown.append((f"weight {prior.weight:g}", video))
        result["clips"].append(row)
        write_json(given.json, result)
        print({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    if given.sheet and shown:
        contact_sheet([video for _, video in shown], [text for text, _ in shown], given.sheet, columns=6)


def _clip(
    pipe: Any, prompt: str, seed: int, prior: RegionalPrior, given: argparse.Namespace
) -> tuple[np.ndarray, float]:
    made: Recipe = NAMES["cupscale"][1]("wan", None)  # a fixed recipe
    report = sparsereel.extend(pipe, height=2.0, width=2.0, method=replace(made, regional=prior))
    start = time.perf_counter()
    call = {"num_frames": given.frames, "num_inference_steps": given.steps, **report.arguments}
    frames = pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).frames[0]
    seconds = time.perf_counter() - start
    sparsereel.restore(pipe)
    return np.rint(frames * 255).astype(np.uint8), seconds


def _pieces(video: np.ndarray) -> float:
    """Connected regions of more than a few pixels that differ from the background, the mean over frames."""
    counts = []
    for frame in video.astype(np.float64):
        background = np.median(frame.reshape(-1, 3), axis=0)
        apart = ndimage.binary_dilation(np.abs(frame - background).max(-1) > 90, iterations=2)
        labels, count = ndimage.label(apart)
        counts.append(sum(size > 60 for size in ndimage.sum(apart, labels, range(1, count + 1))))
    return float(np.mean(counts))


def _share(part: np.ndarray, colour: str) -> float:
    """Share of the bright places that are red or yellow."""
    red, green, blue = part.reshape(-1, 3).astype(np.float64).T
    bright = part.reshape(-1, 3).max(-1) > 120
    found = (red > 1.5 * green) if colour == "red" else (np.minimum(red, green) > 1.3 * blue)
    return float(found[bright].mean()) if bright.any() else 0.0


if __name__ == "__main__":
    main()
