"""What a call is expected to cost: from a table measured on this machine where there is one, else by density.

`sparsereel bench cost` measures once and stores a fit for each dtype, head_dim, backend and direction:

    seconds of one head = fixed + per_token * S + per_pair * S^2 * allowed + per_waste * S^2 * (visited - allowed)

`allowed` is the token density, `visited` the density. A block kernel pays for every pair of a block it visits; the
native CPU kernels look inside partial blocks and skip strips of 16 keys that no row of a panel may see, so a mask of
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

VERSION = 1
logger = logging.getLogger("sparsereel_kernels")

#: Share of the pairs visited in vain that a backend pays for, where no table says. Measured on masks of radial,
#: temporal and window shape at 8,448 tokens: 0.05 to 0.4 on the CPU; block kernels pay in full.
PAID_WASTE = {"cpu": 0.35}


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

    def seconds(self, tokens: int, density: float, token_density: float) -> float:
        """Seconds for one head over `tokens` queries and keys."""
        pairs = float(tokens) ** 2
        waste = max(0.0, density - token_density)
        return (
            self.fixed
            + self.per_token * tokens
            + self.per_pair * pairs * token_density
            + self.per_waste * pairs * waste
        )

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
    tokens = mask.seq_lengths[1]
    fit = find(device_type, dtype, head_dim, backend)
    if fit is not None:
        return fit.seconds(tokens, mask.density, mask.token_density) / fit.seconds(tokens, 1.0, 1.0)
    waste = mask.density - mask.token_density
    return mask.token_density + PAID_WASTE.get(backend, 1.0) * waste


def to_table(fits: list[Fit], facts: dict[str, Any]) -> dict[str, Any]:
    """What goes into the file."""
    return {"version": VERSION, **facts, "fits": [asdict(fit) for fit in fits]}
