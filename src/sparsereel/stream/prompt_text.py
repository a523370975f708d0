"""Prompt switches as people write them: on the command line, in a YAML file, or typed while the stream runs."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsereel.stream.prompts import Switches


def parse_switches(text: str) -> Switches:
    """`0:a red 3 on navy;10:a green 7 on black`, seconds before each text; or the path of a YAML file.

    The file holds a list of `{time: seconds, prompt: text}`, or a mapping from seconds to texts.

    Raises:
        ValueError: neither; the part that is wrong is named.
    """
    if text.endswith((".yaml", ".yml")):
        return _from_file(Path(text))
    found = []
    for part in text.split(";"):
        time, colon, prompt = part.partition(":")
        if not part.strip():
            continue
        if not colon:
            raise ValueError(f"a prompt switch is written SECONDS:TEXT, got {part.strip()!r}")
        found.append((_seconds(time.strip()), prompt.strip()))
    if not found:
        raise ValueError("--prompts holds no prompt; it is written 0:TEXT;10:TEXT, or the path of a YAML file")
    return found


def _from_file(path: Path) -> Switches:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"the prompt file {path} is no YAML: {first}") from error
    if isinstance(data, dict):
        data = [{"time": time, "prompt": prompt} for time, prompt in data.items()]
    if not isinstance(data, list) or not data or not all(isinstance(item, dict) for item in data):
        raise ValueError(f"{path} must hold a list of {{time: SECONDS, prompt: TEXT}}")
    found = []
    for item in data:
        if set(item) != {"time", "prompt"}:
            raise ValueError(f"{path}: an entry has time and prompt, got {', '.join(map(str, item)) or 'nothing'}")
        found.append((_seconds(item["time"]), str(item["prompt"])))
    return found


def _seconds(given: Any) -> float:
    try:
        return float(given)
    except (TypeError, ValueError):
        raise ValueError(f"the time of a prompt switch must be a number of seconds, got {given!r}") from None


def typed_prompts(first: str) -> Iterator[str | None]:
    """`first`, then whatever line was typed last since the chunk before; None = nothing was."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            if line.strip():
                lines.put(line.strip())

    threading.Thread(target=read, daemon=True).start()
    yield first
    while True:
        newest = None
        while not lines.empty():
            newest = lines.get()
        yield newest
