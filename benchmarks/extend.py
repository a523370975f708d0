"""Clips of minireel longer or larger than its native size, method by method, scored by the judge.

    python benchmarks/extend.py --clips 2 --steps 8 --frames 2,4 --methods native,plain,window,freenoise,ultravico
    python benchmarks/extend.py --clips 2 --steps 8 --side 2,3 --methods native,plain,window,yarn,demofusion

Prompts and seeds are the same for every method; `native` are clips of the native size, for comparison. Results are
written after every clip, and a run that was interrupted, or is called with more methods, ratios or clips, goes on where
it stopped. Scores are the judge's, and

    loop      how nearly the clip comes back to where it was (autocorrelation of frames)
    sharp     mean gradient at the digit's edge over that of the native clip of the same prompt

Output: a table for each size, and with --picture a PNG of it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

import sparsereel
from sparsereel import minireel
from sparsereel.extend.loops import loop_score
from sparsereel.files import write_json
from sparsereel.generation import environment
from sparsereel.minireel.scorecard import prompts_for
from sparsereel_eval.judge import Judge, JudgeScore, average

COLUMNS = ("sound", "digit", "colour", "background", "direction", "count", "smoothness")
EXTRA = ("loop", "sharp", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=4, help="prompts; the first of the scorecard's list")
    parser.add_argument("--frames", default="", help="ratios of the native length, comma-separated")
    parser.add_argument("--side", default="", help="ratios of the native height and width, comma-separated")
    parser.add_argument("--methods", default="native,plain,window,freenoise,ultravico", help="comma-separated")
    parser.add_argument("--steps", type=int, default=minireel.NATIVE.steps)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="many CPUs are slower in bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no clip after so many")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/extend.json"))
    parser.add_argument("--picture", type=Path, help="write the tables as a PNG here")
    parser.add_argument("--sheet", type=Path, help="write frames of all clips of this run as a PNG here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = [("frames", float(r)) for r in given.frames.split(",") if r]
    sizes += [("side", float(r)) for r in given.side.split(",") if r]
    settings = {"steps": given.steps, "dtype": given.dtype}
    result = _earlier(given.json, settings) or {**settings, "environment": environment(), "clips": []}
    if sizes:
        _run(given, sizes, result)
    for axis, ratio in dict.fromkeys((clip["axis"], clip["ratio"]) for clip in result["clips"] if clip["axis"]):
        _print(result["clips"], axis, ratio)
    if given.picture:
        _draw(result["clips"], given.picture)


def _run(given: argparse.Namespace, sizes: list[tuple[str, float]], result: dict[str, Any]) -> None:
    pipe = minireel.load(torch.float32 if given.dtype == "fp32" else torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    judge, shown, start = Judge(), [], time.monotonic()
    # Clip by clip, so that an interrupted run has seen every method equally often.
    for seed, prompt in enumerate(prompts_for(minireel.NATIVE, given.clips, two=0.0)):
        jobs = [(axis, ratio, m) for axis, ratio in sizes for m in given.methods.split(",") if m != "native"]
        for axis, ratio, method in [("", 1.0, "native"), *jobs]:
            key = (axis, ratio, method, seed)
            done = any((c["axis"], c["ratio"], c["method"], c["seed"]) == key for c in result["clips"])
            if done or time.monotonic() - start > 60 * given.minutes:
                continue
            video, seconds, note = _clip(pipe, axis, ratio, method, prompt, seed, given.steps)
            row = {"axis": axis, "ratio": ratio, "method": method, "seed": seed, "prompt": prompt, "note": note}
            row |= {"loop": loop_score(video, minireel.NATIVE.frames // 2), "edge": _edge(video), "seconds": seconds}
            row |= {"load": round(os.getloadavg()[0], 1)}
            result["clips"].append({**row, **judge.score(video, prompt).to_dict()})
            write_json(given.json, result)
            shown.append((f"{method} {axis} {ratio:g}: {prompt}", video))
            if given.sheet:
                from sparsereel.minireel.scorecard import contact_sheet

                contact_sheet([v for _, v in shown], [t for t, _ in shown], given.sheet, columns=10)
            print(f"{axis or 'native':7s} {ratio:g}  {method:15s} {seconds:6.1f} s  {prompt}  {note}", flush=True)


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if any(found.get(key) != value for key, value in settings.items()):
        raise SystemExit(f"{path} holds other settings; name another file with --json")
    return found


def _clip(
    pipe: Any, axis: str, ratio: float, method: str, prompt: str, seed: int, steps: int
) -> tuple[np.ndarray, float, str]:
    arguments: dict[str, int] = {}
    note = ""
    if method != "native":
        size = {"frames": ratio} if axis == "frames" else {"height": ratio, "width": ratio}
        # "dense" plans are none; "radial:window" is the method window under the plan radial.
        plan, _, name = method.rpartition(":")
        report = sparsereel.extend(pipe, **size, method=name, plan=plan or None)
        arguments, note = report.arguments, "; ".join(report.notes)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    frames = pipe(prompt, num_inference_steps=steps, generator=generator, **arguments).frames[0]
    seconds = time.perf_counter() - start
    sparsereel.restore(pipe)
    return np.rint(frames * 255).astype(np.uint8), seconds, note


def _edge(video: np.ndarray) -> float:
    """Steepest colour change between neighbouring pixels, the mean over frames of the highest percent."""
    grey = video.astype(np.float64)
    steps = np.abs(np.diff(grey, axis=2)).sum(-1).reshape(len(video), -1)
    count = max(1, round(0.002 * steps.shape[1]))
    return float(np.sort(steps, axis=1)[:, -count:].mean())


def _summary(clips: list[dict[str, Any]], axis: str, ratio: float) -> dict[str, dict[str, float]]:
    """Means by method, native first; a method's `sharp` is over native clips of the same prompts."""
    names = list(JudgeScore.__dataclass_fields__)
    native = {clip["seed"]: clip for clip in clips if clip["method"] == "native"}
    table = {}
    here = [clip for clip in clips if (clip["axis"], clip["ratio"]) == (axis, ratio)]
    for method in ["native", *dict.fromkeys(clip["method"] for clip in here)]:
        mine = [clip for clip in (native.values() if method == "native" else here) if clip["method"] == method]
        if not mine:
            continue
        row = average([JudgeScore(**{name: clip[name] for name in names}) for clip in mine])
        row["clips"] = len(mine)
        row["loop"] = mean(clip["loop"] for clip in mine)
        row["sharp"] = mean(clip["edge"] / native[clip["seed"]]["edge"] for clip in mine)
        row["seconds"] = median(clip["seconds"] for clip in mine)
        table[method] = row
    return table


