"""When scores are computed again, and what is kept apart."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from sparsereel.grid import TokenGrid
from sparsereel.selectors import BlockTopk, SelectionContext, make, refreshing

GRID = TokenGrid(3, 6, 6)
BLOCK = (16, 8)


@dataclass(frozen=True, eq=False)
class Counting(BlockTopk):
    """Block top-k that counts how often it computes scores."""

    counts: list[int] = field(default_factory=list, repr=False, kw_only=True)

    def block_map(self, q, k, cut, scale):
        self.counts.append(1)
        return super().block_map(q, k, cut, scale)


def inputs(seed=0, batch=1, grid=GRID):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, grid.seq_len, 8, generator=generator) for _ in range(2)]


def computed_at(refresh, steps, first=0, total=50):
    """The steps of `steps` at which scores were computed."""
    selector, state, q_k = Counting(refresh=refresh), {}, inputs()
    found = []
    for step in steps:
        before = len(selector.counts)
        refreshing(selector, *q_k, SelectionContext(GRID, BLOCK, step=step, steps=total, state=state))
        if len(selector.counts) > before:
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("refresh", "expected"),
    [
        (1, list(range(5, 20))),
        ("every step", list(range(5, 20))),
        (4, [5, 9, 13, 17]),
        (100, [5]),
        ("once", [5]),
        ((0.2, 0.3), [5, 10, 15]),
        ((0.1, 0.2), [5, 10]),
        ((12, 18), [5, 12, 18]),
        ((0, 2), [5]),
    ],
)
def test_scores_are_computed_when_the_policy_says(refresh, expected):
    assert computed_at(refresh, range(5, 20)) == expected


def test_steps_that_are_left_out_do_not_lose_a_refresh():
    assert computed_at(4, [0, 3, 9, 10, 14]) == [0, 9, 14]
    assert computed_at((10,), [5, 9, 12, 13]) == [5, 12]


def test_a_step_called_twice_is_new_only_where_every_step_is():
    assert computed_at(1, [3, 3]) == [3, 3]
    assert computed_at(2, [3, 3]) == [3]


def test_an_earlier_step_is_a_new_generation():
    assert computed_at("once", [4, 5, 6, 0, 1, 2]) == [4, 0]


def test_a_frozen_selection_is_the_same_object_whatever_q_and_k_are():
    selector, state = BlockTopk(0.3, refresh="once"), {}
    first = refreshing(selector, *inputs(0), SelectionContext(GRID, BLOCK, step=1, state=state))
    second = refreshing(selector, *inputs(1), SelectionContext(GRID, BLOCK, step=2, state=state))
    assert second is first
    fresh = refreshing(selector, *inputs(1), SelectionContext(GRID, BLOCK, step=2))
    assert not torch.equal(fresh.mask.block_map(), first.mask.block_map())


@pytest.mark.parametrize(
    "change",
    [
        {"branch": "uncond"},
        {"layer": 1},
        {"heads": (2, 3)},
        {"block": (8, 8)},
        {"order": GRID.tile_order((1, 3, 3))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_branches_layers_heads_and_geometries_have_memories_of_their_own(change):
    selector = Counting(refresh="once")
    context = SelectionContext(GRID, BLOCK, step=3)
    refreshing(selector, *inputs(), context)
    other = refreshing(selector, *inputs(1), replace(context, **change))
    assert len(selector.counts) == 2
    assert refreshing(selector, *inputs(2), replace(context, **change)) is other
    refreshing(selector, *inputs(3), context)
    assert len(selector.counts) == 2


def test_other_batches_and_grids_have_memories_of_their_own():
    selector, state = Counting(refresh="once"), {}
    for batch, grid in ((1, GRID), (2, GRID), (1, TokenGrid(4, 6, 6)), (1, TokenGrid(3, 6, 6))):
        refreshing(selector, *inputs(0, batch, grid), SelectionContext(grid, BLOCK, state=state))
    assert len(selector.counts) == 3


def test_other_key_lengths_make_a_new_selection():
    selector, state = Counting(refresh="once"), {}

    def run(*lengths):
        given = torch.tensor(lengths, dtype=torch.int32) if lengths else None
        refreshing(selector, *inputs(), SelectionContext(GRID, BLOCK, key_lengths=given, state=state))
        return len(selector.counts)

    assert [run(100), run(100), run(90), run(90), run(), run()] == [1, 1, 2, 2, 3, 3]


def test_a_new_state_starts_afresh():
    selector = Counting(refresh="once")
    for _ in range(2):
        refreshing(selector, *inputs(), SelectionContext(GRID, BLOCK))
    assert len(selector.counts) == 2


def test_gradients_do_not_flow_into_the_choice():
    q, k = (x.requires_grad_() for x in inputs())
    selection = refreshing(BlockTopk(0.3), q, k, SelectionContext(GRID, BLOCK))
    assert not any(x.requires_grad for x in selection.mask.tensors().values())


def test_svg2_starts_from_the_centroids_before(monkeypatch):
    from sparsereel.selectors import svg2

    iterations, real = [], svg2.kmeans

    def counting(x, centroids, count, outside):
        iterations.append((count, centroids.clone()))
        labels, centroids = real(x, centroids, count, outside)
        iterations[-1] += (centroids,)
        return labels, centroids

    monkeypatch.setattr(svg2, "kmeans", counting)
    selector, state = make("svg2", first_iterations=7, iterations=1), {}
    for step in range(2):
        refreshing(selector, *inputs(step), SelectionContext(GRID, BLOCK, step=step, state=state))
    assert [count for count, _, _ in iterations] == [7, 7, 1, 1]
    for side in range(2):
        assert torch.equal(iterations[2 + side][1], iterations[side][2])


def test_adaspa_keeps_the_first_log_sum_exp():
    selector, state = make("adaspa", density=0.3, refresh=1), {}
    (q, k), context = inputs(), SelectionContext(GRID, BLOCK, state=state)
    refreshing(selector, q, k, context)
    kept = context.memory(selector, q, k).notes["lse"]
    exact = (q @ k.transpose(-1, -2) * 8**-0.5).logsumexp(-1)
    torch.testing.assert_close(kept, exact)
    later = replace(context, step=1)
    refreshing(selector, 2 * q, k, later)
    assert later.memory(selector, q, k).notes["lse"] is kept
