"""Tiles, warps and stages of every kernel: a reviewed table, and what `tune` found on this machine.

The table is keyed by architecture, kernel, bits of a number and padded width of the larger head dim. What it holds has
been compiled for its architecture (compile_check.py: no spills in forward, tensor-core instructions, shared memory
within bounds); which entries are fastest is for `tune` to say, whose results are read from
$XDG_CACHE_HOME/sparsereel/triton.json (by default ~/.cache/sparsereel/triton.json) and come first.

Tiles follow the mask: a tile is at most the largest power of two that divides the mask's block, and at least 16
(blocks of 8, 24, ... tokens are walked in tiles of 16 whose rest is masked).
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

VERSION = 1
SMALLEST_TILE = 16
KERNELS = ("forward", "queries", "keys")
WIDTHS = (64, 128, 256)
logger = logging.getLogger("sparsereel_kernels")


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        tile_m, tile_n: queries and keys of a tile, powers of two from 16 to 256. Larger tiles reuse more of what they
            load, and need more registers.
        num_warps: 1, 2, 4, 8 or 16 groups of 32 (AMD: 64) threads.
        num_stages: tiles in flight; more hide more latency, and need more shared memory.
        tma: load through tensor descriptors where the inputs allow it (sm_90 and later).

    Raises:
        ValueError: a number outside these.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "tile_m": (16, 32, 64, 128, 256),
            "tile_n": (16, 32, 64, 128, 256),
            "num_warps": (1, 2, 4, 8, 16),
            "num_stages": tuple(range(1, 9)),
            "tma": (False, True),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if type(value) not in (int, bool) or value not in values:
                raise ValueError(f"{name} must be one of {', '.join(map(str, values))}, got {value!r}")


def _table(rows: dict[str, tuple[Config, Config, Config]]) -> dict[tuple[str, int, int], Config]:
    """(kernel, bits, width) -> Config from rows "kernel bits" of one Config a width."""
    table = {}
    for key, configs in rows.items():
        kernel, bits = key.split()
        for width, config in zip(WIDTHS, configs, strict=True):
            table[kernel, int(bits), width] = config
    return table


# Exact fp32 products run on plain FMAs, unrolled over the head dim: larger tiles spill.
_FP32 = {
    "forward 32": (Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 4, 1)),
    "queries 32": (Config(32, 16, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
    "keys 32": (Config(16, 32, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 8, 1)),
}
# 163 KiB of shared memory a block.
_SM80 = _table(
    {
        "forward 16": (Config(128, 64, 4, 3), Config(128, 32, 8, 3), Config(64, 64, 8, 2)),
        "queries 16": (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
        "keys 16": (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 64, 8, 1)),
        **_FP32,
        "forward 32": (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    }
)
# 99 KiB of shared memory a block.
_SM89 = _table(
    {
        "forward 16": (Config(128, 64, 4, 3), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
        "queries 16": (Config(64, 64, 8, 2), Config(64, 64, 8, 1), Config(64, 32, 8, 1)),
        "keys 16": (Config(64, 64, 8, 2), Config(32, 64, 8, 1), Config(16, 64, 8, 1)),
        **_FP32,
    }
)
# 227 KiB of shared memory a block; wgmma takes 64 rows a group of 4 warps.
_SM90 = _table(
    {
        "forward 16": (Config(128, 64, 8, 4, True), Config(128, 64, 8, 3, True), Config(64, 64, 8, 2, True)),
        "queries 16": (Config(128, 64, 8, 3, True), Config(128, 64, 8, 2, True), Config(32, 64, 8, 1, True)),
        "keys 16": (Config(64, 64, 4, 2, True), Config(64, 64, 8, 2, True), Config(32, 32, 8, 1, True)),
        **_FP32,
    }
)
# 227 KiB of shared memory a block; accumulators lie in tensor memory, in tiles of 128 rows.
_SM100 = _table(
    {
        "forward 16": (Config(128, 64, 8, 3, True), Config(128, 64, 8, 2, True), Config(128, 32, 8, 2, True)),
        "queries 16": (Config(128, 64, 8, 2, True), Config(128, 64, 8, 2, True), Config(64, 64, 8, 1, True)),
        "keys 16": (Config(64, 64, 8, 2, True), Config(64, 64, 8, 1, True), Config(32, 64, 8, 1, True)),
        **_FP32,
    }
)
# 99 KiB of shared memory a block, TMA, but the products of sm_80.
_SM120 = _table(
    {
        "forward 16": (Config(128, 64, 8, 3, True), Config(64, 64, 8, 2, True), Config(64, 32, 8, 2, True)),
        "queries 16": (Config(64, 64, 8, 2, True), Config(64, 64, 8, 1, True), Config(64, 32, 8, 1, True)),
        "keys 16": (Config(32, 64, 4, 2, True), Config(32, 64, 8, 1, True), Config(16, 64, 8, 1, True)),
        **_FP32,
        # 32 x 16 spills with tf32 products.
        "forward 32": (Config(32, 32, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
    }
)
# 64 KiB of shared memory a block, 64 threads a warp, 512 registers a thread.
_GFX942 = _table(
    {
        "forward 16": (Config(128, 64, 4, 2), Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
        "queries 16": (Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 32, 4, 1)),
        "keys 16": (Config(64, 64, 4, 1), Config(32, 64, 4, 1), Config(32, 32, 4, 1)),
        "forward 32": (Config(64, 32, 4, 1), Config(64, 32, 4, 1), Config(32, 16, 4, 1)),
        "queries 32": (Config(64, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 16, 4, 1)),
        "keys 32": (Config(32, 64, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 4, 1)),
    }
)
TABLE = {"sm80": _SM80, "sm89": _SM89, "sm90": _SM90, "sm100": _SM100, "sm120": _SM120, "gfx942": _GFX942}
WITH_TMA = ("sm90", "sm100", "sm120")


def architecture_of(capability: tuple[int, int], hip: bool = False) -> str:
    """The table's name for a CUDA compute capability; an unknown one gets the row that asks for least."""
    if hip:
        return "gfx942"
    major, minor = capability
    if major == 8:
        return "sm80" if minor == 0 else "sm89"
    return {9: "sm90", 10: "sm100", 12: "sm120"}.get(major, "sm89")


