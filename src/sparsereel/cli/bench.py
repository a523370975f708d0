"""`sparsereel bench`: measure this machine once, so that predictions and the choice of kernels fit it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsereel.cli import console

if TYPE_CHECKING:
    from sparsereel_kernels.cost import Fit

app = typer.Typer(help="Measure this machine.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Keeps `cost` a command of its own: typer folds a lone command into its group."""


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
