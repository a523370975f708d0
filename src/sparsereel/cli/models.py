"""`sparsereel models`: the model families whose attention can be replaced."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsereel.cli import console


def models(
    json: Annotated[str | None, typer.Option("--json", help="Write the result as JSON here, or - for stdout.")] = None,
) -> None:
    """List the supported models."""
    from rich.table import Table

    from sparsereel.families import FAMILIES

    table = Table(box=None, pad_edge=False)
    for name in ("family", "models", "classes", "seam"):
        table.add_column(name)
    for family in FAMILIES:
        table.add_row(family.name, family.covers, ", ".join(family.classes), family.seam)
    console.people.print(table)
    rows = [{"family": f.name, "models": f.covers, "classes": list(f.classes), "seam": f.seam} for f in FAMILIES]
    console.emit_json(json, rows)
