"""What a call is expected to cost: from a table measured on this machine where there is one, else by density.

`sparsereel bench cost` measures once and stores a fit for each dtype, head_dim, backend and direction:

    seconds of one head = fixed + per_token * S + per_pair * S^2 * done + per_waste * S^2 * (visited - done)

`visited` is the density. A block kernel pays for every pair of a block it visits, allowed or not: `done` is the token
density and `per_waste` comes out like `per_pair`. The native CPU kernels look inside partial blocks and leave out cells
where no pair is allowed: `done` is the cell density, and `per_waste` the little that looking costs, so that a mask of
thin stripes costs far less there than its blocks say. The table is read, never measured, by a call.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import speed_table
from .block_mask import BlockMask
from .problem import dtype_name

VERSION = 2
logger = logging.getLogger("sparsereel_kernels")

#: What a pair that is visited and not done costs beside one that is, where no table says. Measured on windows and
#: radial masks of 8,192 to 32,768 tokens in nine orders: 0 to 0.08 on the CPU; block kernels pay in full.
PAID_WASTE = {"cpu": 0.06}


@dataclass(frozen=True)
class Fit:
    """One row of the table; seconds for one head of one sample. `error` is the median relative error of the fit."""

    device: str
    name: str
    threads: int
    dtype: str
    head_dim: int
    backend: str
    backward: bool
    fixed: float
    per_token: float
    per_pair: float
    per_waste: float
    error: float

    def seconds(self, tokens: int, density: float, done: float) -> float:
        """Seconds for one head over `tokens` queries and keys; `done` as `done_density` tells it."""
        pairs = float(tokens) ** 2
        waste = max(0.0, density - done)
        return self.fixed + self.per_token * tokens + self.per_pair * pairs * done + self.per_waste * pairs * waste

    def for_head_dim(self, head_dim: int) -> Fit:
        """The same fit for another head_dim: products grow with it."""
        ratio = head_dim / self.head_dim
        scaled = {key: getattr(self, key) * ratio for key in ("per_token", "per_pair", "per_waste")}
        return Fit(**{**asdict(self), **scaled, "head_dim": head_dim})


def user_file() -> Path:
    """Where this user's table lies, whether or not it exists."""
    return speed_table.user_file().with_name("cost.json")


@lru_cache(maxsize=1)
def load() -> tuple[Fit, ...]:
    """The fits for this machine's processors; a table that cannot be read is left out with a warning."""
    path = user_file()
    if not path.is_file():
        return ()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["version"] != VERSION:
            raise ValueError(f"version {table['version']}, expected {VERSION}")
        fits = tuple(Fit(**row) for row in table["fits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("cost table %s is left out: %s: %s", path, type(error).__name__, error)
        return ()
    return tuple(fit for fit in fits if fit.name == speed_table.device_name(fit.device))


def find(device_type: str, dtype: torch.dtype, head_dim: int, backend: str, *, backward: bool = False) -> Fit | None:
    """The fit for such calls on this machine, from the nearest head_dim measured; None without a table."""
    kind = (device_type, dtype_name(dtype), backend, backward)
    fitting = [fit for fit in load() if (fit.device, fit.dtype, fit.backend, fit.backward) == kind]
    if not fitting:
        return None
    return min(fitting, key=lambda fit: abs(fit.head_dim - head_dim)).for_head_dim(head_dim)


def done_density(mask: BlockMask, backend: str) -> float:
    """Share of all pairs that `backend` cannot leave out: allowed ones, on the CPU with all pairs of their cells."""
    return mask.cell_density if backend == "cpu" else mask.token_density


def work_share(mask: BlockMask | None, backend: str) -> float:
    """Work of a call with `mask` over that of a dense one, whatever the machine (1 for None)."""
    if mask is None:
        return 1.0
    return _work(mask.density, done_density(mask, backend), backend)


def _work(density: float, done: float, backend: str) -> float:
    return done + PAID_WASTE.get(backend, 1.0) * max(0.0, density - done)


def expected_share(
    mask: BlockMask | None,
    backend: str,
    *,
    device_type: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
) -> float:
    """Time of a call with `mask` over the time of the dense call on the same backend (1 for None).

    Args:
        backend: the name of the one that will run.
        device_type, dtype, head_dim: of the call; they matter where a table was measured.
    """
    if mask is None:
        return 1.0
    shares = (mask.density, done_density(mask, backend))
    return expected_share_of(mask.seq_lengths[1], *shares, backend, device_type, dtype, head_dim)


def expected_share_of(
    tokens: int, density: float, done: float, backend: str, device_type: str, dtype: torch.dtype, head_dim: int
) -> float:
    """`expected_share` for a mask of which only the densities are known (`done` as `done_density` tells it)."""
    fit = find(device_type, dtype, head_dim, backend)
    if fit is not None:
        return fit.seconds(tokens, density, done) / fit.seconds(tokens, 1.0, 1.0)
    return _work(density, done, backend)


def to_table(fits: list[Fit], facts: dict[str, Any]) -> dict[str, Any]:
    """What goes into the file."""
    return {"version": VERSION, **facts, "fits": [asdict(fit) for fit in fits]}
