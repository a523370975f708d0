"""Streaming: memory and time over thousands of latent frames, cached against recomputed, and quality second by second.

    python benchmarks/stream.py --parts memory --plot docs/images/stream-memory.png
    python benchmarks/stream.py --parts ratio --steps 4
    python benchmarks/stream.py --parts quality --minutes 30     # again until it says that all runs are there

* memory: a stream of 100 and one of `--frames` latent frames, each in a process of its own: peak resident memory and
  the seconds of every chunk, with a straight line fitted through them, and the same before and after 1,024 latent
  frames, where diffusers' rotary table ends. A machine that slows down while the stream runs would look like a stream
  that does: so the long stream then goes on in turns with one that has just begun, chunk by chunk.
* ratio: the same chunks at the native size with a cache, and with the window recomputed in every pass.
* quality: minireel-causal, judged second by second; see stream_quality.py.

Output: tables, JSON, and with --plot a PNG of memory and time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from stream_quality import METHODS, PROMPTS, quality_part

import sparsereel
from sparsereel import minireel
from sparsereel.files import write_json
from sparsereel.generation import environment
from sparsereel.stream.vitals import memory, peak_memory

TABLE_END = 1024  # latent frames in diffusers' rotary table
WARM_UP = 5  # chunks until the window is full
SHORT_RUNS = 3  # of 100 latent frames
TURNS = 60  # chunks of the old stream and of the new one


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default="memory,ratio", help="memory, ratio, quality")
    parser.add_argument("--frames", type=int, default=2000, help="latent frames of the long stream")
    parser.add_argument("--pixels", type=int, default=64, help="of memory: height and width")
    parser.add_argument("--methods", default=",".join(METHODS), help="of quality")
    parser.add_argument("--prompts", type=int, default=4, help=f"of quality, at most {len(PROMPTS)}")
    parser.add_argument("--times", type=float, default=10, help="of quality: trained lengths to go")
    parser.add_argument("--minutes", type=float, help="of quality: begin no run that would end later")
    parser.add_argument("--work", type=Path, default=Path("out/stream-quality"), help="of quality: one file a run")
    parser.add_argument("--docs", type=Path, help="of quality: put table and pictures into this page")
    parser.add_argument("--steps", type=int, default=10, help="of quality and ratio")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/stream.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.child:
        print(json.dumps(one_stream(given.child, given.pixels)))
        return
    result: dict[str, Any] = json.loads(given.json.read_text()) if given.json.is_file() else {}
    result |= {"environment": environment(), "load_average": os.getloadavg()}
    for part in given.parts.split(","):
        result[part] = {"memory": memory_part, "ratio": ratio_part, "quality": quality_part}[part](given)
        write_json(given.json, result)
    if given.plot and "memory" in result:
        plot(result["memory"], given.plot)
    print(f"load average {os.getloadavg()[0]:.1f}; wrote {given.json}")


# ------------------------------------------------------------------ memory


def memory_part(given: argparse.Namespace) -> dict[str, Any]:
    shorts = [in_a_process(100, given) for _ in range(SHORT_RUNS)]
    # The same run's peak differs by a few percent from process to process, with the heap's layout.
    short = sorted(shorts, key=lambda run: run["peak"])[SHORT_RUNS // 2]
    long = in_a_process(given.frames, given)
    runs = {"100": short, str(given.frames): long}
    seconds = np.array(long["chunk_seconds"][WARM_UP:])
    # The medians of ten chunks each: one that waited for another program would bend the line.
    tens = np.median(seconds[: len(seconds) // 10 * 10].reshape(-1, 10), axis=1)
    (slope, _), covariance = np.polyfit(10 * np.arange(len(tens)), tens, 1, cov=True)
    result: dict[str, Any] = {
        "pixels": given.pixels,
        "runs": runs,
        "short_peaks": [run["peak"] for run in shorts],
        "peak_ratio": long["peak"] / short["peak"],
        "grown_ratio": (long["peak"] - long["loaded"]) / (short["peak"] - short["loaded"]),
        "slope_seconds_a_chunk": slope,
        "slope_error": float(covariance[0, 0] ** 0.5),
        "growth_over_the_run": slope * len(seconds) / float(np.median(seconds)),
    }
    for name, run in (("100", short), (str(given.frames), long)):
        above = (run["peak"] - run["loaded"]) / 2**20
        print(f"{name} latent frames: peak {run['peak'] / 2**20:.1f} MiB, {above:.1f} above the loaded pipeline")
    peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in sorted(result["short_peaks"]))
    print(
        f"ratio of the peaks {result['peak_ratio']:.4f} (100 latent frames {SHORT_RUNS} times: {peaks} MiB; the middle)"
    )
    print(
        f"slope {1e6 * slope:.1f} +- {1e6 * result['slope_error']:.1f} us a chunk of "
        f"{1e3 * float(np.median(seconds)):.1f} ms; over the whole run {100 * result['growth_over_the_run']:+.2f}%"
    )
    if "turns" in long:
        result["old_to_new"] = old_to_new(long["turns"])
        low, middle, high = result["old_to_new"]
        print(
            f"in turns, after {given.frames} latent frames / just begun: {middle:.3f} of the time a chunk "
            f"(95 % of resampled runs: {low:.3f} to {high:.3f})"
        )
    edge = TABLE_END // 3
    if len(long["chunk_seconds"]) > edge + WARM_UP:
        halves = {"before": slice(WARM_UP, edge), "after": slice(edge + 1, None)}
        for name, part in halves.items():
            found = {"chunk_seconds": median(long["chunk_seconds"][part]), "resident": median(long["resident"][part])}
            found |= {"brightness": median(long["mean"][part]), "contrast": median(long["deviation"][part])}
            result[f"{name}_1024"] = found
            print(
                f"{name} 1,024 latent frames: {1e3 * found['chunk_seconds']:.1f} ms a chunk, "
                f"{found['resident'] / 2**20:.1f} MiB, pixels {found['brightness']:.1f} +- {found['contrast']:.1f}"
            )
    return result


def in_a_process(frames: int, given: argparse.Namespace) -> dict[str, Any]:
    print(f"{frames} latent frames:", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--child", str(frames), "--threads", str(given.threads)]
    command += ["--pixels", str(given.pixels)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def old_to_new(turns: dict[str, list[float]]) -> tuple[float, float, float]:
    """2.5 %, median and 97.5 % of the ratio of the medians over resampled turns."""
    old, new = np.array(turns["old"]), np.array(turns["new"])
    picks = np.random.default_rng(0).integers(0, len(old), (2000, len(old)))
    ratios = np.median(old[picks], axis=1) / np.median(new[picks], axis=1)
    low, middle, high = np.quantile(ratios, (0.025, 0.5, 0.975))
    return float(low), float(middle), float(high)


def one_stream(frames: int, pixels: int) -> dict[str, Any]:
    """A stream of so many latent frames, decoded; frames are thrown away."""
    pipe = minireel.load_causal()

    def begin() -> Iterator[Any]:
        size = {"height": pixels, "width": pixels}
        return sparsereel.stream(pipe, PROMPTS[0], steps=2, guidance=1.0, method="streaming-llm", **size)

    stream = begin()
    found: dict[str, Any] = {"loaded": memory(), "chunk_seconds": [], "resident": [], "mean": [], "deviation": []}
    begun = before = time.perf_counter()
    for number, made in enumerate(islice(stream, frames // pipe.chunk_frames), start=1):
        now = time.perf_counter()
        found["chunk_seconds"].append(now - before)
        found["resident"].append(memory())
        found["mean"].append(float(made.mean()))
        found["deviation"].append(float(made.std()))
        if number % 50 == 0:
            left = (now - begun) / number * (frames / pipe.chunk_frames - number)
            state = f"{pipe.chunk_frames * number} of {frames} latent frames, {memory() / 2**20:.0f} MiB"
            print(f"  {state}, {left:.0f} s left", file=sys.stderr, flush=True)
        before = time.perf_counter()
    found["peak"] = peak_memory()
    if frames > TABLE_END:
        streams, turns = {"old": stream, "new": begin()}, {"old": [], "new": []}
        for _ in range(WARM_UP):
            next(streams["new"])
        for _ in range(TURNS):
            for name, one in streams.items():
                before = time.perf_counter()
                next(one)
                turns[name].append(time.perf_counter() - before)
        found["turns"] = turns
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Memory and time a chunk over the long run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    long = max(found["runs"].values(), key=lambda run: len(run["chunk_seconds"]))
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True)
    frames = 3 * np.arange(1, len(long["resident"]) + 1)
    above.plot(frames, np.array(long["resident"]) / 2**20)
    above.set(ylabel="resident memory, MiB", ylim=(0, 1.2 * found["runs"]["100"]["peak"] / 2**20))
    below.plot(frames, 1000 * np.array(long["chunk_seconds"]), ".", markersize=3)
    below.set(ylabel="ms a chunk", xlabel="latent frames", ylim=(0, 4e3 * median(long["chunk_seconds"])))
    for axis in (above, below):
        if frames[-1] > TABLE_END:
            axis.axvline(TABLE_END, color="grey", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.3)
    if frames[-1] > TABLE_END:
        below.annotate(
            "end of diffusers' rotary table", (TABLE_END + 10, 0.05), xycoords=("data", "axes fraction"), fontsize=8
        )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------ ratio


def ratio_part(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a chunk in a full window, without decoding."""
    pipe = minireel.load_causal()
    ways = {
        "cached": {"method": "streaming-llm"},
        "recomputed": {"method": "diffusion-forcing", "chunk": pipe.chunk_frames, "lag": given.steps},
    }
    result: dict[str, Any] = {"steps": given.steps, "window": pipe.window_frames, "chunk": pipe.chunk_frames}
    streams = {
        name: sparsereel.stream(
            pipe, PROMPTS[0], steps=given.steps, window=pipe.window_frames, output="latents", **arguments
        )
        for name, arguments in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(6):
        # In turns, so that whatever else the machine does meets both.
        for name, stream in streams.items():
            before = time.perf_counter()
            next(stream)
            if number > 2:
                seconds[name].append(time.perf_counter() - before)
    for name, values in seconds.items():
        result[name] = median(values)
        print(f"{name}: {result[name]:.2f} s a chunk of {pipe.chunk_frames} latent frames")
    result["ratio"] = result["recomputed"] / result["cached"]
    print(f"cached is {result['ratio']:.2f} times faster at a window of {pipe.window_frames} latent frames")
    return result


if __name__ == "__main__":
    main()
