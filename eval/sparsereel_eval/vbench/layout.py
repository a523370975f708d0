"""Names and places of VBench clips: `{prompt}-{index}.mp4` in one flat folder, index 0 to 4 (24 for flickering).

A prompt becomes a file name here, as the official program reads it back from there; so it is checked first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sparsereel_eval.readers import CLIP_SUFFIXES
from sparsereel_eval.vbench.names import FLICKERING_SAMPLES, SAMPLES, SUITES, dimension

_LONGEST = 255  # bytes of a file name


def clip_name(prompt: str, index: int, suffix: str = ".mp4") -> str:
    """File name of a prompt's clip.

    Raises:
        ValueError: the prompt cannot be a file name (separators, leading dot, over 255 bytes) or the index is negative.
    """
    name = f"{prompt}-{index}{suffix}"
    if not prompt.strip() or re.search(r"[/\\\x00-\x1f]", prompt) or prompt.startswith("."):
        raise ValueError(f"the prompt {prompt[:60]!r} cannot be a file name; save its clip under a shorter, plain one")
    if len(name.encode()) > _LONGEST:
        raise ValueError(f"the prompt {prompt[:60]!r}... makes a file name over {_LONGEST} bytes; use the short prompt")
    if index < 0:
        raise ValueError(f"the index of a clip must be 0 or more, got {index}")
    return name


def prompt_of(path: Path) -> tuple[str, int | None]:
    """Prompt and index from a clip's name; the index is None where the name does not end in -NUMBER."""
    found = re.fullmatch(r"(.*)-(\d+)", path.stem, re.DOTALL)
    return (found[1], int(found[2])) if found else (path.stem, None)


@dataclass(frozen=True)
class Coverage:
    """How much of a suite is there: expected and found clips, and the names of the missing."""

    expected: int
    found: int
    missing: tuple[str, ...]


def coverage(folder: Path, prompts: Iterable[str], suite: str | None = None) -> Coverage:
    """Compare a folder with what a suite's prompts call for; equal prompts count once.

    Raises:
        ValueError: the folder does not exist, or a prompt cannot be a file name.
    """
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist")
    samples = FLICKERING_SAMPLES if suite == "temporal_flickering" else SAMPLES
    there = {path.stem for path in folder.iterdir() if path.suffix.lower() in CLIP_SUFFIXES}
    wanted = [clip_name(p, i, "") for p in dict.fromkeys(prompts) for i in range(samples)]
    missing = tuple(name for name in wanted if name not in there)
    return Coverage(len(wanted), len(wanted) - len(missing), missing)


@dataclass(frozen=True)
class Prompt:
    """An entry of the official VBench_full_info.json; `style` is the phrase that appearance_style compares with."""

    text: str
    dimensions: tuple[str, ...]
    style: str | None = None


def read_info(path: Path) -> list[Prompt]:
    """The official prompts of every dimension.

    Raises:
        ValueError: unreadable, or not of the official form.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for entry in data:
            about = (entry.get("auxiliary_info") or {}).get("appearance_style") or {}
            style = about.get("appearance_style") if isinstance(about, dict) else about
            found.append(Prompt(entry["prompt_en"], tuple(map(dimension, entry["dimension"])), style))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no VBench_full_info.json: it must list prompt_en and dimension") from error
    if not found:
        raise ValueError(f"{path} holds no prompts")
    return found


def read_suite(folder: Path, suite: str) -> list[str]:
    """Prompts of `prompts_per_dimension/{suite}.txt` of a copy of the official prompts.

    Raises:
        ValueError: unknown suite, no such file, or another number of prompts than the official file has.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; allowed: {', '.join(SUITES)}")
    path = folder / "prompts_per_dimension" / f"{suite}.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) != SUITES[suite]:
        raise ValueError(f"{path} holds {len(prompts)} prompts, the official suite has {SUITES[suite]}")
    return prompts
