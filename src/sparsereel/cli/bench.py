"""`sparsereel bench`: measure this machine once, so that predictions and the choice of kernels fit it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsereel.cli import console

if TYPE_CHECKING:
    from sparsereel_kernels.cost import Fit

app = typer.Typer(help="Measure this machine.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command()
def cost(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    tokens: Annotated[list[int] | None, typer.Option(min=256, help="Lengths; may be given several times.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(min=8, max=256, help="Head sizes, likewise.")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Forward and backward together as well.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contender; the median counts.")] = 3,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Cost table; default in the cache.")] = None,
    json: Annotated[str | None, typer.Option("--json", help="Write the fits as JSON here, or - for stdout.")] = None,
) -> None:
    """Measure seconds of attention over lengths, densities and head sizes; store them for `auto` and predictions."""
    import torch

    from sparsereel.files import write_json
    from sparsereel.generation import environment
    from sparsereel_kernels import cost as tables
    from sparsereel_kernels import dispatch, measure_cost, speed_table

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; allowed: cpu, cuda")
    defaults = measure_cost.Sweep()
    samples: list[measure_cost.Sample] = []
    for direction in (False, True) if backward else (False,):
        sweep = measure_cost.Sweep(
            device=device,
            tokens=tuple(tokens or defaults.tokens),
            head_dims=tuple(head_dim or defaults.head_dims),
            backward=direction,
            repeats=repeats,
        )
        samples += _measured(sweep, "forward and backward" if direction else "forward")
    fits = measure_cost.fit(samples, device)
    table = tables.to_table(fits, {"environment": environment(), "samples": [vars(sample) for sample in samples]})
    path = output or tables.user_file()
    write_json(path, table)
    if output is None:
        entries = measure_cost.orders(samples, device)
        write_json(speed_table.user_file(), {"version": speed_table.VERSION, "entries": entries})
    dispatch.forget()
    _print(fits)
    console.say(f"wrote {path}")
    console.emit_json(json, table)


@app.command()
def attention(
    plan: Annotated[str, typer.Option(help="Preset or plan file; each of its patterns is timed.")] = "radial",
    grid: Annotated[str, typer.Option(help="Tokens after patchify, such as 21x30x52.")] = "8x32x32",
    heads: Annotated[int, typer.Option(min=1, help="Number of heads.")] = 4,
    head_dim: Annotated[int, typer.Option(min=8, max=256, help="Features of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backward: Annotated[bool, typer.Option("--backward", help="Time forward and backward together.")] = False,
    backend: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contender; the median counts.")] = 5,
    json: Annotated[str | None, typer.Option("--json", help="Write the result as JSON here, or - for stdout.")] = None,
) -> None:
    """Time the kernels on a plan's masks against dense SDPA, taking turns; prints both sides and the ratio."""
    from sparsereel.cli.inspect import grid_of
    from sparsereel.timing import time_attention

    found = time_attention(
        plan,
        grid_of(grid, None, 0),
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        backward=backward,
        repeats=repeats,
        backends=tuple(backend) if backend else None,
    )
    machine = found["environment"]
    shape = " x ".join(map(str, found["shape"]))
    console.say(f"{shape} {dtype}, {machine['threads']} threads of {machine['machine']}")
    numbers = ("density", "token_density", "seconds", "speedup", "share_of_ideal", "share_of_ideal_tokens")
    _table(found["rows"], ("pattern", "backend"), numbers)
    console.emit_json(json, found)


@app.command()
def pipeline(
    prompt: Annotated[str, typer.Argument(help="The prompt.")] = "a red 3 moving right on navy",
    plan: Annotated[str, typer.Option(help="Preset or plan file.")] = "radial",
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a pipeline; default minireel.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Number of frames.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    backend: Annotated[str, typer.Option(help="Kernel backend; see `sparsereel doctor`.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind after one to warm up.")] = 1,
    json: Annotated[str | None, typer.Option("--json", help="Write the result as JSON here, or - for stdout.")] = None,
) -> None:
    """Time a whole clip dense and with a plan, beside what Amdahl's law allows at its density."""
    from sparsereel.generation import Request, load_pipeline
    from sparsereel.presets import resolve_plan
    from sparsereel.timing import time_pipeline

    resolved = resolve_plan(plan)
    request = Request(prompt, steps=steps, frames=frames, height=height, width=width)
    found = time_pipeline(load_pipeline(model, dtype, device), request, resolved, repeats=repeats, backend=backend)
    _table(
        [{"": name, **found[name]} for name in ("dense", "sparse")], ("",), ("seconds", "attention_seconds", "density")
    )
    console.say(
        f"{found['speedup']:.2f} times faster; self-attention was {found['attention_share']:.0%} of the dense clip; "
        f"Amdahl's law at this density: {found['amdahl']:.2f}, of which this is {found['share_of_amdahl']:.2f}"
    )
    console.emit_json(json, found)


@app.command()
def tune(
    tokens: Annotated[int, typer.Option(min=1, help="Sequence length.")] = 32768,
    heads: Annotated[int, typer.Option(min=1, help="Number of heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=8, max=256, help="Features of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    density: Annotated[float, typer.Option(help="Share of key blocks, above 0 and up to 1.")] = 0.2,
) -> None:
    """Try other tiles of the Triton kernels on this GPU and store the fastest that agrees; dispatch reads them."""
    import torch

    from sparsereel.generation import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if not 0 < density <= 1:
        raise ValueError(f"--density must lie above 0 and up to 1, got {density}")
    if not torch.cuda.is_available():
        raise typer.Exit(console.complain("tuning needs a CUDA device; torch finds none here", console.MISSING))
    from sparsereel_kernels.triton import configs
    from sparsereel_kernels.triton.tune import tune as tuned

    found = tuned(tokens=tokens, heads=heads, head_dim=head_dim, dtype=DTYPES[dtype], density=density)
    for kernel, config in found.items():
        console.say(f"{kernel:8} {config}")
    console.say(f"stored in {configs.user_file()}")


def _table(rows: list[dict[str, Any]], names: tuple[str, ...], numbers: tuple[str, ...]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name)
    for name in numbers:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in names), *(f"{row[name]:.4g}" for name in numbers))
    console.people.print(table)


def _measured(sweep: Any, what: str) -> list[Any]:
    from rich.progress import track

    from sparsereel_kernels import measure_cost

    found: list[Any] = []
    total = measure_cost.shapes(sweep)
    for batch in track(measure_cost.measure(sweep), what, total=total, console=console.people):
        found += batch
    return found


def _print(fits: list[Fit]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("dtype", "backend", "direction"):
        table.add_column(name)
    for name in ("head_dim", "dense", "blocks at 0.2", "stripes at 0.2", "fit error"):
        table.add_column(name, justify="right")
    for fit in fits:
        dense, blocks, stripes = (
            1000 * fit.seconds(8192, *densities) for densities in ((1.0, 1.0), (0.2, 0.2), (1.0, 0.2))
        )
        direction = "both" if fit.backward else "forward"
        sparse = ("-", "-") if fit.backend == "sdpa" else (f"{blocks:.1f}", f"{stripes:.1f}")
        cells = (str(fit.head_dim), f"{dense:.1f}", *sparse, f"{100 * fit.error:.0f}%")
        table.add_row(fit.dtype, fit.backend, direction, *cells)
    console.people.print(table)
    console.say("milliseconds of one head over 8,192 tokens")
