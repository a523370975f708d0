"""Searched plans against presets and single patterns of the same predicted cost, on prompts that were not recorded.

    python benchmarks/search.py --json benchmarks/results/search.json
    python benchmarks/search.py --budgets 0.5 --prompts 4 --held-out 1 --folder out/search
    python benchmarks/search.py --budgets --rank 10                  # only how well predictions rank plans

For each budget (a mean density) the model in the box is searched; the recording is made once. Every rival is one
pattern or preset in all heads, given exactly the same mean density by leaving first steps dense: the steps that matter
most, so the comparison leans towards the rivals. A rival that is denser than the budget without any dense step is left
out. Columns: density as measured, PSNR and SSIM against the dense clip (means), the share of clips that the judge finds
sound, seconds of a clip and in its self-attention, and for searched plans the seconds and PSNR predicted beforehand.

`--rank N` takes N searched plans of budgets from 0.2 to 0.95 and compares predicted errors with measured PSNR (rank
correlation) and predicted with measured seconds. Budgets below what the dense first steps take are left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import sparsereel
from sparsereel import AttentionPlan, TokenGrid, generation, minireel
from sparsereel.files import write_json
from sparsereel.generation import Clip, Request, environment, generate
from sparsereel.inspection import architecture_of, inspect_plan
from sparsereel.minireel.scorecard import prompts_for
from sparsereel.patterns import Neighborhood, Radial, Sink, Spatial, Temporal
from sparsereel.plan_entries import Method
from sparsereel.search.candidates import general_presets
from sparsereel.search.result import SearchResult
from sparsereel.selectors import BlockTopk

SINGLES: dict[str, Method] = {
    "radial 0.2": Radial(0.2),
    "spatial 1": Spatial(1),
    "temporal 0.2 + sink": Temporal(0.2) | Sink(1),
    "neighborhood 0.6": Neighborhood((0.6, 0.6, 0.6)),
    "block_topk 0.2": BlockTopk(0.2),
    "block_topk 0.4": BlockTopk(0.4),
}


def rivals() -> dict[str, AttentionPlan]:
    """Every preset and single pattern, without a schedule."""
    plans = {f"preset {name}": plan for name, plan in general_presets().items()}
    plans |= {name: AttentionPlan.uniform(method) for name, method in SINGLES.items()}
    return {
        name: plan.with_schedule(dense_first=0.0, dense_last=0.0, min_tokens=0, max_density=1.0)
        for name, plan in plans.items()
    }


def density_of(name: str, plan: AttentionPlan, grid: TokenGrid) -> float:
    """Density of a plan without a schedule; selectors keep what they are told, rounded up to blocks."""
    method = SINGLES.get(name)
    if isinstance(method, BlockTopk):
        blocks = -(-grid.seq_len // 64)
        return -(-round(method.density * blocks * 1000) // 1000) / blocks
    return inspect_plan(plan, grid, architecture_of(minireel.WEIGHTS)).density


def at_budget(plan: AttentionPlan, density: float, budget: float, steps: int) -> AttentionPlan | None:
    """The plan with so many dense first steps that its mean density is the budget, rounded to whole steps."""
    if density > budget + 0.02:
        return None
    dense = max(0, round(steps * (budget - density) / (1 - density)))
    return plan.with_schedule(dense_first=dense)


def scored(dense: list[Clip], clips: list[Clip], prompts: list[str]) -> dict[str, float]:
    """Mean figures of a contender."""
    from sparsereel_eval.fidelity import psnr, ssim
    from sparsereel_eval.judge import Judge

    judge = Judge()
    pairs = list(zip(dense, clips, strict=True))
    reports = [clip.report.density for clip in clips if clip.report is not None]
    return {
        "density": statistics.mean(float(d) for d in reports if d is not None),
        "psnr": statistics.mean(psnr(a.exact, b.exact) for a, b in pairs),
        "ssim": statistics.mean(ssim(a.exact, b.exact) for a, b in pairs),
        "sound": statistics.mean(
            float(judge.score(c.frames, prompt).sound) for c, prompt in zip(clips, prompts, strict=True)
        ),
        "seconds": statistics.mean(clip.seconds for clip in clips),
        "attention_seconds": statistics.mean(clip.attention_seconds or 0.0 for clip in clips),
    }


def compare(arguments: argparse.Namespace) -> None:
    """Print the table and write the file, row by row: what was measured survives an interruption."""
    pipe = minireel.load(generation.DTYPES[arguments.dtype])
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts_for(minireel.NATIVE, arguments.prompts, 0.0)
    size = {name: getattr(arguments, name) for name in ("frames", "height", "width", "steps")}
    count = arguments.held_out
    held_out = prompts[-count:]
    first = arguments.prompts - count
    requests = [Request(text, seed=first + n, **size) for n, text in enumerate(held_out)]
    grid = TokenGrid((size["frames"] - 1) // 4 + 1, size["height"] // 8, size["width"] // 8)
    generate(pipe, requests[0])
    dense = [generate(pipe, request, profile=True) for request in requests]
    print(f"{held_out}: dense {statistics.mean(c.seconds for c in dense):.1f} s a clip, grid {grid}", flush=True)
    header = (
        "budget",
        "contender",
        "density",
        "PSNR",
        "SSIM",
        "sound",
        "seconds",
        "attention",
        "predicted s",
        "and dB",
    )
    print("{:>6}  {:24}{:>8}{:>8}{:>8}{:>7}{:>9}{:>11}{:>13}{:>8}".format(*header))
    rows: list[dict[str, Any]] = []
    facts = {
        "environment": environment(),
        "size": size,
        "dtype": arguments.dtype,
        "prompts": prompts,
        "held_out": held_out,
        "dense_seconds": [clip.seconds for clip in dense],
        "dense_attention_seconds": [clip.attention_seconds for clip in dense],
        "rows": rows,
    }

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        _print(row)
        if arguments.json:
            write_json(arguments.json, facts)

    def searched(budget: float, measured: int) -> SearchResult:
        return sparsereel.search(
            pipe, prompts[: first + measured], budget=budget, held_out=measured, folder=arguments.folder,
            progress=False, **size,
        )  # fmt: skip

    for budget in arguments.budgets:
        found = searched(budget, count)
        predicted = {"predicted_seconds": found.predicted.seconds, "predicted_psnr": found.predicted.psnr}
        clips = [generate(pipe, request, found.plan, profile=True) for request in requests]
        add({"budget": budget, "contender": "searched", **scored(dense, clips, held_out), **predicted})
        for name, plan in rivals().items():
            equal = at_budget(plan, density_of(name, plan, grid), budget, size["steps"])
            if equal is None:
                continue
            clips = [generate(pipe, request, equal, profile=True) for request in requests]
            add({"budget": budget, "contender": name, **scored(dense, clips, held_out)})
    if arguments.rank:
        facts["ranking"] = ranked = []
        for number in range(arguments.rank):
            budget = 0.2 + 0.75 * number / max(1, arguments.rank - 1)
            found = searched(budget, 0)
            clips = [generate(pipe, request, found.plan, profile=True) for request in requests]
            predicted = {"predicted_seconds": found.predicted.seconds, "predicted_psnr": found.predicted.psnr}
            row = {"budget": budget, "contender": "searched, not measured before", **scored(dense, clips, held_out)}
            ranked.append({**row, **predicted, "predicted_error": found.predicted.error})
            _print(ranked[-1])
        facts |= agreement(ranked)
        print(
            "rank correlation of predicted error and PSNR {spearman:.3f}; measured over predicted seconds "
            "{seconds_ratio_median:.3f}, from {seconds_ratio_least:.3f} to {seconds_ratio_most:.3f}".format(**facts)
        )
        if arguments.json:
            write_json(arguments.json, facts)


def agreement(ranked: list[dict[str, Any]]) -> dict[str, float]:
    """Spearman's rank correlation of predicted error and PSNR (sign turned), and the ratio of seconds."""

    def ranks(values: list[float]) -> torch.Tensor:
        return torch.tensor(values).argsort().argsort().double()

    error, psnr = ([row[name] for row in ranked] for name in ("predicted_error", "psnr"))
    pairs = torch.stack([ranks([-e for e in error]), ranks(psnr)])
    ratios = [row["seconds"] / row["predicted_seconds"] for row in ranked]
    return {
        "spearman": float(torch.corrcoef(pairs)[0, 1]),
        "seconds_ratio_median": statistics.median(ratios),
        "seconds_ratio_least": min(ratios),
        "seconds_ratio_most": max(ratios),
    }


