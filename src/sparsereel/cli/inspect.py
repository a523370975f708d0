"""`sparsereel inspect`: what a plan does on a grid, layer by layer, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsereel.cli import console
from sparsereel.cli.sinks import probe_sinks

if TYPE_CHECKING:
    from sparsereel.grid import TokenGrid
    from sparsereel.inspection import Inspection


def inspect(
    plan: Annotated[str, typer.Argument(help="Preset name or plan file.")],
    size: Annotated[str | None, typer.Option(help="native or large: minireel's published sizes.")] = None,
    grid: Annotated[str | None, typer.Option(help="Tokens after patchify, such as 21x30x52.")] = None,
    text: Annotated[int, typer.Option(min=0, help="Text tokens after the video, in joint attention.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the run.")] = 20,
    model: Annotated[str | None, typer.Option(help="Folder of a diffusers pipeline; default minireel.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of density by layer and head.")] = None,
    sinks: Annotated[bool, typer.Option("--sinks", help="Run the model densely and look for attention sinks.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="With --sinks: a text file with one prompt a line.")] = None,
    sink_ratio: Annotated[float, typer.Option(help="With --sinks: times the median mass that makes a sink.")] = 20.0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="With --sinks: write the plan with its sink_map here.")
    ] = None,
    json: Annotated[str | None, typer.Option("--json", help="Write the result as JSON here, or - for stdout.")] = None,
) -> None:
    """Density and attention FLOPs of a plan, without running the model; with --sinks the sinks of a model that runs."""
    if sinks:
        probe_sinks(plan, size, grid, steps, model, prompts, sink_ratio, output, json)
        return
    if prompts is not None or output is not None:
        raise ValueError("--prompts and --output go with --sinks")
    from sparsereel import inspection, minireel
    from sparsereel.generation import SIZED
    from sparsereel.presets import resolve_plan

    resolved = resolve_plan(plan)
    boxed = model in SIZED
    folder = minireel.WEIGHTS if boxed else Path(str(model)).expanduser()
    tokens = grid_of(grid, size, text, default=boxed)
    found = inspection.inspect_plan(resolved, tokens, inspection.architecture_of(folder), steps=steps)
    if plot is not None:
        inspection.plot(found, plot)
    _print(found)
    if plot is not None:
        console.say(f"wrote {plot}")
    console.emit_json(json, found.to_dict())


def grid_of(grid: str | None, size: str | None, text: int, *, default: bool = True) -> TokenGrid:
    """The grid of `--grid`, else of minireel's `--size` where minireel is the model."""
    from sparsereel import minireel
    from sparsereel.grid import TokenGrid

    if grid is not None and size is not None:
        raise ValueError("give either --grid or --size, not both")
    if grid is not None:
        try:
            frames, height, width = (int(part) for part in grid.lower().split("x"))
        except ValueError:
            raise ValueError(f"--grid must be FRAMESxHEIGHTxWIDTH, such as 21x30x52, got {grid!r}") from None
        return TokenGrid(frames, height, width, text)
    if size is None and not default:
        raise ValueError("with --model give --grid FRAMESxHEIGHTxWIDTH: tokens after patchify")
    sizes = {"native": minireel.NATIVE, "large": minireel.LARGE}
    chosen = sizes.get(size or "large")
    if chosen is None:
        raise ValueError(f"unknown size {size!r}; allowed: {', '.join(sizes)}")
    return TokenGrid((chosen.frames - 1) // 4 + 1, chosen.height // 8, chosen.width // 8, text)


def _print(found: Inspection) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layer", "heads", "does", "density", "tokens", "GFLOP"):
        table.add_column(name, justify="left" if name in ("heads", "does") else "right")
    for group in found.groups:
        heads = "all" if len(group.heads) == found.heads else ",".join(map(str, group.heads))
        shares = (f"{group.density:.3f}", f"{group.token_density:.3f}")
        table.add_row(str(group.layer), heads, group.does, *shares, f"{group.flops / 1e9:.2f}")
    console.say(f"plan {found.plan}")
    console.say(f"grid {found.grid}: {found.tokens} tokens, {found.steps} steps, tile order {found.tile or 'not used'}")
    console.people.print(table)
    console.say(
        f"density {found.density:.3f}: {found.flops / 1e9:.2f} of {found.dense_flops / 1e9:.2f} GFLOP of attention "
        "a forward pass, mean over the steps"
    )
    if found.note:
        console.say(found.note)
