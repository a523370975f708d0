"""Which blocks the heads of one call visit: patterns by masks from the cache, selectors by q and k; and whether that is
worth it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsereel.families.base import layout_length
from sparsereel.families.layout import Layout, decode
from sparsereel.grid import Permutation
from sparsereel.launches import Choice, Launch
from sparsereel.patterns.base import Pattern
from sparsereel.plan_entries import Method
from sparsereel.selectors import Selection, SelectionContext, Selector, refreshing
from sparsereel.selectors.refresh import served_steps
from sparsereel.sparse_layer import SparseLayer
from sparsereel.step import StepInfo
from sparsereel.token_order import BLOCK, MASKS, Tile, by_own_tile, from_tile_to, outside_video, tile_order
from sparsereel_kernels.cost import expected_share

if TYPE_CHECKING:
    from sparsereel.extend.change import Change
    from sparsereel.runtime import ModelRuntime

#: seconds of an operation of a selector over those of dense attention, on a CPU (benchmarks/selection.py: SparseD's
#: exact probe is half of the operations of a dense call and takes twice its time)
SELECTING = 4.0


@dataclass(frozen=True, eq=False)
class Request:
    """One call of a layer at a step where it may be sparse."""

    layer: SparseLayer
    methods: tuple[Method, ...]
    layout: Layout
    step: StepInfo
    q: torch.Tensor
    k: torch.Tensor
    key_lengths: torch.Tensor | None
    scale: float | None
    branch: str
    #: the choice has to be one mask for tokens in one order
    one_mask: bool = False

    @property
    def key(self) -> Any:
        """What residuals are kept for."""
        return self.layer.index, self.branch, self.layout, tuple(self.q.shape)


def choose(runtime: ModelRuntime, asked: Request) -> Choice | None:
    """Launches for all heads; None where every head is full."""
    static = {h: m for h, m in enumerate(asked.methods) if isinstance(m, Pattern)}
    chosen: dict[Selector, list[int]] = {}
    for head, method in enumerate(asked.methods):
        if isinstance(method, Selector):
            chosen.setdefault(method, []).append(head)
    heads = len(asked.methods)
    change = runtime.change(asked.layer, asked.layout, asked.q.device) if static else None
    tile = runtime.tile_of(asked.layout)
    moves = tile is None and (change is None or change.mixer is None)
    if moves:
        tile = runtime.call_tile(asked.layout, padded=asked.key_lengths is not None)
    order = None if tile is None else tile_order(asked.layout, tile)
    if moves and order is not None and chosen:
        asked = replace(asked, q=order.apply(asked.q, 2), k=order.apply(asked.k, 2))
    launches = _static(runtime, asked, static, change, tile) if static else []
    if not chosen and all(launch.mask is None for launch in launches):
        return None
    for selector, numbers in chosen.items():
        everyone = len(numbers) == heads
        launches.append(_selected(runtime, asked, selector, None if everyone else tuple(numbers), order))
    choice = replace(Choice.of(launches, heads), order=order if moves else None)
    compensation = runtime.plan.compensation
    if compensation is None:
        return choice
    isolated = outside_video(asked.layout, tile).to(asked.q.device)
    return replace(choice, compensation=compensation, isolated=isolated, layer=asked.layer.index)


def _static(
    runtime: ModelRuntime, asked: Request, static: dict[int, Pattern], change: Change | None, tile: Tile | None
) -> list[Launch]:
    """Launches of the heads with patterns, in a call whose tokens are in the order of `tile`: one for each order."""
    layout, device, layer = asked.layout, asked.q.device, asked.layer.index
    first = 0 if runtime.held_heads is None else runtime.held_heads.start
    patterns = [pattern.for_head(layer, first + head) for head, pattern in static.items()]
    splits = change is None and not asked.one_mask and runtime.may_move(layout, padded=asked.key_lengths is not None)
    if change is not None:
        patterns = [change.within(pattern) for pattern in patterns]
    groups = {tile: list(range(len(patterns)))}
    if splits:
        kernel = runtime.kernel_of_order(layout_length(layout), device.type)
        groups = by_own_tile(patterns, decode(layout), tile, kernel)
    heads, launches = tuple(static), []
    for place, members in groups.items():
        together = tuple(patterns[number] for number in members)
        order = None if place is None else tile_order(layout, place)
        mask = MASKS.get(together, decode(layout), block=BLOCK, device=device, layer=layer, order=order)
        index = None if mask is None or place == tile else from_tile_to(layout, tile, place, device)
        everyone = len(members) == len(asked.methods)
        launches.append(
            Launch(
                None if everyone else tuple(heads[number] for number in members),
                mask,
                None if mask is None or index is None else Selection(mask, index, index),
            )
        )
    return launches


def _selected(
    runtime: ModelRuntime, asked: Request, selector: Selector, heads: tuple[int, ...] | None, order: Permutation | None
) -> Launch:
    q, k = asked.q, asked.k
    if heads is not None:
        shared = [head * k.shape[1] // q.shape[1] for head in heads]
        q, k = q[:, list(heads)], k[:, shared]
    context = SelectionContext(
        grid=decode(asked.layout),
        block=BLOCK,
        scale=asked.scale,
        layer=asked.layer.index,
        step=asked.step.index,
        steps=asked.step.total,
        branch=asked.branch,
        key_lengths=asked.key_lengths,
        order=order,
        heads=heads,
        state=runtime.selections,
    )
    selection = refreshing(selector, q, k, context)
    return Launch(heads, selection.mask, selection)


def overhead(runtime: ModelRuntime, asked: Request) -> float:
    """What choosing blocks costs a call, as a share of a dense call, spread over the calls that it serves."""
    chosen = Counter(method for method in asked.methods if isinstance(method, Selector))
    if not chosen or runtime.plan.schedule.max_density >= 1:
        return 0.0
    grid, head_dim = decode(asked.layout), asked.q.shape[-1]
    dense = 4.0 * grid.seq_len**2 * head_dim * len(asked.methods)
    spent = (m.cost(grid, BLOCK, heads, head_dim) / served_steps(m, asked.step.total) for m, heads in chosen.items())
    return SELECTING * sum(spent) / dense


def too_dear(runtime: ModelRuntime, choice: Choice, q: torch.Tensor, overhead: float) -> str:
    """Why a choice is not worth running; empty where it is."""
    limit = runtime.plan.schedule.max_density
    if choice.density + overhead <= limit:
        return ""
    kernel = runtime.kernel(q, BLOCK)
    kind: dict[str, Any] = {"device_type": q.device.type, "dtype": q.dtype, "head_dim": q.shape[-1]}
    heads = [q.shape[1] if launch.heads is None else len(launch.heads) for launch in choice.launches]
    shares = [expected_share(launch.mask, kernel, **kind) for launch in choice.launches]
    share = sum(n * s for n, s in zip(heads, shares, strict=True)) / sum(heads)
    if share + overhead <= limit:
        return ""
    choosing = f" and choosing blocks {overhead:.2f}" if overhead else ""
    text = f"density {choice.density:.2f} (of tokens {choice.token_density:.2f}) costs {share:.2f}{choosing}"
    return f"{text} of a dense call, above the plan's max_density {limit:g}"