def _print(row: dict[str, Any]) -> None:
    seconds, psnr = row.get("predicted_seconds"), row.get("predicted_psnr")
    print(
        f"{row['budget']:6.2f}  {row['contender']:24}{row['density']:8.3f}{row['psnr']:8.2f}{row['ssim']:8.3f}"
        f"{row['sound']:7.2f}{row['seconds']:9.1f}{row['attention_seconds']:11.2f}"
        + (f"{seconds:13.1f}{psnr:8.1f}" if seconds is not None else f"{'-':>13}{'-':>8}"),
        flush=True,
    )


def main() -> None:
    native = minireel.NATIVE
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.3, 0.5, 0.7])
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="also compare N plans with their predictions")
    parser.add_argument("--dtype", choices=generation.DTYPES, default="fp32")
    parser.add_argument("--prompts", type=int, default=6, help="of minireel's fixed list, held-out ones included")
    parser.add_argument("--held-out", type=int, default=2)
    parser.add_argument("--frames", type=int, default=native.frames)
    parser.add_argument("--height", type=int, default=native.height)
    parser.add_argument("--width", type=int, default=native.width)
    parser.add_argument("--steps", type=int, default=native.steps)
    parser.add_argument("--folder", type=Path, help="where the recording is kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if not 0 < arguments.held_out < arguments.prompts:
        parser.error("--held-out must be at least 1 and fewer than --prompts")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{environment()['machine']}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        compare(arguments)


if __name__ == "__main__":
    main()
