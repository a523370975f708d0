"""Clips of minireel longer than any it was trained on, method by method, scored by the judge.

    python benchmarks/extend.py --clips 4 --ratio 2 --methods plain,riflex,ultravico --json extend.json

Prompts and seeds are the same for every method. `native` are clips of the trained length, for comparison. Results are
written after every clip, and a run that was interrupted goes on where it stopped. Output:

    method      clips  sound  digit  colour  background  direction  count  smoothness  seconds
    plain           3   1.00   1.00    1.00        1.00       1.00   0.95        0.83    108.3
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import sparsereel
from sparsereel import minireel
from sparsereel.files import write_json
from sparsereel.generation import environment
from sparsereel.minireel.scorecard import prompts_for
from sparsereel_eval.judge import Judge, JudgeScore, average

COLUMNS = ("sound", "digit", "colour", "background", "direction", "count", "smoothness")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=4, help="prompts; the first of the scorecard's list")
    parser.add_argument("--ratio", type=float, default=2.0, help="of the trained length")
    parser.add_argument("--methods", default="native,plain,riflex,ultravico", help="comma-separated")
    parser.add_argument("--steps", type=int, default=minireel.NATIVE.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("extend.json"))
    parser.add_argument("--sheet", type=Path, help="also write the frames of all clips of this run as a PNG here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = {"ratio": given.ratio, "steps": given.steps, "dtype": "bfloat16"}
    result = _earlier(given.json, settings) or {**settings, "environment": environment(), "clips": []}
    prompts = prompts_for(minireel.NATIVE, given.clips, two=0.0)
    pipe = minireel.load(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge()
    videos: list[np.ndarray] = []
    titles: list[str] = []
    # Clip by clip, so that an interrupted run has seen every method equally often.
    for seed, prompt in enumerate(prompts):
        for method in given.methods.split(","):
            if any((clip["method"], clip["seed"]) == (method, seed) for clip in result["clips"]):
                continue
            video, seconds, note = _clip(pipe, method, prompt, seed, given.ratio, given.steps)
            score = judge.score(video, prompt).to_dict()
            result["clips"].append(
                {"method": method, "seed": seed, "prompt": prompt, "seconds": seconds, "note": note, **score}
            )
            write_json(given.json, result)
            videos.append(video)
            titles.append(f"{method}: {prompt}")
            if given.sheet:
                from sparsereel.minireel.scorecard import contact_sheet

                contact_sheet(videos, titles, given.sheet, columns=10)
            print(f"{method:10s} {seconds:6.1f} s  {prompt}  {note}", flush=True)
    _print(result["clips"])


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if any(found.get(key) != value for key, value in settings.items()):
        raise SystemExit(f"{path} holds other settings; name another file with --json")
    return found


def _clip(pipe: Any, method: str, prompt: str, seed: int, ratio: float, steps: int) -> tuple[np.ndarray, float, str]:
    arguments: dict[str, int] = {}
    note = ""
    if method != "native":
        report = sparsereel.extend(pipe, frames=ratio, method=method)
        arguments, note = report.arguments, "; ".join(report.notes)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    frames = pipe(prompt, num_inference_steps=steps, generator=generator, **arguments).frames[0]
    seconds = time.perf_counter() - start
    sparsereel.restore(pipe)
    return np.rint(frames * 255).astype(np.uint8), seconds, note


def _print(clips: list[dict[str, Any]]) -> None:
    print(f"{'method':10s}  clips  " + "  ".join(COLUMNS) + "  seconds")
    names = list(JudgeScore.__dataclass_fields__)
    for method in dict.fromkeys(clip["method"] for clip in clips):
        mine = [clip for clip in clips if clip["method"] == method]
        means = average([JudgeScore(**{name: clip[name] for name in names}) for clip in mine])
        scores = "  ".join(f"{means.get(name, float('nan')):{len(name)}.2f}" for name in COLUMNS)
        print(f"{method:10s}  {len(mine):5d}  {scores}  {median(clip['seconds'] for clip in mine):7.1f}")


if __name__ == "__main__":
    main()
