"""Every pattern, selector and compensation on minireel at matched density: what each keeps and what it costs.

    python benchmarks/methods.py                        # all methods at density 0.2, one clip of 10 steps each
    python benchmarks/methods.py --full                 # densities 0.1, 0.2, 0.4, four clips of 20 steps
    python benchmarks/methods.py --full --clips 1 --steps 10 --minutes 20       # as many rows as 20 minutes allow
    python benchmarks/methods.py --size large --clips 2 --steps 2               # speed at 8,448 tokens
    python benchmarks/methods.py --docs                 # docs/methods.md and its pictures from the results so far

A row is written to benchmarks/results/methods-<size>.json as soon as it is measured; the same command goes on where it
was stopped, and rows that are there are kept, except those of fewer clips and steps. Settings are chosen so that the
blocks visited come nearest to the wanted density: patterns by trying theirs on the grid, selectors by bisection on q
and k of a dense run; `density` is what the sparse calls then had. All rows share the prompts, the seeds and a schedule
that leaves the first tenth of the steps dense (none at the large size, where a few steps show the speed and no more),
in fp32 so that PSNR is not that of rounding. Columns: PSNR and SSIM against the dense clips, the share of judged
features that are right, seconds of a clip, and dense seconds over these.

`searched` is a plan of `sparsereel.search` whose sparse steps have that mean density, `searched_time` one whose
attention is to take that share of the dense seconds; both are found on four other prompts and seeds. At the end every
other row is set beside the best searched plan that spends no more seconds in attention.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import sparsereel
from sparsereel import AttentionPlan, TokenGrid, compensation, minireel, selectors
from sparsereel.compensation import Compensation
from sparsereel.files import write_json
from sparsereel.generation import Clip, Request, environment, generate, load_pipeline
from sparsereel.inject import injection_of, sparsified
from sparsereel.minireel.scorecard import prompts_for
from sparsereel.patterns import (
    Blocked,
    Causal,
    Diagonal,
    Full,
    MultiDiagonal,
    Neighborhood,
    Pattern,
    Radial,
    RandomGlobal,
    Sharded,
    Sink,
    SlidingTile,
    Spatial,
    Temporal,
    VerticalStripe,
)
from sparsereel.plan_entries import Method
from sparsereel.selectors import SelectionContext, Selector
from sparsereel.token_order import BLOCK, GENERAL_TILE, best_mask

RESULTS = Path(__file__).parent / "results"
DENSE_FIRST = 0.1
#: self-attention layers of minireel; settings are matched on one guidance branch
LAYERS = 6
SHARES = [x / 20 for x in range(1, 20)]
Row = dict[str, Any]

#: settings of each pattern to choose from; those that do not see themselves are joined with the own frame
PATTERNS: dict[str, list[Pattern]] = {
    "neighborhood": [Neighborhood((x, y, y)) for x in SHARES for y in SHARES],
    "dilated": [Neighborhood((w, w, w), dilation=(1, d, d)) for w in (1, 3, 5) for d in (2, 3, 4)],
    "sliding_tile": [SlidingTile((x, y, y), (3, 4, 4)) for x in (0.2, 0.6, 1.0) for y in (0.2, 0.6, 1.0)],
    "radial": [Radial(x / 10) for x in range(1, 31)],
    "spatial": [Spatial(n) for n in range(9)],
    "temporal": [Temporal(n) for n in range(12)],
    "sink": [Spatial(0) | Sink(n) for n in range(1, 9)],
    "sink_window": [Neighborhood((x, x, x)) | Sink(n) for x in SHARES[:12] for n in (1, 2)],
    "causal": [Causal(n) for n in range(1, 9)],
    "diagonal": [Diagonal(x) for x in SHARES],
    "multi_diagonal": [MultiDiagonal(x) for x in (0, 1, 2, 4, 8, 16, 32, 64)],
    "vertical_stripe": [Spatial(0) | VerticalStripe(((0.0, x),)) for x in SHARES],
    "blocked": [Blocked((x, y, y)) for x in (0.2, 0.34, 0.5, 1.0) for y in (0.25, 0.34, 0.5, 1.0)],
    "sharded": [Sharded(run=64, local=n, stride=s) for n in (1, 2, 3) for s in (2, 3, 4, 6, 8, 12, 20)],
    "random_global": [RandomGlobal(share=x, run=64) for x in SHARES],
}
#: what turns each selector's knob: a number from 0 (least) to 1 (everything)
SELECTORS: dict[str, Callable[[float], Selector]] = {
    "block_topk": lambda x: selectors.BlockTopk(x),
    "block_topp": lambda x: selectors.BlockTopp(x),
    "spargeattn": lambda x: selectors.Spargeattn(density=x),
    "xattention": lambda x: selectors.Xattention(x),
    "vertical_slash": lambda x: selectors.VerticalSlash(vertical=x, slash=x / 2),
    "svg": lambda x: selectors.Svg(density=x),
    "svg2": lambda x: selectors.Svg2(x, min_density=0.0),
    "vsa": lambda x: selectors.Vsa(x),
    "sparsed": lambda x: selectors.Sparsed(x),
    "adaspa": lambda x: selectors.Adaspa(x),
    "hip": lambda x: selectors.Hip(x, window=64),
    "biformer": lambda x: selectors.Biformer(x, region=64),
    "anchor": lambda x: selectors.Anchor(theta=max(0.0, 10 * x - 4), group=1),
    "dhsa": lambda x: selectors.Dhsa(x),
}
SEARCHED = "searched"
SEARCHED_DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.55)
SEARCHED_TIME = "searched_time"
SEARCHES = (SEARCHED, SEARCHED_TIME)
SEARCHED_SHARES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
RECORDED_PROMPTS = 4
#: compensations are compared on one selector and one pattern
COMPENSATED = ("block_topk", "spatial")
COMPENSATIONS: tuple[Compensation, ...] = (
    compensation.MeanKey(),
    compensation.FlashBias(0.5),
    compensation.FlashBias(1.0),
    compensation.Rectified("gapr"),
    compensation.Rectified("ipar"),
    compensation.Linear(),
    compensation.CachedResidual(),
)


@dataclass(frozen=True)
class Job:
    """One row to measure: a method at a density, with a compensation, or with the first frame kept."""

    name: str
    density: float
    compensation: Compensation | None = None
    keep_sinks: bool = False

    def key(self, options: argparse.Namespace) -> str:
        """What the row is known by."""
        extra = f" + {self.compensation}" if self.compensation else " + first frame" if self.keep_sinks else ""
        return f"{self.name} {self.density:g}{extra}, {options.clips} x {options.steps}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; argparse exits with 2 on wrong use."""
    names = [*PATTERNS, *SELECTORS, *SEARCHES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="densities 0.1, 0.2, 0.4; four clips of 20 steps")
    parser.add_argument("--size", choices=("native", "large"), default="native")
    parser.add_argument("--densities", type=float, nargs="+", default=None)
    parser.add_argument("--clips", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="METHOD", help=", ".join(names))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=None, help="start no row that would end later than this")
    parser.add_argument("--output", type=Path, default=None, help="JSON file of rows (default benchmarks/results/)")
    parser.add_argument("--docs", action="store_true", help="write docs/methods.md from the results and stop")
    options = parser.parse_args(arguments)
    options.densities = options.densities or ([0.1, 0.2, 0.4] if options.full else [0.2])
    options.clips = options.clips or (4 if options.full else 1)
    options.steps = options.steps or (20 if options.full else 10)
    options.output = options.output or RESULTS / f"methods-{options.size}.json"
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    if options.clips < 1 or options.steps < 2 or not all(0 < x <= 1 for x in options.densities):
        parser.error("--clips must be at least 1, --steps at least 2, --densities above 0 and at most 1")
    return options


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """All rows that were asked for: methods, then compensations, then kept sinks."""
    single = [name for name in options.only if name not in SEARCHES]
    rows = [Job(name, density) for density in options.densities for name in single]
    if options.size == "native":
        if SEARCHED in options.only:
            densities = SEARCHED_DENSITIES if options.full else options.densities
            rows = [*(Job(SEARCHED, density) for density in densities), *rows]
        if SEARCHED_TIME in options.only and options.full:
            rows = [*(Job(SEARCHED_TIME, share) for share in SEARCHED_SHARES), *rows]
        chosen = [name for name in COMPENSATED if name in options.only]
        least = min(options.densities)
        rows += [Job(name, least, method) for name in chosen for method in COMPENSATIONS]
        rows += [Job(name, least, keep_sinks=True) for name in single]
    return rows


