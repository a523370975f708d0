"""`make demo`: the same clip from the model in the box, dense and sparse, with time and fidelity side by side.

python -m sparsereel.demo --plan radial --dtype fp32 -o out/demo
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from sparsereel.arithmetic import arithmetic
from sparsereel.files import write_json
from sparsereel.generation import DTYPES, Clip, Request, environment, generate, load_pipeline, request_data
from sparsereel.media import write_contact_sheet, write_mp4
from sparsereel.presets import resolve_plan

PROMPT = "a cyan 8 moving up on forest"
PLAN = "minireel-large"
SEED = 1
#: Without a compiler PyTorch's slower code runs, without bf16 in hardware everything takes longer: fewer steps then, so
#: that the demo stays under five minutes on two cores.
STEPS_SLOW = 11


def main() -> None:
    """Parse the command line, generate, print one table, write the files."""
    options = _parser().parse_args()
    if options.dtype == "auto":
        options.dtype = next(name for name, dtype in DTYPES.items() if dtype == arithmetic())
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    from rich.console import Console

    console = Console(highlight=False)
    result = run(options, console)
    console.print(_table(result["runs"]))
    console.print(f"end to end {result['speedup']:.2f} times faster; attention alone {result['attention_speedup']:.2f}")
    where = result["environment"]
    console.print(f"{result['backend']} kernels, {where['machine']}, {where['threads']} threads", markup=False)
    for name in ("dense.mp4", "sparse.mp4", "contact_sheet.png", "demo.json"):
        console.print(f"wrote {options.output / name}", markup=False)
    print("done")


def _parser() -> argparse.ArgumentParser:
    from sparsereel.minireel import LARGE

    parser = argparse.ArgumentParser(description="Generate one clip dense and sparse.")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--plan", default=PLAN, help="preset name or plan file")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, help=f"default {LARGE.steps}; {STEPS_SLOW} on slow machines")
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: what is fast here")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/demo"))
    return parser


def run(options: argparse.Namespace, console: Any) -> dict[str, Any]:
    """Generate both clips and write everything; returns what goes into demo.json."""
    from sparsereel.minireel import LARGE

    plan = resolve_plan(options.plan)
    kernels = _build_kernels(console)
    slow = kernels == "torch" or options.dtype == "fp32"
    options.steps = options.steps or (STEPS_SLOW if slow else LARGE.steps)
    request = Request(
        options.prompt, options.seed, options.steps, LARGE.guidance, LARGE.frames, LARGE.height, LARGE.width
    )
    console.print(
        f"{request.prompt!r}: {LARGE.frames} frames of {LARGE.width} x {LARGE.height}, {LARGE.tokens} tokens, "
        f"{request.steps} steps, {options.dtype}"
    )
    pipe = load_pipeline("minireel-large", options.dtype, "cpu")
    clips = {}
    for name, used in (("dense", None), ("sparse", plan)):
        pipe.set_progress_bar_config(desc=name)
        clips[name] = generate(pipe, request, used, profile=True)
    return _write(options, request, clips["dense"], clips["sparse"], kernels)


def _build_kernels(console: Any) -> str:
    """Build the native kernels before the clock runs; says what will run without them."""
    from sparsereel_kernels import cpu

    try:
        cpu.build()
    except cpu.BuildError as error:
        console.print(f"native kernels: {error}; PyTorch code runs instead, slower", markup=False)
        return "torch"
    return "cpu"


def _write(options: argparse.Namespace, request: Request, dense: Clip, sparse: Clip, kernels: str) -> dict[str, Any]:
    from sparsereel_eval.fidelity import psnr, ssim

    row = {**_row("sparse", sparse), "psnr": float(psnr(dense.exact, sparse.exact))}
    row["ssim"] = float(ssim(dense.exact, sparse.exact))
    runs = [_row("dense", dense), row]
    result = {
        "request": request_data(request),
        "plan": options.plan,
        "dtype": options.dtype,
        "backend": kernels,
        "runs": runs,
        "speedup": dense.seconds / sparse.seconds,
        "attention_speedup": runs[0]["attention_seconds"] / row["attention_seconds"],
        "environment": environment(),
    }
    write_mp4(options.output / "dense.mp4", dense.frames)
    write_mp4(options.output / "sparse.mp4", sparse.frames)
    label = f"sparse ({options.plan}), {sparse.seconds:.0f} s, PSNR {row['psnr']:.1f} dB"
    rows = [(f"dense, {dense.seconds:.0f} s", dense.frames), (label, sparse.frames)]
    write_contact_sheet(options.output / "contact_sheet.png", rows)
    write_json(options.output / "demo.json", result)
    return result


def _row(name: str, clip: Clip) -> dict[str, Any]:
    report = clip.report
    return {
        "attention": name,
        "seconds": clip.seconds,
        "attention_seconds": clip.attention_seconds,
        "density": 1.0 if report is None or report.density is None else report.density,
        "token_density": 1.0 if report is None or report.token_density is None else report.token_density,
    }


def _table(runs: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("attention", "seconds", "in attention", "density", "of tokens", "PSNR dB", "SSIM"):
        table.add_column(name, justify="left" if name == "attention" else "right")
    for row in runs:
        fidelity = (f"{row['psnr']:.2f}", f"{row['ssim']:.4f}") if "psnr" in row else ("-", "-")
        table.add_row(
            row["attention"],
            f"{row['seconds']:.1f}",
            f"{row['attention_seconds']:.1f}",
            f"{row['density']:.3f}",
            f"{row['token_density']:.3f}",
            *fidelity,
        )
    return table


if __name__ == "__main__":
    main()
