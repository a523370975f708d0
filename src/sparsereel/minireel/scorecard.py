"""Generate clips from a fixed list of prompts and let the judge score them: the figures of the model card.

    python -m sparsereel.minireel.scorecard --size native --clips 32
    python -m sparsereel.minireel.scorecard --size large --clips 8 --dtype bfloat16 --sheet large.png

Prompts and seeds are the same on every run, so that two sets of weights can be compared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsereel.minireel.sizes import LARGE, NATIVE, Size

PROMPT_SEED = 1000


def prompts_for(size: Size, count: int, two: float) -> list[str]:
    """The first `count` prompts of the scorecard; `two` is the share with two digits (0 and 1 are the usual ones)."""
    from sparsereel_eval.digits import sample_clip

    rng = np.random.default_rng(PROMPT_SEED)
    return [
        sample_clip(rng, frames=size.frames, height=size.height, width=size.width, two=two, named=1.0).prompt
        for _ in range(count)
    ]


def generate(
    folder: Path, size: Size, prompts: list[str], dtype: torch.dtype, on_clip: Any, *, kernels: bool = False
) -> list[np.ndarray]:
    """One clip a prompt, (F, H, W, 3) uint8; the seed of clip i is i. `kernels`: attention by this project's, dense."""
    from sparsereel.minireel.large import load_large_folder
    from sparsereel.minireel.loading import load_folder

    pipeline = (load_large_folder if size == LARGE else load_folder)(folder, dtype, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    if kernels:
        import sparsereel

        sparsereel.sparsify(pipeline, sparsereel.AttentionPlan.uniform(sparsereel.patterns.Full()))
    clips = []
    for seed, prompt in enumerate(prompts):
        start = time.monotonic()
        frames = pipeline(
            prompt,
            height=size.height,
            width=size.width,
            num_frames=size.frames,
            num_inference_steps=size.steps,
            guidance_scale=size.guidance,
            generator=torch.Generator().manual_seed(seed),
        ).frames[0]
        clips.append(np.rint(frames * 255).astype(np.uint8))
        on_clip(seed, prompt, clips[-1], time.monotonic() - start)
    return clips


def contact_sheet(clips: list[np.ndarray], prompts: list[str], path: Path, columns: int = 6) -> None:
    """A PNG with a row a clip: its prompt, and `columns` frames evenly spread over it. Clips may differ in size."""
    from PIL import Image, ImageDraw

    gap, title = 3, 14
    rows = [title + clip.shape[1] + gap for clip in clips]
    sheet = Image.new("RGB", (columns * (max(clip.shape[2] for clip in clips) + gap), sum(rows)), "white")
    draw, tops = ImageDraw.Draw(sheet), np.cumsum([0, *rows[:-1]]).tolist()
    for top, clip, prompt in zip(tops, clips, prompts, strict=True):
        draw.text((2, top + 1), prompt, fill="black")
        for column, frame in enumerate(np.linspace(0, len(clip) - 1, columns).astype(int)):
            sheet.paste(Image.fromarray(clip[frame]), (column * (clip.shape[2] + gap), top + title))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main() -> None:
    from sparsereel.minireel import WEIGHTS
    from sparsereel_eval.judge import Judge, average

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("native", "large"), default="native")
    parser.add_argument("--clips", type=int, default=32, help="clips to generate; the first of a fixed list")
    parser.add_argument("--two", type=float, default=0.0, help="share of prompts with two digits")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="pipeline folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--kernels", action="store_true", help="this project's dense attention: faster, same clips")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet (PNG) here")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    arguments = parser.parse_args()
    size = NATIVE if arguments.size == "native" else LARGE
    prompts = prompts_for(size, arguments.clips, arguments.two)
    judge, scores, seconds = Judge(), [], []

    def on_clip(seed: int, prompt: str, clip: np.ndarray, elapsed: float) -> None:
        scores.append(judge.score(clip, prompt))
        seconds.append(elapsed)
        missed = ", ".join(name for name, value in scores[-1].to_dict().items() if value is not None and value < 0.9)
        print(f"{seed:3d}  {elapsed:6.1f} s  {prompt}  {'missed: ' + missed if missed else 'sound'}", flush=True)

    clips = generate(
        arguments.weights, size, prompts, getattr(torch, arguments.dtype), on_clip, kernels=arguments.kernels
    )
    summary = {"size": arguments.size, "clips": len(clips), "seconds": float(np.median(seconds)), **average(scores)}
    print(
        "  ".join(
            f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in summary.items()
        )
    )
    if arguments.sheet:
        contact_sheet(clips, prompts, arguments.sheet)
    if arguments.json:
        details = [{"prompt": prompt, **score.to_dict()} for prompt, score in zip(prompts, scores, strict=True)]
        arguments.json.write_text(json.dumps(summary | {"details": details}, indent=2) + "\n")


if __name__ == "__main__":
    main()