# ------------------------------------------------------------------ settings of equal density


def pattern_at(name: str, density: float, grid: TokenGrid) -> Pattern:
    """The setting whose mask visits the share of blocks that is nearest to `density`."""

    def off(pattern: Pattern) -> float:
        mask = best_mask(pattern, grid)
        return abs((1.0 if mask is None else mask.density) - density)

    return min(PATTERNS[name], key=off)


class Recording:
    """q and k of every layer at the middle step of a dense run, in the token order that selectors see."""

    def __init__(self, pipe: Any, request: Request) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.grid: TokenGrid | None = None
        middle = (request.steps or 2) // 2

        def see(layer: Any, layout: Any, step: Any, q: Any, k: Any, v: Any, lengths: Any, scale: Any) -> None:
            from sparsereel.families.layout import decode

            grid = self.grid = decode(layout)
            if step is not None and step.index == middle and len(self.calls) < LAYERS:
                index = grid.tile_order(GENERAL_TILE).indices
                self.calls.append((q[:1, :, index].clone(), k[:1, :, index].clone()))

        with sparsified(pipe, Full()):
            injection_of(pipe.transformer).runtime.observer = see
            with torch.inference_mode():
                pipe(request.prompt, output_type="latent", **request.arguments())

    def density(self, selector: Selector) -> float:
        """Mean share of blocks that a selector visits in these calls."""
        assert self.grid is not None
        order = self.grid.tile_order(GENERAL_TILE)
        shares = []
        for layer, (q, k) in enumerate(self.calls):
            context = SelectionContext(self.grid, BLOCK, layer=layer, order=order)
            shares.append(selector(q, k, context).mask.density)
        return statistics.mean(shares)

    def at(self, name: str, density: float) -> Selector:
        """The setting of a selector that visits the share of blocks that is nearest to `density`."""
        low, high = 0.001, 1.0
        best, gap = SELECTORS[name](density), 1.0
        for _ in range(9):
            middle = (low + high) / 2
            selector = SELECTORS[name](round(middle, 4))
            found = self.density(selector)
            if abs(found - density) < gap:
                best, gap = selector, abs(found - density)
            low, high = (middle, high) if found < density else (low, middle)
            if gap < 0.005:
                break
        return best


