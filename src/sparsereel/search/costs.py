"""What every candidate costs in every head: shares of a dense call, densities, and how much a head weighs in a clip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparsereel.families.layout import Layout, decode
from sparsereel.grid import TokenGrid
from sparsereel.patterns import Full, Pattern
from sparsereel.plan_entries import Method
from sparsereel.schedule import share_of
from sparsereel.search.record import STEPS_EACH, Key, Recording, Study
from sparsereel.selectors import Selector
from sparsereel.token_order import BLOCK, Tile, candidate_tiles, mask_in_order, own_tile
from sparsereel_kernels import cost

#: Operations of a selection run so many times slower than those of attention: they are passes over memory and small
#: launches. From the table in docs/selectors.md: 15 to 26 for pooled scores, 10 for sampled queries.
SELECTION_PACE = 16.0

#: Seconds that a selection and the launch of its own take however short the sequence is, by device. Measured on two
#: cores: 1 ms (block_topk) to 2.7 ms (spargeattn) for the selection and about 1 ms for the launch; elsewhere (some
#: forty small kernels) an estimate. Every head pays it as if it were alone: sharing a launch only makes it cheaper.
LAUNCH_SECONDS = {"cpu": 2.5e-3}
LAUNCH_SECONDS_ELSEWHERE = 4e-4
#: operations a second of dense attention, where no table says: rough, to weigh a launch against a call
PACE = {"cpu": 6e10}
PACE_ELSEWHERE = 2e14


@dataclass(frozen=True)
class Item:
    """One decision: a head of a layer in one stretch of steps."""

    component: str
    layer: int
    head: int
    bucket: int


@dataclass(frozen=True, eq=False)
class Costs:
    """Prices in one token order. N items, C candidates.

    Attributes:
        tile: the order that they are for; None = the model's own.
        share: [N, C] time over the time of a dense head, selection included.
        density: [N, C] share of key blocks visited.
        selection: [N, C] time to select over the time of a dense head.
        size: [N] dense time of all calls of the item, in a unit of its own.
        weight: [N] its share in the mean density, which counts calls of layers.
        fixed_size, fixed_weight: the same for the dense first steps.
    """

    tile: Tile | None
    share: np.ndarray
    density: np.ndarray
    selection: np.ndarray
    size: np.ndarray
    weight: np.ndarray
    fixed_size: float
    fixed_weight: float

    @cached_property
    def times(self) -> np.ndarray:
        """[N, C] part of the dense time of a clip's attention."""
        return self.share * self.size[:, None] / (self.fixed_size + self.size.sum())

    @cached_property
    def densities(self) -> np.ndarray:
        """[N, C] part of the mean density, selection counted as if it were blocks."""
        return (self.density + self.selection) * self.weight[:, None] / (self.fixed_weight + self.weight.sum())

    @property
    def fixed_time(self) -> float:
        """Part of the dense time that the dense first steps take."""
        return float(self.fixed_size / (self.fixed_size + self.size.sum()))

    @property
    def fixed_density(self) -> float:
        """Part of the mean density that the dense first steps hold."""
        return float(self.fixed_weight / (self.fixed_weight + self.weight.sum()))

    def mean_share(self, choice: np.ndarray) -> float:
        """Attention time of a choice [N] over dense attention time."""
        return float(self.times[np.arange(len(choice)), choice].sum() + self.fixed_time)

    def mean_density(self, choice: np.ndarray) -> float:
        """Mean density of a choice [N] over layers, heads and steps, as reports count it."""
        own = self.density[np.arange(len(choice)), choice] * self.weight
        return float(own.sum() / (self.fixed_weight + self.weight.sum()) + self.fixed_density)


def items_of(recording: Recording) -> list[Item]:
    """All decisions, in a fixed order."""
    return [
        Item(component, layer, head, bucket)
        for (component, layer, bucket) in sorted(recording.sums)
        for head in range(recording.sums[component, layer, bucket].energy.shape[0])
    ]


def errors_of(recording: Recording) -> np.ndarray:
    """[N, C] squared error of each head over the squared length of its layer's whole output; 0 for full.

    Heads are compared with their layer and not with themselves: a head whose output is small matters little.
    """
    rows = []
    for key in sorted(recording.sums):
        sums = recording.sums[key]
        rows.append((sums.error / sums.energy.sum().clamp_min(1e-30)).numpy())
    return np.concatenate(rows)


def tiles_of(study: Study) -> list[Tile | None]:
    """Token orders worth pricing: the model's own, and those that a plan of the candidates may run in."""
    patterns = [p for p in study.candidates if isinstance(p, Pattern)]
    tiles: dict[Tile | None, None] = {None: None}
    for grid in {decode(layer.layout) for layer in study.facts.layers.values()}:
        tiles |= dict.fromkeys(candidate_tiles(patterns, grid, study.kernel))
    return list(tiles)


