"""A plan used elsewhere than where it was searched for: said once, on the first forward."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from sparsereel.families.base import layout_length

if TYPE_CHECKING:
    from sparsereel.families.layout import Layout
    from sparsereel.runtime import ModelRuntime

logger = logging.getLogger("sparsereel")


def watch(model: torch.nn.Module, runtime: ModelRuntime) -> list[Any]:
    """Hooks that compare the first call with what the plan was calibrated on; none for plans that nobody searched.

    Must be installed after the hook in which the runtime notes its grid.
    """
    known = runtime.plan.calibration
    layouts, steps = known.get("geometry"), known.get("steps")
    if not isinstance(layouts, list) or not isinstance(steps, int):
        return []
    compared = False

    def compare(model: torch.nn.Module, args: Any) -> None:
        nonlocal compared
        # Compiled graphs know no step; the warning is not worth a graph break.
        if compared or torch.compiler.is_compiling() or runtime.layout is None:
            return
        if layout_length(runtime.layout) < runtime.plan.schedule.min_tokens:  # dense, so the plan has no part in it
            return
        compared = True
        step = runtime.step()
        text = difference(layouts, steps, runtime.layout, None if step is None else step.total)
        if text:
            logger.warning("this plan was searched for %s; it may cost or change more than it says", text)

    return [model.register_forward_pre_hook(compare)]


def difference(layouts: list[Any], steps: int, layout: Layout, total: int | None) -> str:
    """What differs from a calibration, in words; empty where nothing does."""
    parts = []
    # Models whose layers lie on several grids have one layout for the whole call.
    if list(layout) not in [list(known) for known in layouts]:
        parts.append(f"a grid of {_sizes(layouts[0])} and runs on {_sizes(layout)}")
    if total is not None and total != steps:
        parts.append(f"{steps} steps and runs with {total}")
    return ", ".join(parts)


def _sizes(layout: Any) -> str:
    """Frames x height x width of the first segment on a grid, in tokens."""
    for start in range(0, len(layout), 4):
        kind, *sizes = layout[start : start + 4]
        if kind < 2:
            return "x".join(map(str, sizes)) + " tokens"
    return f"{layout[1]} tokens"
