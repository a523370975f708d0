"""ministill's pictures at its own side and at larger ones, method by method, scored by the judge of still pictures.

    python benchmarks/hidiffusion.py --pictures 24 --ratios 2,4 --sheet docs/images/hidiffusion.png

Prompts and seeds are the same for every method and side. Methods: "plain" (the stock pipeline called at the larger
side), any that `sparsereel extend` has for U-Nets, the two halves of HiDiffusion ("raunet", "windows"), and HiDiffusion
with other shares of the steps ("t1=0.7", "t1=0.9+t2=0.5"). A run that was interrupted, or is called with more methods,
ratios or pictures, goes on where it stopped.

The judge sees every picture brought down to the native 64 pixels, so one large digit is as good as one small; a sound
picture shows the right digit, colour and background, and one digit only.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import sparsereel
from sparsereel import ministill
from sparsereel.extend.hidiffusion import HiDiffusion
from sparsereel.extend.recipes import Recipe
from sparsereel.files import write_json
from sparsereel.generation import environment
from sparsereel_eval.stills import StillJudge, StillScore, average, sample_still

PROMPT_SEED = 1000
COLUMNS = ("sound", "digit", "colour", "background", "count", "blobs")
HALVES = {"raunet": HiDiffusion(windows=False), "windows": HiDiffusion(raunet=False)}
#: pixels of a picture in the sheet
CELL = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=int, default=24, help="prompts; the first of a fixed list")
    parser.add_argument("--ratios", default="2,4", help="larger sides over the native one, comma-separated")
    parser.add_argument("--methods", default="plain,hidiffusion", help="comma-separated")
    parser.add_argument("--steps", type=int, default=int(ministill.CALL["num_inference_steps"]))
    parser.add_argument("--guidance", type=float, default=ministill.CALL["guidance_scale"])
    parser.add_argument("--weights", type=Path, default=ministill.WEIGHTS, help="pipeline folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no picture after so many")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/hidiffusion.json"))
    parser.add_argument("--sheet", type=Path, help="write the first pictures of this run as a PNG here")
    parser.add_argument("--rows", type=int, default=6, help="prompts in the sheet")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = {"steps": given.steps, "guidance": given.guidance}
    result = _earlier(given.json, settings) or {**settings, "environment": environment(), "pictures": []}
    _run(given, result)
    _print(result["pictures"])


def prompts_for(count: int) -> list[str]:
    """The first `count` prompts of a fixed list."""
    rng = np.random.default_rng(PROMPT_SEED)
    return [sample_still(rng, ministill.SIDE).prompt for _ in range(count)]


def _run(given: argparse.Namespace, result: dict[str, Any]) -> None:
    pipe = ministill.load(weights=given.weights)
    pipe.set_progress_bar_config(disable=True)
    judge, shown, start = StillJudge(), {}, time.monotonic()
    ratios = [float(ratio) for ratio in given.ratios.split(",") if ratio]
    jobs = [(1.0, "native"), *((ratio, method) for ratio in ratios for method in given.methods.split(","))]
    # Picture by picture, so that an interrupted run has seen every method equally often.
    for seed, prompt in enumerate(prompts_for(given.pictures)):
        for ratio, method in jobs:
            done = {(p["ratio"], p["method"], p["seed"]) for p in result["pictures"]}
            wanted = given.sheet is not None and seed < given.rows
            late = time.monotonic() - start > 60 * given.minutes
            if ((ratio, method, seed) in done and not wanted) or late:
                continue
            picture, seconds = _picture(pipe, ratio, method, prompt, seed, given)
            if wanted:
                shown[seed, ratio, method] = picture
            if (ratio, method, seed) not in done:
                row = {"ratio": ratio, "method": method, "seed": seed, "prompt": prompt, "seconds": seconds}
                score = judge.score(picture, prompt, ministill.SIDE).to_dict()
                result["pictures"].append({**row, "load": round(os.getloadavg()[0], 1), **score})
                write_json(given.json, result)
                print(f"{ratio:g}x  {method:12s} {seconds:6.1f} s  {prompt}  blobs {score['blobs']}", flush=True)
    if given.sheet:
        _draw(shown, jobs, given.sheet)


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if any(found.get(key) != value for key, value in settings.items()):
        raise SystemExit(f"{path} holds other settings; name another file with --json")
    return found


def _picture(
    pipe: Any, ratio: float, method: str, prompt: str, seed: int, given: argparse.Namespace
) -> tuple[np.ndarray, float]:
    """One picture (H, W, 3) uint8 and its seconds; the pipeline is left as it was."""
    side = round(ratio * ministill.SIDE)
    if method not in ("native", "plain"):
        sparsereel.extend(pipe, height=side, width=side, method=_recipe(method))
    start = time.perf_counter()
    found = pipe(
        prompt,
        height=side,
        width=side,
        num_inference_steps=given.steps,
        guidance_scale=given.guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    seconds = time.perf_counter() - start
    sparsereel.restore(pipe)
    return np.rint(found * 255).astype(np.uint8), seconds


def _recipe(method: str) -> str | Recipe:
    if method in HALVES:
        return Recipe(unet=HALVES[method])
    if method.startswith("t1="):
        shares = dict(part.split("=") for part in method.split("+"))
        return Recipe(unet=HiDiffusion(**{name: float(share) for name, share in shares.items()}))
    return method


def _print(pictures: list[dict[str, Any]]) -> None:
    print(f"\n{'':17s} pictures  " + "  ".join(COLUMNS) + "  seconds")
    for ratio, method in sorted(dict.fromkeys((p["ratio"], p["method"]) for p in pictures), key=lambda key: key[0]):
        mine = [p for p in pictures if (p["ratio"], p["method"]) == (ratio, method)]
        row = average([StillScore(**{name: p[name] for name in StillScore.__dataclass_fields__}) for p in mine])
        scores = "  ".join(f"{row[name]:{len(name)}.2f}" for name in COLUMNS)
        print(f"{ratio:g}x {method:14s} {len(mine):8d}  {scores}  {median(p['seconds'] for p in mine):7.1f}")


def _draw(shown: dict[tuple[int, float, str], np.ndarray], jobs: list[tuple[float, str]], path: Path) -> None:
    """A row a prompt, a column a method and side; every picture scaled to the same cell."""
    from PIL import Image, ImageDraw

    seeds = sorted({seed for seed, _, _ in shown})
    prompts = prompts_for(max(seeds) + 1)
    gap, title = 4, 16
    sheet = Image.new("RGB", (len(jobs) * (CELL + gap), title + len(seeds) * (title + CELL + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (ratio, method) in enumerate(jobs):
        draw.text((column * (CELL + gap) + 2, 2), f"{round(ratio * ministill.SIDE)} px {method}", fill="black")
    for row, seed in enumerate(seeds):
        top = title + row * (title + CELL + gap)
        draw.text((2, top + 2), f"{prompts[seed]}, seed {seed}", fill="black")
        for column, (ratio, method) in enumerate(jobs):
            if (picture := shown.get((seed, ratio, method))) is not None:
                cell = Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.BOX)
                sheet.paste(cell, (column * (CELL + gap), top + title))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main()
