"""The mask cache: what shares a mask, what does not, and what is dropped."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from sparsereel import patterns
from sparsereel.grid import TokenGrid
from sparsereel.mask_cache import MaskCache
from sparsereel.patterns import Full, Neighborhood, Pattern, Radial, Skip, Spatial

GRID = TokenGrid(4, 6, 6, 5)


def test_all_full_heads_need_no_mask():
    assert MaskCache().get((Full(), Full()), GRID, block=(64, 64), device="cpu", layer=0) is None


def test_equal_heads_share_one_mask():
    cache = MaskCache()
    mask = cache.get((Radial(),) * 8, GRID, block=(64, 64), device="cpu", layer=0)
    assert mask.shape[:2] == (1, 1)
    assert cache.get((Radial(),) * 12, GRID, block=(64, 64), device=torch.device("cpu"), layer=7) is mask
    assert len(cache) == 1


def test_different_heads_are_stacked_in_order():
    heads = (Spatial(0), Full(), Skip(), Spatial(0), Radial())
    mask = MaskCache().get(heads, GRID, block=(16, 16))
    dense = mask.to_dense()[0]
    assert len(dense) == 5
    for head, pattern in enumerate(heads):
        assert torch.equal(dense[head], pattern.token_mask(GRID))


def test_everything_that_shapes_a_mask_is_in_the_key():
    cache = MaskCache()
    order = GRID.tile_order((2, 2, 2))
    calls = [
        ((Spatial(),), GRID, {}),
        ((Spatial(2),), GRID, {}),
        ((Neighborhood(1),), GRID, {}),
        ((Neighborhood(1.0),), GRID, {}),
        ((Spatial(),), TokenGrid(4, 6, 6, 5, "before"), {}),
        ((Spatial(),), GRID, {"block": (64, 64)}),
        ((Spatial(),), GRID, {"order": order}),
        ((Spatial(),), GRID, {"device": "meta"}),
    ]
    masks = [cache.get(heads, grid, **options) for heads, grid, options in calls]
    assert len({id(mask) for mask in masks}) == len(cache) == len(calls)
    same = GRID.tile_order((2, 2, 2))
    assert cache.get((Spatial(),), GRID, order=same) is masks[6]


@dataclass(frozen=True, eq=False)
class ByLayer(Pattern):
    name: ClassVar[str] = "by_layer"

    def for_head(self, layer, head):
        return Spatial(layer % 2)


def test_the_layer_counts_where_the_pattern_depends_on_it():
    cache = MaskCache()
    masks = [cache.get((ByLayer(), ByLayer()), GRID, layer=layer) for layer in range(4)]
    assert masks[0] is masks[2]
    assert masks[1] is masks[3]
    assert masks[0] is not masks[1]


def test_the_least_recently_used_mask_is_dropped():
    cache = MaskCache(max_masks=2)
    first = cache.get((Spatial(0),), GRID)
    cache.get((Spatial(1),), GRID)
    assert cache.get((Spatial(0),), GRID) is first
    cache.get((Spatial(2),), GRID)
    assert len(cache) == 2
    assert cache.get((Spatial(0),), GRID) is first


def test_memory_is_bounded_and_the_newest_mask_is_kept():
    cache = MaskCache(max_bytes=1)
    for reach in range(3):
        mask = cache.get((Spatial(reach),), GRID)
        assert len(cache) == 1
        assert cache.get((Spatial(reach),), GRID) is mask
    cache.clear()
    assert len(cache) == 0


def test_threads_that_want_one_mask_build_it_once(monkeypatch):
    cache, built, seen = MaskCache(), [], []
    original = patterns.Radial.block_mask

    def counted(self, *args, **options):
        built.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(patterns.Radial, "block_mask", counted)
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        seen.append(cache.get((Radial(),), GRID))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len({id(mask) for mask in seen}) == 1


def test_layers_that_mix_the_same_patterns_share_their_masks(monkeypatch):
    cache, built = MaskCache(), []
    original = patterns.Radial.block_mask
    monkeypatch.setattr(
        patterns.Radial, "block_mask", lambda self, *a, **o: built.append(self) or original(self, *a, **o)
    )
    mixes = [(Radial(), Spatial(0)), (Spatial(0), Radial()), (Radial(), Spatial(1)), (Radial(), Radial())]
    masks = [cache.get(mix, GRID, block=(16, 16)) for mix in mixes]
    assert len(built) == 1
    for mix, mask in zip(mixes, masks, strict=True):
        for head, pattern in enumerate(mix[: mask.shape[1]]):
            assert torch.equal(mask.to_dense()[0, head], pattern.token_mask(GRID))


@pytest.mark.parametrize("make", [lambda: MaskCache(max_masks=0), lambda: MaskCache().get((), GRID)])
def test_bad_input(make):
    with pytest.raises(ValueError, match="needs room|one pattern a head"):
        make()
