"""`sparsereel extend`: a clip longer or larger than the model was trained for, or what it would cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsereel.cli import console

if TYPE_CHECKING:
    from sparsereel.extend.forecast import Forecast
    from sparsereel.extend.recipes import Recipe
    from sparsereel.extend.regional import Box

    Regions = tuple[tuple[str, Box], ...]


def extend(
    prompt: Annotated[str | None, typer.Argument(help="What to generate; not needed with --dry-run.")] = None,
    frames: Annotated[str | None, typer.Option(help="2x: twice the trained length; 65: so many frames.")] = None,
    height: Annotated[str | None, typer.Option(help="1.5x of the trained height, or pixels.")] = None,
    width: Annotated[str | None, typer.Option(help="1.5x of the trained width, or pixels.")] = None,
    method: Annotated[
        str, typer.Option(help="auto, plain, ultravico, window, freenoise, yarn, freeswim ...; several by +")
    ] = "auto",
    region: Annotated[
        list[str] | None,
        typer.Option(help='"0,0,1,0.5=a red fox": a prompt for a box (top, left, bottom, right); cupscale; several.'),
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Preset name or plan file; dense without it.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The mp4 to write.")] = Path("out.mp4"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a pipeline; default minireel.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    json: Annotated[str | None, typer.Option("--json", help="Write the result as JSON here, or - for stdout.")] = None,
) -> None:
    """A longer or larger clip without training: an mp4, a PNG contact sheet and a JSON sidecar."""
    sizes = parse_sizes(frames=frames, height=height, width=width)
    if not any(sizes.values()):
        raise ValueError("extend needs --frames, --height or --width, such as --frames 2x")
    regions = tuple(parse_region(text) for text in region or ())
    if dry_run:
        found = _forecast(model, sizes, method, regions, plan, steps, guidance, dtype, device)
        _print(found)
        console.emit_json(json, found.to_dict())
        return
    if prompt is None:
        raise ValueError("give a PROMPT, or --dry-run to see what the clip would cost")
    from sparsereel.generation import Request

    request = Request(prompt, seed=seed, steps=steps, guidance=guidance, negative_prompt=negative_prompt)
    result = _generate(request, sizes, method, regions, plan, output, model, dtype, device)
    console.emit_json(json, result)


def parse_sizes(**given: str | None) -> dict[str, float | int | None]:
    """Frames, height and width as typed: `2x` is a ratio, `65` a target."""
    return {name: _size(name, text) for name, text in given.items()}


def _size(name: str, given: str | None) -> float | int | None:
    """`2x` is a ratio, `65` a target."""
    if given is None:
        return None
    text = given.strip().lower()
    try:
        return float(text[:-1]) if text.endswith("x") else int(text)
    except ValueError:
        raise ValueError(f"--{name} must be a ratio such as 2x or a whole number, got {given!r}") from None


def parse_region(given: str) -> tuple[str, Box]:
    """`0,0,1,0.5=a red fox` as typed: a text, and its box (top, left, bottom, right) in shares of the picture."""
    numbers, found, text = given.partition("=")
    try:
        top, left, bottom, right = map(float, numbers.split(","))
    except ValueError:
        found = ""
    if not found or not text.strip():
        raise ValueError(f'--region is written "top,left,bottom,right=text", such as "0,0,1,0.5=a fox", got {given!r}')
    return text.strip(), (top, left, bottom, right)


def _with_regions(pipe: Any, sizes: dict[str, Any], method: str, regions: Regions) -> Recipe:
    """The recipe of a method, with regional prompts."""
    from sparsereel.extend.drive import choose
    from sparsereel.families import models_of

    _, recipe = choose(pipe, models_of(pipe), sizes["frames"], sizes["height"], sizes["width"], method)
    return recipe.with_regions(regions)


def _generate(
    request: Any,
    sizes: dict[str, Any],
    method: str,
    regions: Regions,
    plan: str | None,
    output: Path,
    model: str | None,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    from dataclasses import replace

    import sparsereel
    from sparsereel.batch import check_writable
    from sparsereel.files import write_json
    from sparsereel.generation import environment, generate, load_pipeline, request_data
    from sparsereel.media import write_contact_sheet, write_mp4

    if output.suffix != ".mp4" or output.is_dir():
        raise ValueError(f"-o must be a file that ends in .mp4, got {output}")
    check_writable(output.parent)
    if model in (None, "minireel") or Path(str(model)).expanduser().is_dir():
        # Before anything is loaded.
        _forecast(model, sizes, method, regions, plan, request.steps, request.guidance, dtype, device).check()
    pipe = load_pipeline(model, dtype, device)
    chosen = _with_regions(pipe, sizes, method, regions) if regions else method
    report = sparsereel.extend(pipe, **sizes, method=chosen, plan=plan)
    extension = report.to_dict()["extension"]
    for note in extension["notes"]:
        console.say(note)
    call = {name.removeprefix("num_"): value for name, value in extension["arguments"].items()}
    request = replace(request, **call)
    clip = generate(pipe, request)
    sheet, sidecar = output.with_suffix(".png"), output.with_suffix(".json")
    write_mp4(output, clip.frames)
    write_contact_sheet(sheet, [(request.prompt, clip.frames)])
    result = {
        "output": str(output),
        "sheet": str(sheet),
        "prompt": request.prompt,
        "request": request_data(request),
        "model": model or "minireel",
        "dtype": dtype,
        "plan": plan,
        "extension": extension,
        "seconds": clip.seconds,
        "report": sparsereel.report(pipe).to_dict(),
        "environment": environment(),
    }
    # Last: a sidecar means that the clip is complete.
    write_json(sidecar, result)
    size = "x".join(map(str, clip.frames.shape[:3]))
    console.say(f"{extension['method']}: {size}, {clip.seconds:.1f} s")
    console.say(f"wrote {output}, {sheet}")
    return result


def _forecast(
    model: str | None,
    sizes: dict[str, Any],
    method: str,
    regions: Regions,
    plan: str | None,
    steps: int | None,
    guidance: float | None,
    dtype: str,
    device: str,
) -> Forecast:
    from sparsereel import minireel
    from sparsereel.extend.forecast import forecast
    from sparsereel.generation import DTYPES
    from sparsereel.presets import resolve_plan

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    small = model in (None, "minireel")
    folder = minireel.WEIGHTS if small else Path(str(model)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--dry-run looks at a folder on this machine; {folder} is none")
    return forecast(
        folder,
        minireel.MiniReelPipeline if small else None,
        sizes,
        method,
        None if plan is None else resolve_plan(plan),
        steps=steps,
        guidance=guidance,
        regions=regions,
        dtype=DTYPES[dtype],
        device=device,
    )


def _free(found: Forecast) -> str:
    return "" if found.free is None else f", {found.free / 2**30:.1f} GiB are free"


def _windows(found: Forecast) -> str:
    """Where the model runs more often than the sampler asks."""
    return "" if found.passes == found.forwards else f", as {found.passes:,.0f} passes over parts or sizes"


def _print(found: Forecast) -> None:
    seconds = "unknown: run `sparsereel bench cost` once"
    if found.attention_seconds is not None:
        seconds = f"{found.attention_seconds:.1f} (from the cost table)"
    rows = [
        ("size", " x ".join(map(str, found.target)) + f" (trained: {' x '.join(map(str, found.trained))})"),
        ("call", ", ".join(f"{name}={value}" for name, value in found.arguments.items())),
        ("method", found.method),
        ("tokens", f"{found.tokens:,} (trained: {found.trained_tokens:,})"),
        ("forward passes", f"{found.forwards} in {found.steps} steps{_windows(found)}"),
        ("attention density", f"{found.density:.3f}"),
        ("self-attention TFLOPs", f"{found.attention_flops / 1e12:.3f}"),
        ("other TFLOPs", f"{found.other_flops / 1e12:.3f}"),
        ("self-attention seconds", seconds),
        ("memory while denoising", f"{found.memory / 2**30:.2f} GiB (estimate, without decoding){_free(found)}"),
    ]
    for name, value in rows:
        console.say(f"{name:24s}{value}")
    for note in found.notes:
        console.say(note)
