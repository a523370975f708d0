"""`sparsereel doctor`: versions, kernels and what stands in their way. Exit code 1 when a need is not met."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsereel.cli import console

_MARKS = {True: "ok", False: "MISSING", None: ""}


def doctor(
    build: Annotated[bool, typer.Option("--build", help="Build the native CPU kernels now.")] = False,
    json: Annotated[str | None, typer.Option("--json", help="Write the result as JSON here, or - for stdout.")] = None,
) -> int:
    """Say what this machine has for sparsereel, and what it lacks."""
    from rich.markup import escape
    from rich.table import Table

    from sparsereel.diagnosis import diagnose

    found = diagnose(build=build)
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in found.findings:
        table.add_row(finding.topic, _MARKS[finding.ok], escape(finding.text))
    console.people.print(table)
    console.say("everything needed is here" if found.healthy else "something needed is missing: see above")
    console.emit_json(json, found.to_dict())
    return 0 if found.healthy else console.MISSED
