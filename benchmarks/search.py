"""Searched plans against presets, patterns and selectors that spend the same seconds in attention.

    python benchmarks/search.py --json benchmarks/results/search.json
    python benchmarks/search.py --shares 0.6 --prompts 4 --held-out 1 --folder out/search
    python benchmarks/search.py --shares --rank 10                  # only how well predictions rank plans
    python benchmarks/search.py --json FILE --docs docs/search.md   # the page from figures measured before

For each share (of the seconds that a clip's attention takes dense on our kernels) the model in the box is searched; the
recording is made once, the prompts that are measured are not in it. Every rival is one pattern, selector or preset in
all heads. One clip tells what its sparse step costs; then it is given as many dense first steps as fill the share,
rounded up: the steps that matter most, and never less time than its due. A rival that is slower than the share without
any dense step is left out. Columns: density, PSNR and SSIM against the dense clips (means), the share of clips that the
judge finds sound, seconds of a clip and in its self-attention (medians), and for searched plans the seconds and PSNR
predicted beforehand. At the end each share's searched plan is set beside the best rival.

`--rank N` takes N searched plans of densities from 0.2 to 0.95 and compares predicted errors with measured PSNR (rank
correlation) and predicted with measured seconds. Densities below what the dense first steps take are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import sparsereel
from sparsereel import AttentionPlan, generation, minireel
from sparsereel.files import write_json
from sparsereel.generation import Clip, Request, environment, generate
from sparsereel.minireel.scorecard import prompts_for
from sparsereel.patterns import Diagonal, Full, Neighborhood, Radial, Sink, Spatial, Temporal
from sparsereel.plan_entries import Method
from sparsereel.search.candidates import general_presets
from sparsereel.search.result import SearchResult
from sparsereel.selectors import BlockTopk, Spargeattn, Svg

SINGLES: dict[str, Method] = {
    "radial 0.2": Radial(0.2),
    "spatial 0 + sink": Spatial(0) | Sink(1),
    "spatial 1": Spatial(1),
    "temporal 0.2 + sink": Temporal(0.2) | Sink(1),
    "neighborhood 0.6": Neighborhood((0.6, 0.6, 0.6)),
    "diagonal 0.15": Diagonal(0.15),
    "block_topk 0.2": BlockTopk(0.2),
    "block_topk 0.4": BlockTopk(0.4),
    "spargeattn 0.3": Spargeattn(density=0.3),
    "svg 0.13": Svg(density=0.13),
}


def rivals() -> dict[str, AttentionPlan]:
    """Every general preset and the single methods, without a schedule."""
    plans = {f"preset {name}": plan for name, plan in general_presets().items()}
    plans |= {name: AttentionPlan.uniform(method) for name, method in SINGLES.items()}
    return {
        name: plan.with_schedule(dense_first=0.0, dense_last=0.0, min_tokens=0, max_density=1.0)
        for name, plan in plans.items()
    }


def dense_steps(sparse: float, dense: float, seconds: float, steps: int) -> int | None:
    """Dense first steps that fill `seconds`, rounded up; None where no dense step is too slow already.

    Args:
        sparse, dense: Seconds in attention of a whole clip without and with nothing but dense steps.
    """
    if sparse >= dense or sparse > 1.03 * seconds:
        return None
    return min(steps, math.ceil(max(0.0, steps * (seconds - sparse) / (dense - sparse))))


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
        "seconds": statistics.median(clip.seconds for clip in clips),
        "attention_seconds": statistics.median(clip.attention_seconds or 0.0 for clip in clips),
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
    generate(pipe, requests[0])
    dense = [generate(pipe, request, profile=True) for request in requests]
    whole = AttentionPlan.uniform(Full())
    own = statistics.median(
        generate(pipe, request, whole, profile=True).attention_seconds or 0.0 for request in requests
    )
    print(
        f"{held_out}: dense {statistics.median(c.seconds for c in dense):.1f} s a clip, of it in attention "
        f"{statistics.median(c.attention_seconds or 0.0 for c in dense):.2f}, on our kernels {own:.2f}",
        flush=True,
    )
    header = (
        "share",
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
        "dense_attention_seconds_on_our_kernels": own,
        "rows": rows,
    }

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        _print(row)
        if arguments.json:
            write_json(arguments.json, facts)

    def searched(**goal: Any) -> SearchResult:
        rest = {"held_out": 0, "folder": arguments.folder, "progress": False}
        return sparsereel.search(pipe, prompts[:first], **goal, **rest, **size)

    plain = {}
    for name, plan in rivals().items() if arguments.shares else ():
        plain[name] = generate(pipe, requests[0], plan, profile=True).attention_seconds or 0.0
    total = statistics.median(clip.seconds for clip in dense)
    attention = statistics.median(clip.attention_seconds or 0.0 for clip in dense)
    for share in arguments.shares:
        found = searched(target_speedup=total / (total - attention + share * own))
        predicted = {"predicted_seconds": found.predicted.seconds, "predicted_psnr": found.predicted.psnr}
        clips = [generate(pipe, request, found.plan, profile=True) for request in requests]
        add({"share": share, "contender": "searched", **scored(dense, clips, held_out), **predicted})
        for name, plan in rivals().items():
            filled = dense_steps(plain[name], own, share * own, size["steps"])
            if filled is None:
                continue
            equal = plan.with_schedule(dense_first=filled)
            clips = [generate(pipe, request, equal, profile=True) for request in requests]
            row = scored(dense, clips, held_out)
            add({"share": share, "contender": name, "dense_first": filled, **row})
        print(beside(rows, share), flush=True)
    if arguments.rank:
        facts["ranking"] = ranked = []
        for number in range(arguments.rank):
            budget = 0.2 + 0.75 * number / max(1, arguments.rank - 1)
            found = searched(budget=budget)
            clips = [generate(pipe, request, found.plan, profile=True) for request in requests]
            predicted = {"predicted_seconds": found.predicted.seconds, "predicted_psnr": found.predicted.psnr}
            figures = {**scored(dense, clips, held_out), **predicted, "predicted_error": found.predicted.error}
            ranked.append({"budget": budget, "contender": "searched, by density", **figures})
            _print(ranked[-1])
        facts |= agreement(ranked)
        print(
            "rank correlation of predicted error and PSNR {spearman:.3f}; measured over predicted seconds "
            "{seconds_ratio_median:.3f}, from {seconds_ratio_least:.3f} to {seconds_ratio_most:.3f}".format(**facts)
        )
        if arguments.json:
            write_json(arguments.json, facts)


def beside(rows: list[dict[str, Any]], share: float) -> str:
    """The searched plan of a share and the best rival."""
    mine = next(row for row in rows if row["share"] == share and row["contender"] == "searched")
    others = [row for row in rows if row["share"] == share and row["contender"] != "searched"]
    if not others:
        return f"{share:.2f}: no rival is as fast"
    best = max(others, key=lambda row: float(row["psnr"]))
    return (
        f"{share:.2f}: searched {mine['psnr']:.1f} dB in {mine['attention_seconds']:.2f} s, the best rival "
        f"{best['contender']} {best['psnr']:.1f} dB in {best['attention_seconds']:.2f} s"
    )


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
    goal = row.get("share", row.get("budget"))
    print(
        f"{goal:6.2f}  {row['contender']:24}{row['density']:8.3f}{row['psnr']:8.2f}{row['ssim']:8.3f}"
        f"{row['sound']:7.2f}{row['seconds']:9.1f}{row['attention_seconds']:11.2f}"
        + (f"{seconds:13.1f}{psnr:8.1f}" if seconds is not None else f"{'-':>13}{'-':>8}"),
        flush=True,
    )


def main() -> None:
    native = minireel.NATIVE
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.45, 0.6, 0.8])
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
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="write the figures of --json into this page and stop")
    arguments = parser.parse_args()
    if arguments.docs:
        sys.path.insert(0, str(Path(__file__).parent))
        import search_page

        if arguments.json is None:
            parser.error("--docs needs --json: the file that holds the figures")
        search_page.put(arguments.docs, json.loads(arguments.json.read_text(encoding="utf-8")))
        return
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
