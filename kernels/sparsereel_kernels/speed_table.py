"""The stored table of which backend is fastest where. Read, never measured, by a call.

A table is JSON: `{"version": 1, "entries": [{"device": "cpu", "name": "AMD EPYC", "dtype": "bfloat16", "head_dim": 64,
"tokens": 16384, "density": 0.2, "backward": false, "order": ["cpu", "torch"]}, ...]}`, `order` from fastest to slowest.
Tables lie in the package (tables/*.json) and in the user's cache folder ($XDG_CACHE_HOME/sparsereel/speed.json, by
default ~/.cache/sparsereel/speed.json); the user's entries come first. `name` must equal this machine's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .problem import dtype_name

if TYPE_CHECKING:
    from .block_mask import BlockMask
    from .problem import Problem

VERSION = 1
logger = logging.getLogger("sparsereel_kernels")
Entry = dict[str, Any]
FIELDS = ("device", "name", "dtype", "head_dim", "tokens", "density", "backward", "order")


def user_file() -> Path:
    """Where this user's table lies, whether or not it exists."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsereel" / "speed.json"


@lru_cache(maxsize=1)
def load() -> tuple[Entry, ...]:
    """All entries for this machine's processors; a table that cannot be read is left out with a warning."""
    entries: list[Entry] = []
    shipped = resources.files("sparsereel_kernels").joinpath("tables")
    files = [user_file()]
    if shipped.is_dir():
        files += sorted((Path(str(path)) for path in shipped.iterdir() if path.name.endswith(".json")), key=str)
    for path in files:
        if path.is_file():
            entries += _read(path)
    return tuple(entry for entry in entries if entry["name"] == device_name(entry["device"]))


def _read(path: Path) -> list[Entry]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["version"] != VERSION:
            raise ValueError(f"version {table['version']}, expected {VERSION}")
        return [{field: entry[field] for field in FIELDS} for entry in table["entries"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("speed table %s is left out: %s: %s", path, type(error).__name__, error)
        return []


@lru_cache(maxsize=8)
def device_name(device_type: str) -> str:
    """The model of this machine's processor ("cpu") or current GPU."""
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if device_type == "cpu":
        return _cpu_model()
    return device_type


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def density_step(mask: BlockMask | None) -> float:
    """Density rounded to a power of 2**0.5, so that choices can be remembered; 1 where no table could use it."""
    if mask is None or not load():
        return 1.0
    return 2.0 ** (round(2 * math.log2(max(mask.density, 1e-4))) / 2)


def order(problem: Problem, density: float) -> list[str]:
    """Backends from fastest to slowest by the entry nearest to `problem`; empty where no entry fits its kind."""
    kind = (problem.device_type, dtype_name(problem.dtype), problem.needs_backward)
    fitting = [entry for entry in load() if (entry["device"], entry["dtype"], entry["backward"]) == kind]
    if not fitting:
        return []

    def distance(entry: Entry) -> float:
        ratios = (entry["tokens"] / max(1, problem.kv_len), entry["density"] / density)
        return sum(abs(math.log2(ratio)) for ratio in ratios) + abs(math.log2(entry["head_dim"] / problem.head_dim))

    return list(min(fitting, key=distance)["order"])
