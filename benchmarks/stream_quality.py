"""Quality of streams second by second: the part `quality` of stream.py.

Every cache policy makes the same videos with the causal minireel, to a multiple of the trained length, and the judge
says for every second whether it still shows the digit, in its colour, and how often just one. One file a (method,
prompt) is written to `--work`, so that a run that was stopped goes on where it was; tables and pictures are made of the
prompts that all methods have finished.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

import sparsereel
from sparsereel import minireel
from sparsereel.files import write_json
from sparsereel.media import Frames

#: name -> (what it is, arguments of `stream`; window="all" is the length of the video)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "deep-forcing": ("deep sink, realigned; participation", {"method": "deep-forcing"}),
    "rolling-sink": ("sink of a chunk, directly before the window", {"method": "streaming-llm"}),
    "rolling-forcing": ("the same, chunks denoised jointly", {"method": "rolling-forcing"}),
    "longlive": ("frame sink at its absolute position", {"method": "longlive"}),
    "sliding-window": ("no sink", {"method": "self-forcing"}),
    "absolute": ("nothing evicted, absolute positions", {"method": "self-forcing", "window": "all"}),
}
PROMPTS = (
    "a red 3 moving right on navy",
    "a cyan 6 moving left on black",
    "a green 7 moving up on grey",
    "a yellow 0 moving down on maroon",
    "a white 5 moving left on navy",
    "an orange 8 moving right on black",
)
SCORES = ("digit", "colour", "count", "background")
FPS = 16
TEN_POINTS = 0.10
PICTURES = Path(__file__).parents[1] / "docs" / "images"
_MARKS = re.compile(r"(<!-- stream quality: made by benchmarks/stream.py -->\n).*?(<!-- end -->)", re.DOTALL)


def quality_part(given: argparse.Namespace) -> dict[str, Any]:
    """Make what is missing, then the tables of what is there.

    Raises:
        ValueError: an unknown method, more prompts than there are, or --docs without marks for the table.
    """
    names = given.methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown or not 1 <= given.prompts <= len(PROMPTS):
        raise ValueError(
            f"quality knows the methods {', '.join(METHODS)} and 1 to {len(PROMPTS)} prompts, got "
            f"{', '.join(unknown) or given.prompts}"
        )
    seconds = max(2, round(given.times * minireel.NATIVE.frames / FPS))
    given.work.mkdir(parents=True, exist_ok=True)
    complete = make_missing(given, names, seconds)
    runs = {name: _stored(given, name, seconds) for name in names}
    shared = set.intersection(*(set(found) for found in runs.values()))
    result: dict[str, Any] = {"steps": given.steps, "seconds": seconds, "complete": complete, "methods": {}}
    result["prompts"] = [PROMPTS[number] for number in sorted(shared)]
    if not shared:
        print("no prompt is finished with all methods yet; run the same command again")
        return result
    for name in names:
        result["methods"][name] = _summary([runs[name][number] for number in sorted(shared)])
    print("\n".join(table(result)))
    pictures = PICTURES if given.docs else given.work
    curves(result, pictures / "stream-quality.png")
    sheet(given.work, names, sorted(shared)[:2], pictures / "stream-quality-sheet.png")
    if given.docs:
        put_table(given.docs, result)
    return result


def make_missing(given: argparse.Namespace, names: list[str], seconds: int) -> bool:
    """Run the (method, prompt) pairs that have no file yet, prompt by prompt; False = some are left."""
    begun = time.monotonic()
    spent: dict[str, float] = {}
    pipe, judge = None, None
    for number in range(given.prompts):
        for name in names:
            known = [run["work_seconds"] for run in _stored(given, name, seconds).values()]
            expected = spent.get(name, mean(known) if known else max(spent.values(), default=0.0))
            if number in _stored(given, name, seconds):
                continue
            if given.minutes is not None and time.monotonic() - begun + expected > 60 * given.minutes:
                print(f"{given.minutes:g} minutes are over; the same command goes on from here")
                return False
            if pipe is None:
                from sparsereel_eval.judge import Judge

                pipe, judge = minireel.load_causal(), Judge()
            run = one_video(pipe, judge, name, number, seconds, given.steps, given.work)
            spent[name] = run["work_seconds"]
            ends = " ".join(f"{score} {run['start'][score]:.2f}-{run['end'][score]:.2f}" for score in SCORES)
            print(f"{name}, {PROMPTS[number]}: {spent[name]:.0f} s, {ends}", flush=True)
    return True


def one_video(pipe: Any, judge: Any, name: str, number: int, seconds: int, steps: int, work: Path) -> dict[str, Any]:
    """Generate and judge one video; writes its scores and a strip of one frame a second."""
    from sparsereel_eval.drift import drift, judge_over_time

    arguments = dict(METHODS[name][1])
    frames = FPS * seconds
    if arguments.get("window") == "all":
        arguments["window"] = -(-(frames - 1) // 4) + 1 + pipe.chunk_frames
    prompt = PROMPTS[number]
    begun = time.monotonic()
    stream = sparsereel.stream(pipe, prompt, frames=frames, steps=steps, seed=number, fps=FPS, **arguments)
    strip: list[np.ndarray] = []

    def frame_by_frame() -> Iterator[np.ndarray]:
        for index, frame in enumerate(frame for chunk in stream for frame in chunk):
            if index % FPS == FPS // 2:
                strip.append(frame)
            yield frame

    windows = judge_over_time(frame_by_frame(), prompt, fps=FPS, judge=judge)
    change = drift(windows)
    run = {
        "method": name,
        "prompt": prompt,
        "seed": number,
        "steps": steps,
        "seconds": seconds,
        "work_seconds": time.monotonic() - begun,
        "start": {score: change[score]["start"] for score in SCORES},
        "end": {score: change[score]["end"] for score in SCORES},
        "by_second": [asdict(window.score) for window in windows],
    }
    _write_png(np.concatenate(strip, axis=1), work / f"{name}-{number}.png")
    write_json(work / f"{name}-{number}.json", run)
    return run


def _stored(given: argparse.Namespace, name: str, seconds: int) -> dict[int, dict[str, Any]]:
    """The finished runs of a method by the number of their prompt; those made with other settings do not count."""
    found = {}
    for number in range(given.prompts):
        path = given.work / f"{name}-{number}.json"
        if path.is_file():
            run = json.loads(path.read_text(encoding="utf-8"))
            if (run["prompt"], run["steps"], run["seconds"]) == (PROMPTS[number], given.steps, seconds):
                found[number] = run
    return found


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over videos: by second, of the first fifth and of the last fifth."""
    count = len(runs[0]["by_second"])
    by_second = {s: [mean(float(run["by_second"][i][s]) for run in runs) for i in range(count)] for s in SCORES}
    ends = {end: {s: mean(run[end][s] for run in runs) for s in SCORES} for end in ("start", "end")}
    # The least: others may have had the machine during some of the runs.
    return {"by_second": by_second, **ends, "work_seconds": min(run["work_seconds"] for run in runs)}


