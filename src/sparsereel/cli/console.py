"""Where text goes and how a command ends: tables to stderr or stdout, errors in one sentence, exit codes.

Exit codes: 0 done, 1 a stated threshold missed, 2 wrong use or input, 4 something needed is missing, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

MISSED, WRONG_INPUT, MISSING, INTERRUPTED = 1, 2, 4, 130

#: everything meant for people; stdout is left to `--json -`
people = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for people; square brackets are printed as they are."""
    people.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that goes when it is full, on terminals only; the function takes how many are done, and of how many."""
    from rich.progress import Progress

    with Progress(console=people, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def complain(message: str, code: int = WRONG_INPUT) -> int:
    """Print what went wrong; returns the exit code."""
    people.print(f"sparsereel: {message.strip()}", markup=False, soft_wrap=True)
    return code


def emit_json(target: str | None, data: Any) -> None:
    """Write `--json PATH` or, for `-`, to stdout."""
    if target is None:
        return
    if target == "-":
        json.dump(data, sys.stdout, indent=2, ensure_ascii=False)
        sys.stdout.write("\n")
        return
    from sparsereel.files import write_json

    write_json(Path(target), data)
