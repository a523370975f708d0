"""`sparsereel search`: the best pattern for every head, as a plan file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsereel.cli import console

if TYPE_CHECKING:
    from sparsereel.search.result import SearchResult

#: prompts of minireel's fixed list that are used without --prompts
DEFAULT_PROMPTS = 6


def search(
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line; minireel has its own.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan file to write.")] = Path("plan.yaml"),
    target_psnr: Annotated[float | None, typer.Option(help="Fastest plan that keeps so many dB.")] = None,
    target_speedup: Annotated[float | None, typer.Option(help="Most exact plan that is so much faster.")] = None,
    budget: Annotated[float | None, typer.Option(help="Most exact plan of that mean density, 0 to 1.")] = None,
    candidates: Annotated[str | None, typer.Option(help="Methods to try, such as radial,temporal,skip.")] = None,
    refine: Annotated[str | None, typer.Option(help="Try what this plan (file or preset) uses, nothing else.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Number of frames.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width in pixels.")] = None,
    extend: Annotated[
        str | None, typer.Option(help="Search for clips extended by this method to --frames, --height, --width.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(help="Prompt number n uses seed + n.")] = 0,
    held_out: Annotated[int, typer.Option(min=0, help="Prompts, the last ones, only to measure the plan on.")] = 2,
    buckets: Annotated[int, typer.Option(min=1, help="Stretches of steps with choices of their own.")] = 3,
    dense_first: Annotated[float, typer.Option(help="Share of the steps at the start that stay dense.")] = 0.1,
    folder: Annotated[Path | None, typer.Option(help="Where recordings are kept; default beside the plan.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a pipeline; default minireel.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    backend: Annotated[str, typer.Option(help="Kernel backend; see `sparsereel doctor`.")] = "auto",
    report: Annotated[bool, typer.Option(help="Write an HTML page beside the plan (needs plotly).")] = True,
    json: Annotated[str | None, typer.Option("--json", help="Write the result as JSON here, or - for stdout.")] = None,
) -> None:
    """Find the best pattern for every head and measure the plan; run again after Ctrl-C to go on.

    Give one of --target-psnr, --target-speedup and --budget. Exit code 1: the plan is written, the target missed.
    """
    import sparsereel
    from sparsereel.batch import check_writable, read_prompts
    from sparsereel.generation import SIZED, load_pipeline
    from sparsereel.presets import resolve_plan
    from sparsereel.search.settings import Target

    Target.of(target_psnr, target_speedup, budget)
    if output.suffix not in (".yaml", ".yml", ".json") or output.is_dir():
        raise ValueError(f"-o must be a file that ends in .yaml or .json, got {output}")
    known = None if refine is None else resolve_plan(refine)
    if prompts is None and model not in SIZED:
        raise ValueError("with --model give --prompts FILE: one prompt a line")
    texts = _own_prompts() if prompts is None else read_prompts(prompts)
    if extend is not None and frames is None and height is None and width is None:
        raise ValueError("--extend needs the size to search for: --frames, --height or --width")
    kept = folder or output.with_name(f"{output.stem}-search")
    check_writable(kept)
    pipe = load_pipeline(model, dtype, device)
    if extend is not None:
        sparsereel.extend(pipe, frames=frames, height=height, width=width, method=extend)
    result = sparsereel.search(
        pipe,
        texts,
        target_psnr=target_psnr,
        target_speedup=target_speedup,
        budget=budget,
        candidates=None if candidates is None else [name for name in candidates.split(",") if name.strip()],
        refine=known,
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        held_out=held_out,
        buckets=buckets,
        dense_first=dense_first,
        backend=backend,
        folder=kept,
    )
    result.save(output)
    _print(result)
    console.say(f"wrote {output}; recordings are in {kept}")
    if report:
        _report(result, output.with_suffix(".html"))
    console.emit_json(json, result.to_dict())
    if not result.met:
        raise typer.Exit(console.complain(result.note, console.MISSED))


def _report(result: SearchResult, path: Path) -> None:
    """Write the page; a missing library costs the page, not the plan."""
    from importlib.util import find_spec

    missing = [name for name in ("plotly", "jinja2") if find_spec(name) is None]
    if missing:
        console.say(f"no report: {' and '.join(missing)} missing (pip install 'sparsereel[eval]')")
        return
    result.report(path)
    console.say(f"wrote {path}")


def _own_prompts() -> list[str]:
    from sparsereel.minireel import NATIVE
    from sparsereel.minireel.scorecard import prompts_for

    return prompts_for(NATIVE, DEFAULT_PROMPTS, two=0.0)


def _print(result: SearchResult) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "density", "seconds", "speed-up", "PSNR dB", "SSIM"):
        table.add_column(name, justify="left" if not name else "right")
    # A dozen points show the shape of the front.
    for point in result.front[:: max(1, len(result.front) // 12)]:
        row = (point.density, point.seconds, point.speedup, point.psnr)
        table.add_row("front", *_cells(row), "-")
    chosen = result.predicted
    table.add_row("predicted", *_cells((chosen.density, chosen.seconds, chosen.speedup, chosen.psnr)), "-")
    found = result.measured
    if found:
        row = (found["density"], found["seconds"], found["speedup"], found["psnr"])
        table.add_row("measured", *_cells(row), f"{found['ssim']:.3f}" if "ssim" in found else "-")
    console.people.print(table)
    if "sound" in found:
        console.say(f"judged sound: {found['sound']:.2f} of the clips, dense {found['dense_sound']:.2f}")


def _cells(row: tuple[float, float, float, float]) -> tuple[str, ...]:
    density, seconds, speedup, psnr = row
    return f"{density:.3f}", f"{seconds:.2f}", f"{speedup:.2f}x", f"{psnr:.1f}"