def bucket(width: int) -> int:
    """The table's width for a padded head dim."""
    return next(w for w in WIDTHS if width <= w)


def tile_of(block: int, wished: int) -> int:
    """The largest power of two that divides `block`, at most `wished` and at least 16."""
    return max(SMALLEST_TILE, min(wished, block & -block))


def fitted(config: Config, block: tuple[int, int]) -> Config:
    """`config` with tiles that divide the mask's block, and no more warps than such tiles keep busy."""
    tile_m, tile_n = tile_of(block[0], config.tile_m), tile_of(block[1], config.tile_n)
    warps = config.num_warps
    while warps > 1 and tile_m * tile_n * 2 < config.tile_m * config.tile_n and tile_m * tile_n < warps * 512:
        warps //= 2
    return replace(config, tile_m=tile_m, tile_n=tile_n, num_warps=warps)


def choose(device: str, architecture: str, kernel: str, bits: int, width: int, block: tuple[int, int]) -> Config:
    """The configuration to launch: what was tuned on `device` for these blocks, else the table's, fitted."""
    key = tuned_key(device, kernel, bits, width, block)
    config = tuned().get(key) or TABLE[architecture][kernel, bits, bucket(width)]
    return fitted(config, block)


# ---------------------------------------------------------------- what tune found


def user_file() -> Path:
    """Where this user's tuned configurations lie, whether or not the file exists."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsereel" / "triton.json"


def tuned_key(device: str, kernel: str, bits: int, width: int, block: tuple[int, int]) -> str:
    """The name of one entry of the file."""
    return f"{device}|{kernel}|{bits}|{bucket(width)}|{block[0]}x{block[1]}"


@lru_cache(maxsize=1)
def tuned() -> dict[str, Config]:
    """The file's entries; a file or an entry that cannot be read is left out with a warning. Read once a process."""
    path = user_file()
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["version"] != VERSION:
            raise ValueError(f"version {table['version']}, expected {VERSION}")
        return {str(key): _config(entry) for key, entry in table["entries"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("tuned configurations %s are left out: %s: %s", path, type(error).__name__, error)
        return {}


def _config(entry: dict[str, Any]) -> Config:
    return Config(**{name: entry[name] for name in ("tile_m", "tile_n", "num_warps", "num_stages", "tma")})


def save(found: dict[str, Config]) -> Path:
    """Add entries to the file (replacing those of the same key) and make this process read it again."""
    path = user_file()
    entries = {key: asdict(config) for key, config in {**tuned(), **found}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"version": VERSION, "entries": entries}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    tuned.cache_clear()
    return path
