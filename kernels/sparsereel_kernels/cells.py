"""Cells: the pieces of a partial block that the native CPU kernels work on or leave out.

They take the rows of a query block in panels of at most 12 and its columns in strips of 16 keys, and leave a strip out
that no row of the panel may see. So a block with a few stripes costs them its live cells, where other kernels pay for
the whole block.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

#: rows of a panel at most, columns of a strip (csrc/forward.h, csrc/unit.h; with AMX panels are of 32 rows)
PANEL, STRIP = 12, 16


def panel_starts(rows: int) -> list[int]:
    """First rows of the panels of a block, and its end: panels of like size, the larger ones first."""
    panels = -(-rows // PANEL)
    size, larger = divmod(rows, panels)
    return [panel * size + min(panel, larger) for panel in range(panels + 1)]


def count_cells(block: tuple[int, int]) -> int:
    """Cells of a whole block."""
    return (len(panel_starts(block[0])) - 1) * -(-block[1] // STRIP)


def live_cells(bits: Tensor) -> Tensor:
    """Cells that hold an allowed pair, for every tile: uint8 [U, BQ, BK // 8] to int64 [U]."""
    tiles, rows, octets = bits.shape
    # A strip is two octets; the last strip of a block may be half of one.
    allowed = torch.nn.functional.pad(bits, (0, octets % 2)).unflatten(-1, (-1, STRIP // 8)).any(-1)
    starts = panel_starts(rows)
    live = torch.zeros(tiles, dtype=torch.int64, device=bits.device)
    for first, end in itertools.pairwise(starts):
        live += allowed[:, first:end].any(1).sum(-1)
    return live