class Pricing:
    """Costs for any token order, from what was recorded."""

    def __init__(self, study: Study, recording: Recording) -> None:
        self.study = study
        self.recording = recording
        self.items = items_of(recording)
        self.backend = study.kernel
        self._densities: dict[tuple[Method, Layout, Tile | None], tuple[float, float]] = {}

    def costs(self, tile: Tile | None) -> Costs:
        """Prices of all items where tokens are in the order of `tile`."""
        share, density, selection, size, weight = [], [], [], [], []
        fixed_size = fixed_weight = 0.0
        for key in sorted(self.recording.sums):
            component, layer, bucket = key
            facts = self.study.facts.layers[component, layer]
            grid = decode(facts.layout)
            sums = self.recording.sums[key]
            heads, candidates = sums.error.shape
            table = np.array(
                [[self._price(key, h, c, facts.layout, tile) for c in range(candidates)] for h in range(heads)]
            )
            share.append(table[..., 0])
            density.append(table[..., 1])
            selection.append(table[..., 2])
            dense = self._dense(grid, facts.head_dim)
            calls = self._calls_per_step(key)
            steps = self.study.buckets[bucket].count
            size += [dense * calls * steps] * facts.heads
            weight += [calls * steps / facts.heads] * facts.heads
            if bucket == 0:
                first = share_of(self.study.settings.dense_first, self.study.facts.steps)
                fixed_size += dense * calls * first * facts.heads
                fixed_weight += calls * first
        shares, densities, selections = (np.concatenate(rows) for rows in (share, density, selection))
        sizes, weights = np.array(size), np.array(weight)
        return Costs(tile, shares, densities, selections, sizes, weights, fixed_size, fixed_weight)

    def _calls_per_step(self, key: Key) -> float:
        sampled = len(self.study.buckets[key[2]].sampled(STEPS_EACH)) * len(self.study.settings.calibrating)
        return float(self.recording.sums[key].calls) / sampled

    def _dense(self, grid: TokenGrid, head_dim: int) -> float:
        fit = cost.find(self.study.facts.device_type, self.study.facts.dtype, head_dim, self.backend)
        return fit.seconds(grid.seq_len, 1.0, 1.0) if fit is not None else 4.0 * grid.seq_len**2 * head_dim

    def _price(self, key: Key, head: int, number: int, layout: Layout, tile: Tile | None) -> tuple[float, float, float]:
        """(share of the dense time, density, share of it spent on selecting)."""
        method = self.study.candidates[number]
        if isinstance(method, Full):
            return 1.0, 1.0, 0.0
        facts = self.study.facts.layers[key[:2]]
        sums = self.recording.sums[key]
        selecting = 0.0
        if isinstance(method, Selector):
            calls = float(sums.calls)
            density = float(sums.density[head, number]) / calls
            # Selectors choose whole blocks: their cells are full but where text or frames end inside a block.
            done = float(sums.token_density[head, number]) / calls
            selecting = self._selecting(method, decode(layout), facts.head_dim)
        else:
            pattern = method.for_head(key[1], head)
            density, done = self._density(pattern, layout, tile)
        return self._share(density, done, decode(layout), facts.head_dim) + selecting, density, selecting

    def _density(self, pattern: Pattern, layout: Layout, tile: Tile | None) -> tuple[float, float]:
        """(blocks visited, what the kernel does of them), shares of all."""
        key = (pattern, layout, tile)
        if key not in self._densities:
            place = own_tile(pattern, decode(layout), tile, self.backend)
            mask = mask_in_order((pattern,), decode(layout), place)
            done = 1.0 if mask is None else cost.done_density(mask, self.backend)
            self._densities[key] = (1.0 if mask is None else mask.density, done)
        return self._densities[key]

    def _share(self, density: float, done: float, grid: TokenGrid, head_dim: int) -> float:
        facts = self.study.facts
        kind = (self.backend, facts.device_type, facts.dtype, head_dim)
        return cost.expected_share_of(grid.seq_len, density, done, *kind)

    def _selecting(self, selector: Selector, grid: TokenGrid, head_dim: int) -> float:
        """Time of one head's selection over a dense head, spread over the calls that it serves."""
        device = self.study.facts.device_type
        work = selector.cost(grid, BLOCK, 1, head_dim) * SELECTION_PACE
        operations = 4.0 * grid.seq_len**2 * head_dim
        fit = cost.find(device, self.study.facts.dtype, head_dim, self.backend)
        pace = PACE.get(device, PACE_ELSEWHERE) if fit is None else operations / fit.seconds(grid.seq_len, 1.0, 1.0)
        work += LAUNCH_SECONDS.get(device, LAUNCH_SECONDS_ELSEWHERE) * pace
        steps = self.study.facts.steps
        refresh = selector.refresh
        if isinstance(refresh, int):
            serves = float(refresh)
        else:
            serves = steps / (1 if refresh == "once" else 1 + len(refresh))
        return work / operations / serves
