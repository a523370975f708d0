"""`sparsereel generate`: clips from prompts, dense, sparse, or both side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsereel.cli import console

_LISTED = 8  # paths named one by one

Json = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to this path, or - for stdout.")]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to generate.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line, instead of PROMPT.")] = None,
    plan: Annotated[str | None, typer.Option(help="Preset name or plan file; dense without it.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The mp4 to write; with --prompts a folder."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also generate dense, side by side.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; prompt number n of a file uses seed + n.")] = 0,
    frames: Annotated[int | None, typer.Option(min=1, help="Number of frames.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width in pixels.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    size: Annotated[str | None, typer.Option(help="native or large: minireel's published sizes.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a pipeline; default minireel.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    backend: Annotated[str, typer.Option(help="Kernel backend; see `sparsereel doctor`.")] = "auto",
    json: Json = None,
) -> None:
    """Generate clips: an mp4, a PNG contact sheet and a JSON sidecar each."""
    from sparsereel.batch import Job, plan_jobs, read_prompts, run_jobs
    from sparsereel.generation import Request, load_pipeline
    from sparsereel.presets import resolve_plan

    if (prompt is None) == (prompts is None):
        raise ValueError("give either a PROMPT or --prompts FILE")
    if compare and plan is None:
        raise ValueError("--compare needs --plan: it shows the plan against dense")
    if size is not None:
        model, *chosen = _published_size(size, model, frames, height, width, steps, guidance)
        frames, height, width, steps, guidance = chosen
    texts = [prompt] if prompt is not None else read_prompts(prompts)  # type: ignore[arg-type]
    resolved = None if plan is None else resolve_plan(plan)
    requests = [
        Request(
            text or "",
            seed=seed + number,
            steps=steps,
            guidance=guidance,
            frames=frames,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
        )
        for number, text in enumerate(texts)
    ]
    settings: dict[str, Any] = {
        "model": model or "minireel",
        "dtype": dtype,
        "backend": backend,
        "plan": plan,
        "compare": compare,
    }
    if resolved is not None:
        settings["plan_contents"] = resolved.to_dict()
    jobs: list[Job] = plan_jobs(requests, output, settings, folder=prompts is not None)
    pending = [job for job in jobs if not job.done]
    if len(pending) < len(jobs):
        console.say(f"{len(jobs) - len(pending)} of {len(jobs)} clips are there already and are kept")
    pipe = load_pipeline(model, dtype, device) if pending else None
    results = run_jobs(pipe, jobs, resolved, compare=compare, backend=backend)
    _print_table(results)
    console.emit_json(json, results[0] if prompts is None else results)


def _published_size(size: str, model: str | None, *given: Any) -> tuple[Any, ...]:
    """The model of one of minireel's published sizes, and what was not given filled from it."""
    from sparsereel import minireel
    from sparsereel.generation import SIZED

    sizes = {"native": minireel.NATIVE, "large": minireel.LARGE}
    if model not in SIZED:
        raise ValueError("--size names minireel's sizes; with --model give --frames, --height and --width")
    if size not in sizes:
        raise ValueError(f"unknown size {size!r}; allowed: {', '.join(sizes)}")
    if model == "minireel-large" and size == "native":
        raise ValueError("--model minireel-large is minireel at --size large; for native clips leave --model out")
    chosen = sizes[size]
    defaults = (chosen.frames, chosen.height, chosen.width, chosen.steps, chosen.guidance)
    filled = (default if value is None else value for value, default in zip(given, defaults, strict=True))
    return "minireel-large" if size == "large" else "minireel", *filled


def _print_table(results: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("clip", "attention", "seconds", "density", "PSNR dB", "SSIM"):
        table.add_column(name, justify="left" if name in ("clip", "attention") else "right")
    for result in results:
        for row in result["runs"]:
            table.add_row(
                Path(result["output"]).name,
                row["attention"],
                f"{row['seconds']:.1f}",
                f"{row['density']:.3f}",
                _number(row.get("psnr"), ".2f"),
                _number(row.get("ssim"), ".4f"),
            )
    console.people.print(table)
    for result in results[:_LISTED]:
        console.say(f"wrote {result['output']}, {result['sheet']}")
    if len(results) > _LISTED:
        console.say(f"and {len(results) - _LISTED} more clips beside them")
    speedups = [result["speedup"] for result in results if result.get("speedup")]
    if speedups:
        console.say(f"speed-up end to end: {sum(speedups) / len(speedups):.2f}x")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