def _print(clips: list[dict[str, Any]], axis: str, ratio: float) -> None:
    print(f"\n{axis} {ratio:g}x\n{'method':16s} clips  " + "  ".join(COLUMNS + EXTRA))
    for method, row in _summary(clips, axis, ratio).items():
        scores = "  ".join(f"{row.get(name, float('nan')):{len(name)}.2f}" for name in COLUMNS + EXTRA)
        print(f"{method:16s} {row['clips']:5d}  {scores}")


def _draw(clips: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys((clip["axis"], clip["ratio"]) for clip in clips if clip["axis"]))
    shown = ("digit", "colour", "direction", "count", "smoothness", "loop", "sharp")
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.6 * len(sizes), 4.4), squeeze=False, layout="constrained")
    for place, (axis, ratio) in zip(axes[0], sizes, strict=True):
        table = _summary(clips, axis, ratio)
        values = np.array([[row.get(name, np.nan) for name in shown] for row in table.values()])
        place.imshow(np.clip(values, 0, 1), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        place.set_xticks(range(len(shown)), shown, rotation=40, ha="right")
        place.set_yticks(range(len(table)), [f"{name} ({row['clips']})" for name, row in table.items()])
        place.set_title(f"{ratio:g} x the {'length' if axis == 'frames' else 'side'}")
        for (row, column), value in np.ndenumerate(values):
            place.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
