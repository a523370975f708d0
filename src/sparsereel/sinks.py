"""A probe for attention sinks: the few key columns that soak up attention from all queries, layer by layer.

Dense attention runs as it is; beside it the exact rows of a few sampled queries are summed to the mass that comes in at
each key. No map of tokens x tokens is made. `sparsereel inspect --sinks` is its command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsereel.families.layout import Layout, decode
from sparsereel.grid import TokenGrid
from sparsereel.inject import injection_of, sparsified
from sparsereel.patterns import Full
from sparsereel.patterns.sink_tokens import Place
from sparsereel.plan import AttentionPlan
from sparsereel.plan_entries import Numbers, SinkMap
from sparsereel.selectors.partition import Partition
from sparsereel.selectors.sampling import sampled_attention, sampled_queries
from sparsereel.sparse_layer import SparseLayer

#: times the median mass of a key, from which on a key is a sink
RATIO = 20.0
#: sinks of a layer at most
MOST = 8
SAMPLES = 64
DIGITS = 4


@dataclass(frozen=True)
class LayerSinks:
    """What the probe saw in one layer.

    Attributes:
        layer: its number in forward order.
        name: its module.
        peak: the largest mass of a key of the video over the median.
        places: (frame, row, column) of the keys above the threshold, the heaviest first; rows and columns as shares.
        mass: share of all attention that goes to them.
        first_frame, text: share that goes to the first frame, and to text and conditions.
        fair_share: share of the keys that `places` are; what they would get if all keys got the same.
    """

    layer: int
    name: str
    peak: float
    places: tuple[Place, ...]
    mass: float
    first_frame: float
    text: float
    fair_share: float


@dataclass
class _Mass:
    grid: TokenGrid
    incoming: Tensor
    calls: int = 0


@dataclass
class _Watcher:
    """Sums the mass that comes in at each key, for every layer."""

    found: dict[tuple[str, int], _Mass] = field(default_factory=dict)

    @torch.no_grad()
    def see(
        self,
        layer: SparseLayer,
        layout: Layout,
        step: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_lengths: Tensor | None,
        scale: float | None,
    ) -> None:
        """One call of attention, tokens in the model's order."""
        grid = decode(layout)
        cut = Partition.of(grid, (128, 64), key_lengths=key_lengths, device=q.device)
        # Text competes here, too: what it holds is part of the answer.
        cut = replace(cut, columns=torch.zeros_like(cut.columns), rows=torch.zeros_like(cut.rows))
        positions = sampled_queries(cut, SAMPLES)
        rows = sampled_attention(q, k, positions, cut, float(q.shape[-1] ** -0.5 if scale is None else scale))
        mass = rows.double().mean((0, 1, 2)).cpu()
        held = self.found.setdefault((layer.name, layer.index), _Mass(grid, torch.zeros_like(mass)))
        if held.grid == grid:
            held.incoming += mass
            held.calls += 1


def find_sinks(
    pipe_or_model: Any,
    run: Callable[[], Any],
    *,
    ratio: float = RATIO,
    most: int = MOST,
) -> list[LayerSinks]:
    """Sinks of every self-attention layer that `run` calls.

    Args:
        pipe_or_model: what `sparsify` takes; its attention stays dense, and is as before afterwards.
        run: generates something with it; everything that attention sees meanwhile counts.
        ratio: a key of the video is a sink where its incoming mass is that many times the median key's.
        most: sinks of a layer at most, the heaviest.

    Raises:
        ValueError: a ratio of 1 or less, most below 1; `run` never called a layer whose tokens lie on a grid.
    """
    from sparsereel.families import find, models_of

    if ratio <= 1 or most < 1:
        raise ValueError(f"ratio must be above 1 and most at least 1, got {ratio} and {most}")
    watcher = _Watcher()
    with sparsified(pipe_or_model, Full()):
        for model in models_of(pipe_or_model).values():
            if find(model) is not None:
                injection_of(model).runtime.observer = watcher.see
        run()
    if not watcher.found:
        raise ValueError("no self-attention layer was called, so there is nothing to look for sinks in")
    return [_judge(name, layer, mass, ratio, most) for (name, layer), mass in sorted(watcher.found.items(), key=_layer)]


def _layer(item: tuple[tuple[str, int], _Mass]) -> int:
    return item[0][1]


def _judge(name: str, layer: int, mass: _Mass, ratio: float, most: int) -> LayerSinks:
    grid, incoming = mass.grid, mass.incoming / mass.calls
    video = incoming[grid.video_start : grid.video_start + grid.video_len]
    ratios = video / video.median().clamp(min=1e-12)
    heavy = [int(i) for i in ratios.argsort(descending=True)[:most] if ratios[i] >= ratio]
    return LayerSinks(
        layer=layer,
        name=name,
        peak=float(ratios.max()),
        places=tuple(_place(i, grid) for i in heavy),
        mass=float(video[heavy].sum()),
        first_frame=float(video[: grid.frame_len].sum()),
        text=float(incoming.sum() - video.sum()),
        fair_share=len(heavy) / grid.seq_len,
    )


def _place(index: int, grid: TokenGrid) -> Place:
    """The frame by number, row and column as the share at the middle of the token: the same place at other sizes."""
    frame, rest = divmod(index, grid.frame_len)
    row, column = divmod(rest, grid.width)
    return frame, round((row + 0.5) / grid.height, DIGITS), round((column + 0.5) / grid.width, DIGITS)


def sink_map(found: Sequence[LayerSinks]) -> SinkMap:
    """The places found, as plans hold them."""
    return SinkMap(tuple((Numbers(str(x.layer), ((x.layer, x.layer),)), x.places) for x in found if x.places))


def with_sinks(plan: AttentionPlan, found: Sequence[LayerSinks]) -> AttentionPlan:
    """The plan with `keep_sinks` on and a map of what was found."""
    return replace(plan, keep_sinks=True, sink_map=sink_map(found))
