"""When a selector computes its scores again: the one entry that attention layers call."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsereel.schedule import share_of
from sparsereel.selectors.base import Memory, Selection, SelectionContext, Selector


@torch.no_grad()
def refreshing(selector: Selector, q: Tensor, k: Tensor, context: SelectionContext) -> Selection:
    """The selection for this call: a new one where the selector's refresh policy asks for it, else the latest.

    Every branch, layer, set of heads and geometry has a memory of its own in `context.state`. A selection is also made
    anew where key lengths changed, and where the step lies before the latest one (a new generation).

    Args:
        q: [B, H, S, D], after rotary embedding.
        k: [B, Hkv, S, D].

    Returns:
        A selection whose mask has H heads. Where it carries orders, attention runs on `selection.arrange(q, k, v)` and
        its output goes through `selection.restore`.

    Raises:
        ValueError: shapes that do not agree with each other or with the grid.
    """
    memory = context.memory(selector, q, k)
    if memory.selection is not None and _other_lengths(memory, context):
        memory.selection = None
        memory.notes.clear()
    if memory.selection is None or _due(selector, memory, context):
        memory.selection = selector(q, k, context)
        memory.step = context.step
        memory.key_lengths = None if context.key_lengths is None else context.key_lengths.clone()
    memory.latest = context.step
    return memory.selection


def served_steps(selector: Selector, steps: int) -> float:
    """How many steps of a run of `steps` one selection serves, on average."""
    policy = selector.refresh
    if policy == "once":
        return float(max(1, steps))
    if isinstance(policy, tuple):
        # One at the first call, then one at each moment.
        return max(1.0, steps / (1 + len(policy)))
    return float(min(int(policy), max(1, steps)))


def _due(selector: Selector, memory: Memory, context: SelectionContext) -> bool:
    policy = selector.refresh
    if policy == "once":
        return False
    if isinstance(policy, tuple):
        moments = (share_of(moment, context.steps) for moment in policy)
        return any(memory.step < moment <= context.step for moment in moments)
    # A step may call a layer twice (second-order schedulers), with other q and k.
    return policy == 1 or context.step >= memory.step + int(policy)


def _other_lengths(memory: Memory, context: SelectionContext) -> bool:
    old, new = memory.key_lengths, context.key_lengths
    if old is None or new is None:
        return old is not new
    return not torch.equal(old, new)