# ------------------------------------------------------------------ measuring


def score(dense: list[Clip], clips: list[Clip], prompts: list[str]) -> Row:
    """Mean figures of a row."""
    from sparsereel_eval.fidelity import psnr, ssim

    pairs = list(zip(dense, clips, strict=True))
    reports = [clip.report for clip in clips if clip.report is not None]
    sparse = [
        ((row.density or 0.0) * row.calls - row.dense_calls) / (row.calls - row.dense_calls)
        for report in reports
        for row in report
        if row.calls > row.dense_calls
    ]
    return {
        "density": statistics.mean(sparse) if sparse else 1.0,
        "psnr": statistics.mean(psnr(a.exact, b.exact) for a, b in pairs),
        "ssim": statistics.mean(ssim(a.exact, b.exact) for a, b in pairs),
        "judge": judged(clips, prompts),
        "seconds": statistics.median(clip.seconds for clip in clips),
        "attention_seconds": statistics.median(clip.attention_seconds or 0.0 for clip in clips),
    }


def judged(clips: list[Clip], prompts: list[str]) -> float:
    """Mean of what the judge finds right in these clips, 0 to 1."""
    from sparsereel_eval.judge import Judge, average

    judge = Judge()
    scores = average([judge.score(clip.frames, prompt) for clip, prompt in zip(clips, prompts, strict=True)])
    return statistics.mean(float(v) for v in scores.values() if v is not None)


def plan_for(job: Job, method: Method, size: str) -> AttentionPlan:
    """One method in all heads, after the dense first steps."""
    first = DENSE_FIRST if size == "native" else 0.0
    return AttentionPlan.uniform(method, dense_first=first, compensation=job.compensation, keep_sinks=job.keep_sinks)


def search_at(job: Job, dense: Row, pipe: Any, options: argparse.Namespace) -> tuple[AttentionPlan, Row]:
    """A searched plan of that density in its sparse steps, or whose attention takes that share of the dense seconds.

    Recorded on other prompts and seeds. Returns the plan and its forecast.
    """
    prompts = prompts_for(minireel.NATIVE, options.clips + RECORDED_PROMPTS, 0.0)[options.clips :]
    first = max(1, round(DENSE_FIRST * options.steps)) / options.steps
    folder = Path("out/methods") / f"recording-{options.clips}-{options.steps}"
    goal: dict[str, Any] = {"budget": first + (1 - first) * job.density}
    if job.name == SEARCHED_TIME:
        seconds = dense["seconds"] - (1 - job.density) * dense["attention_seconds"]
        goal = {"target_speedup": dense["seconds"] / seconds}
    found = sparsereel.search(
        pipe, prompts, **goal, held_out=0, seed=options.clips, steps=options.steps,
        dense_first=DENSE_FIRST, folder=folder, progress=False,
    )  # fmt: skip
    return found.plan, {"predicted_seconds": found.predicted.seconds, "predicted_psnr": found.predicted.psnr}


def measure(job: Job, plan: AttentionPlan, setting: str, pipe: Any, requests: list[Request], dense: list[Clip]) -> Row:
    """Generate with one plan and compare."""
    clips = [generate(pipe, request, plan, profile=True) for request in requests]
    row = score(dense, clips, [request.prompt for request in requests])
    return {
        "method": job.name,
        "target": job.density,
        "setting": setting,
        "compensation": None if job.compensation is None else str(job.compensation),
        "keep_sinks": job.keep_sinks,
        **row,
        "load_average": os.getloadavg()[0],
    }


