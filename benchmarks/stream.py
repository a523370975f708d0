"""Streaming: memory and time over thousands of latent frames, cached against recomputed, and quality second by second.

    python benchmarks/stream.py                                # memory, time and ratio: minutes on an idle machine
    python benchmarks/stream.py --parts quality --prompts 2    # to ten times the trained length; long

* memory: a stream of 100 and one of `--frames` latent frames, each in a process of its own: peak resident memory and
  the seconds of every chunk, with a straight line fitted through them; 16 x 16 pixels, so that it is over soon.
* ratio: the same chunks at the native size with a cache, and with the window recomputed in every pass.
* quality: minireel-causal, judged second by second by `sparsereel_eval.judge`.

Output: tables, JSON, and with --plot a PNG of memory and time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

import sparsereel
from sparsereel import minireel
from sparsereel.files import write_json
from sparsereel.generation import environment
from sparsereel.stream.vitals import memory, peak_memory

METHODS = "self-forcing,streaming-llm,longlive,deep-forcing,rolling-forcing"
PROMPTS = ("a red 3 moving right on navy", "a cyan 6 moving left on black", "a green 7 moving up on grey")
TRAINED_SECONDS = minireel.NATIVE.frames / 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default="memory,ratio", help="memory, ratio, quality")
    parser.add_argument("--frames", type=int, default=2000, help="latent frames of the long stream")
    parser.add_argument("--methods", default=METHODS, help="of quality")
    parser.add_argument("--prompts", type=int, default=2, help="of quality, at most three")
    parser.add_argument("--times", type=float, default=10, help="of quality: trained lengths to go")
    parser.add_argument("--steps", type=int, default=10, help="of quality and ratio")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/stream.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.child:
        print(json.dumps(one_stream(given.child)))
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
    runs = {}
    for frames in (100, given.frames):
        command = [sys.executable, __file__, "--child", str(frames), "--threads", str(given.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs[str(frames)] = json.loads(done.stdout.splitlines()[-1])
    short, long = runs["100"], runs[str(given.frames)]
    seconds = np.array(long["chunk_seconds"][5:])
    (slope, _), covariance = np.polyfit(np.arange(len(seconds)), seconds, 1, cov=True)
    result = {
        "runs": runs,
        "peak_ratio": long["peak"] / short["peak"],
        "slope_seconds_a_chunk": slope,
        "slope_error": float(covariance[0, 0] ** 0.5),
        "growth_over_the_run": slope * len(seconds) / float(np.median(seconds)),
        "first_half_median": median(long["chunk_seconds"][5 : len(seconds) // 2]),
        "second_half_median": median(long["chunk_seconds"][len(seconds) // 2 :]),
    }
    print(
        f"peak memory, 100 latent frames: {short['peak'] / 2**20:.1f} MiB; {given.frames}: {long['peak'] / 2**20:.1f}"
    )
    print(f"ratio {result['peak_ratio']:.4f}")
    halves = (1000 * result[f"{name}_half_median"] for name in ("first", "second"))
    print("chunk, median ms: first half {:.1f}, second half {:.1f}".format(*halves))
    print(f"slope {1e6 * slope:.2f} +- {1e6 * result['slope_error']:.2f} us a chunk")
    return result


def one_stream(frames: int) -> dict[str, Any]:
    """A stream of so many latent frames of 16 x 16 pixels, decoded; frames are thrown away."""
    pipe = minireel.load_causal()
    stream = sparsereel.stream(
        pipe, PROMPTS[0], frames=4 * frames - 3, height=16, width=16, steps=2, guidance=1.0, method="streaming-llm"
    )
    seconds, resident = [], []
    before = time.perf_counter()
    for _ in stream:
        now = time.perf_counter()
        seconds.append(now - before)
        resident.append(memory())
        before = now
    return {"peak": peak_memory(), "chunk_seconds": seconds, "resident": resident}


def plot(found: dict[str, Any], path: Path) -> None:
    """Memory and time a chunk over the long run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    long = max(found["runs"].values(), key=lambda run: len(run["chunk_seconds"]))
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True)
    frames = 3 * np.arange(1, len(long["resident"]) + 1)
    above.plot(frames, np.array(long["resident"]) / 2**20)
    above.set(ylabel="resident memory, MiB", ylim=(0, None))
    below.plot(frames, 1000 * np.array(long["chunk_seconds"]), ".", markersize=3)
    below.set(ylabel="ms a chunk", xlabel="latent frames", yscale="log")
    for axis in (above, below):
        axis.axvline(1024, color="grey", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.3)
    below.annotate("end of diffusers' rotary table", (1024, 0.05), xycoords=("data", "axes fraction"), fontsize=8)
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


# ------------------------------------------------------------------ quality


def quality_part(given: argparse.Namespace) -> dict[str, Any]:
    """Digit and colour by second, mean over prompts."""
    from sparsereel_eval.judge import Judge

    judge, pipe = Judge(), minireel.load_causal()
    result: dict[str, Any] = {"steps": given.steps, "prompts": list(PROMPTS[: given.prompts]), "methods": {}}
    seconds = round(TRAINED_SECONDS * given.times)
    for method in given.methods.split(","):
        rows: list[list[dict[str, Any]]] = []
        for seed, prompt in enumerate(PROMPTS[: given.prompts]):
            stream = sparsereel.stream(pipe, prompt, seconds=seconds, steps=given.steps, method=method, seed=seed)
            clip = np.concatenate(list(stream))
            rows.append([judge.score(clip[i * 16 : i * 16 + 16], prompt).to_dict() for i in range(seconds)])
        table = {
            name: [mean(float(row[i][name]) for row in rows) for i in range(seconds)]
            for name in ("digit", "colour", "background", "count")
        }
        quarter = max(1, seconds // 4)
        summary = {f"{n} {w}": mean(v[s]) for n, v in table.items() for w, s in _ends(quarter).items()}
        result["methods"][method] = {"by_second": table, **summary}
        print(method, {name: round(value, 2) for name, value in summary.items()}, flush=True)
    return result


def _ends(quarter: int) -> dict[str, slice]:
    return {"first quarter": slice(0, quarter), "last quarter": slice(-quarter, None)}


if __name__ == "__main__":
    main()