# ------------------------------------------------------------------ tables and pictures


def table(result: dict[str, Any]) -> list[str]:
    """Markdown: each score in the first and the last fifth of the video, in percent."""
    rows = ["| method | cache | " + " | ".join(SCORES) + " | s a video |", "|---" * (len(SCORES) + 3) + "|"]
    for name, found in result["methods"].items():
        cells = [f"{100 * found['start'][s]:.0f} → {100 * found['end'][s]:.0f}" for s in SCORES]
        rows.append(f"| {name} | {METHODS[name][0]} | {' | '.join(cells)} | {found['work_seconds']:.0f} |")
    kept = [
        name
        for name, found in result["methods"].items()
        if all(found["end"][s] >= found["start"][s] - TEN_POINTS - 1e-9 for s in ("digit", "colour"))
    ]
    rows += ["", f"Digit and colour within 10 points of the start at the end: {', '.join(kept) or 'none'}."]
    return rows


def put_table(path: Path, result: dict[str, Any]) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        ValueError: the page has no marks.
    """
    text = path.read_text(encoding="utf-8")
    about = (
        f"{len(result['prompts'])} videos of {result['seconds']} s a method, {result['steps']} steps, guidance "
        f"{minireel.NATIVE.guidance}; first fifth → last fifth of the video, percent:"
    )
    shown = [
        "![Digit, colour and count by second](images/stream-quality.png)",
        "",
        "A frame every two seconds, two prompts:",
        "",
        "![Frames of every method over time](images/stream-quality-sheet.png)",
    ]
    block = "\n".join([about, "", *table(result), "", *shown, ""])
    changed, count = _MARKS.subn(lambda match: match[1] + block + match[2], text)
    if not count:
        raise ValueError(f"{path} has no marks to put the table between")
    path.write_text(changed, encoding="utf-8")


def curves(result: dict[str, Any], path: Path) -> None:
    """Digit, colour and count by second, each the mean over videos and five seconds around."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), sharey=True)
    styles = ("-", "-", "--", "-", "--", ":")
    for axis, score in zip(axes, SCORES[:3], strict=True):
        for (name, found), style in zip(result["methods"].items(), styles * 2, strict=False):
            values = np.array(found["by_second"][score])
            smooth = [values[max(0, i - 2) : i + 3].mean() for i in range(len(values))]
            axis.plot(np.arange(len(values)) + 0.5, smooth, style, label=name)
        axis.axvline(minireel.NATIVE.frames / FPS, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=score, xlabel="second of video", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0].annotate("trained length", (minireel.NATIVE.frames / FPS + 0.2, 0.02), fontsize=8)
    axes[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.08))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def sheet(work: Path, names: list[str], numbers: list[int], path: Path) -> None:
    """A row a method and prompt, a frame every two seconds."""
    from PIL import Image, ImageDraw

    strips = [(name, Image.open(work / f"{name}-{number}.png")) for number in numbers for name in names]
    side = strips[0][1].height
    columns = list(range(0, strips[0][1].width // side, 2))
    label, line = 96, 2
    canvas = Image.new("RGB", (label + len(columns) * (side + line), len(strips) * (side + line)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (name, strip) in enumerate(strips):
        draw.text((4, row * (side + line) + side // 2 - 5), name, fill="black")
        for place, column in enumerate(columns):
            tile = strip.crop((column * side, 0, (column + 1) * side, side))
            canvas.paste(tile, (label + place * (side + line), row * (side + line)))
    canvas.save(path)


def _write_png(picture: Frames, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path)