def margins(rows: list[Row]) -> dict[str, float]:
    """dB that the best searched plan of no more attention seconds has over each other row, where there is one."""
    searched = [row for row in rows if row["method"] in SEARCHES]
    found = {}
    for row in rows:
        within = [s["psnr"] for s in searched if s["attention_seconds"] <= row["attention_seconds"]]
        if row["method"] not in SEARCHES and within:
            extra = row["compensation"] or ("first frame" if row["keep_sinks"] else "")
            found[" + ".join(filter(None, [f"{row['method']} {row['target']:g}", extra]))] = max(within) - row["psnr"]
    return found


def load(path: Path) -> dict[str, Any]:
    """What was measured before."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}, "dense": {}}


def without_smaller(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The results without those of fewer clips times steps than are asked for now: a table has rows of one kind."""

    def enough(label: str) -> bool:
        clips, steps = label.rpartition(", ")[2].split(" x ")
        return int(clips) * int(steps) >= options.clips * options.steps

    return found | {part: {k: v for k, v in found[part].items() if enough(k)} for part in ("rows", "dense")}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing; the file is written after every row."""
    began = time.perf_counter()
    found = without_smaller(load(options.output), options)
    pending = [job for job in jobs_of(options) if job.key(options) not in found["rows"]]
    if not pending:
        print(f"all {len(jobs_of(options))} rows are in {options.output}")
        return found
    torch.set_num_threads(options.threads)
    size = minireel.NATIVE if options.size == "native" else minireel.LARGE
    pipe = load_pipeline("minireel", "fp32", "cpu")
    pipe.set_progress_bar_config(disable=True)
    shape = {"frames": size.frames, "height": size.height, "width": size.width}
    prompts = prompts_for(size, options.clips, 0.0)
    requests = [Request(p, i, options.steps, size.guidance, **shape) for i, p in enumerate(prompts)]
    generate(pipe, replace(requests[0], steps=2))  # the first clip of a process pays for kernels and memory
    dense = [generate(pipe, request, profile=True) for request in requests]
    base = statistics.median(clip.seconds for clip in dense)
    label = f"{options.clips} x {options.steps}"
    found["dense"][label] = {
        "seconds": base,
        "attention_seconds": statistics.median(clip.attention_seconds or 0.0 for clip in dense),
        "judge": judged(dense, prompts),
        "load_average": os.getloadavg()[0],
    }
    found["environment"] = environment()
    print(f"{options.size}, {size.tokens} tokens, {label} steps, {options.threads} threads; dense {base:.1f} s a clip")
    print(f"{'method':44} {'density':>7} {'PSNR':>6} {'SSIM':>6} {'judge':>6} {'s':>6} {'ratio':>6}")
    recording = Recording(pipe, replace(requests[0], steps=min(options.steps, 6)))
    grid = recording.grid
    assert grid is not None
    longest = 0.0
    for number, job in enumerate(pending):
        start = time.perf_counter()
        if options.minutes is not None and start + longest - began > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over, {len(pending) - number} rows are left; run it again to go on")
            break
        forecast: Row = {}
        if job.name in SEARCHES:
            plan, forecast = search_at(job, found["dense"][label], pipe, options)
            setting = "a pattern a head"
        else:
            known = job.name in PATTERNS
            method = pattern_at(job.name, job.density, grid) if known else recording.at(job.name, job.density)
            plan, setting = plan_for(job, method, options.size), str(method)
        row = measure(job, plan, setting, pipe, requests, dense) | forecast
        row["ratio"] = base / row["seconds"]
        found["rows"][job.key(options)] = row
        write_json(options.output, found)
        longest = max(longest, time.perf_counter() - start)
        figures = f"{row['density']:7.3f} {row['psnr']:6.2f} {row['ssim']:6.4f} {row['judge']:6.3f}"
        print(f"{job.key(options):44} {figures} {row['seconds']:6.1f} {row['ratio']:6.2f}", flush=True)
    found["margins"] = margins([row for key, row in found["rows"].items() if key.endswith(label)])
    if found["margins"]:
        least = min(found["margins"], key=found["margins"].__getitem__)
        above = sum(margin > 0 for margin in found["margins"].values())
        print(
            f"searched plans of no more attention seconds are above {above} of {len(found['margins'])} rows;", end=" "
        )
        print(f"the least margin is {found['margins'][least]:.2f} dB, over {least}")
    write_json(options.output, found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 130 when interrupted."""
    options = parse(arguments)
    if options.docs:
        sys.path.insert(0, str(Path(__file__).parent))
        import methods_page

        methods_page.write(load(options.output), load(RESULTS / "methods-large.json"))
        return 0
    try:
        run(options)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from {options.output}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
