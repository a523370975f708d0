"""What is recorded of an attention call, against plain attention under explicit masks; planted heads are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsereel import TokenGrid
from sparsereel.patterns import (
    AllOf,
    Full,
    KeepSinks,
    Neighborhood,
    Radial,
    Sink,
    Skip,
    Spatial,
    Temporal,
    VerticalStripe,
)
from sparsereel.patterns.layout import Tokens
from sparsereel.search import errors
from sparsereel.search.errors import SHARES, AttentionCall, RowMasks, measure, sampled_queries, token_rows
from sparsereel.search.solve import trace
from sparsereel.selectors import BlockTopk, SelectionContext

GRID = TokenGrid(4, 6, 6)
pytestmark = pytest.mark.usefixtures("one_thread")


def random_call(heads: int = 3, kv_heads: int = 3, batch: int = 2, **options: object) -> AttentionCall:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, GRID.seq_len, 16, generator=g) * 2
    k = torch.randn(batch, kv_heads, GRID.seq_len, 16, generator=g)
    v = torch.randn(batch, kv_heads, GRID.seq_len, 8, generator=g)
    return AttentionCall(q, k, v, GRID, **options)  # type: ignore[arg-type]


def attend(call: AttentionCall, mask: torch.Tensor) -> torch.Tensor:
    """Attention under a bool mask (S, S), the plain way, in fp64."""
    shared = call.q.shape[1] // call.k.shape[1]
    k, v = (x.double().repeat_interleave(shared, 1) for x in (call.k, call.v))
    scores = call.q.double() @ k.transpose(2, 3) * call.q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    if call.lengths is not None:
        padded = torch.arange(GRID.seq_len) >= call.lengths[:, None]
        scores = scores.masked_fill(padded[:, None, None], float("-inf"))
    return torch.nan_to_num(scores.softmax(-1)) @ v


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("lengths", [None, torch.tensor([100, 144], dtype=torch.int32)])
def test_sums_are_those_of_plain_attention(kv_heads, lengths):
    call = random_call(kv_heads=kv_heads, lengths=lengths)
    patterns = (Full(), Spatial(0) | Sink(1), Temporal(1), Skip())
    sums = measure(call, patterns, RowMasks(), samples=10_000)
    everything = torch.ones(GRID.seq_len, GRID.seq_len, dtype=torch.bool)
    dense = attend(call, everything)
    valid = torch.ones(2, GRID.seq_len) if lengths is None else torch.arange(GRID.seq_len) < lengths[:, None]
    weight = valid[:, None, :, None].double()
    assert torch.allclose(sums.energy, (dense.square() * weight).sum((0, 2, 3)), rtol=1e-5)
    for number, pattern in enumerate(patterns):
        sparse = torch.zeros_like(dense) if isinstance(pattern, Skip) else attend(call, pattern.token_mask(GRID))
        wanted = ((sparse - dense).square() * weight).sum((0, 2, 3))
        assert torch.allclose(sums.error[:, number], wanted, rtol=1e-4, atol=1e-9)
    assert sums.recall[:, 0] == pytest.approx(float(weight.sum()))
    assert (sums.recall[:, 1] < sums.recall[:, 0]).all()
    assert float(sums.recall[:, 3].sum()) == 0


def test_heads_may_be_looked_at_in_small_parts(monkeypatch):
    call, patterns = random_call(), (Full(), Temporal(1), BlockTopk(0.3))
    whole = measure(call, patterns, RowMasks())
    monkeypatch.setattr(errors, "MOST_NUMBERS", 1)
    parts = measure(call, patterns, RowMasks())
    assert torch.allclose(whole.error, parts.error, rtol=1e-5)
    assert torch.equal(whole.density, parts.density)


def test_a_selector_is_judged_as_it_runs():
    grid = TokenGrid(4, 12, 12)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, grid.seq_len, 16, generator=g) for _ in range(3))
    order = grid.tile_order((2, 4, 4))
    selector = BlockTopk(0.3)
    call = AttentionCall(q, k, v, grid, order=order)
    sums = measure(call, (Full(), selector), RowMasks(), samples=10_000)
    ordered = [x[:, :, order.indices] for x in (q, k)]
    mask = selector(*ordered, SelectionContext(grid, order=order)).mask.to_dense()
    back = order.inverse.indices
    mask = mask[:, :, back][:, :, :, back]
    scores = (q @ k.transpose(2, 3)).double() * 16**-0.5
    p = scores.softmax(-1)
    sparse = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.double()
    wanted = (sparse - p @ v.double()).square().sum((0, 2, 3))
    assert torch.allclose(sums.error[:, 1], wanted, rtol=1e-4)
    assert torch.allclose(sums.recall[:, 1], (p * mask).sum((0, 2, 3)), rtol=1e-4)
    assert sums.density[0, 1] == pytest.approx(mask[0, 0].float().mean().item(), abs=0.1)


@pytest.mark.parametrize(
    "pattern",
    [
        Radial(0.5),
        Spatial(1) | Sink(1),
        KeepSinks(Temporal(1)),
        AllOf((Neighborhood((3, 3, 3)), Temporal(1))),
        AllOf((Sink(1), VerticalStripe((2, 3)))),
        AllOf((Spatial(0), Sink(1))),
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 5, 4, text=7)], ids=str)
def test_rows_are_those_of_the_definition(pattern, grid):
    tokens = Tokens.of(grid)
    queries = sampled_queries(grid.seq_len, 40)
    rows = token_rows(pattern, grid, tokens.map(lambda x: x[queries][:, None]), tokens.map(lambda x: x[None]))
    assert torch.equal(rows.expand(len(queries), grid.seq_len), pattern.token_mask(grid)[queries])


def test_queries_are_spread_and_the_same_every_time():
    queries = sampled_queries(10_000, 96)
    assert torch.equal(queries, sampled_queries(10_000, 96))
    assert len(queries) == 96
    assert queries.diff().max() < 3 * 10_000 / 96
    assert not torch.equal(queries, sampled_queries(10_000, 96, turn=1))
    # No period: all columns of a frame 12 wide are hit about equally often.
    assert torch.bincount(sampled_queries(12_000, 960) % 12).min() > 60


def planted() -> AttentionCall:
    """Heads that look at their own frame, their own place, the first frame, anything; one without output."""
    tokens = Tokens.of(GRID)
    frame = torch.nn.functional.one_hot(tokens.t, 36).float()
    place = torch.nn.functional.one_hot(tokens.place, 36).float()
    first = (tokens.t == 0).float()[:, None].expand(-1, 36)
    g = torch.Generator().manual_seed(5)
    anything = torch.randn(2, GRID.seq_len, 36, generator=g) * 3
    strong = 12.0
    q = torch.stack([frame * strong, place * strong, torch.ones_like(first), anything[0], frame])
    k = torch.stack([frame * strong, place * strong, first * strong, anything[1], frame])
    v = torch.randn(5, GRID.seq_len, 16, generator=g)
    v[4] = 0
    return AttentionCall(q[None], k[None], v[None], GRID)


def test_planted_heads_are_found():
    candidates = (Full(), Skip(), Spatial(0), Temporal(0), Sink(1))
    sums = measure(planted(), candidates, RowMasks(), samples=64)
    error = (sums.error / sums.energy.sum()).numpy()
    cost = np.tile([1.0, 0.0, 0.3, 0.3, 0.3], (5, 1))
    front = trace(error, cost)
    chosen = [str(candidates[n]) for n in front.choice(front.at(0.02))]
    assert chosen == ["spatial(frames=0)", "temporal(width=0)", "sink", "full", "skip"]
    shares = (sums.shares / sums.queries).numpy()
    places = dict(zip(SHARES, shares.T, strict=True))
    assert places["own_frame"][0] > 0.99
    assert places["same_place"][1] > 0.99
    assert places["first_frame"][2] > 0.99
    assert places["own_frame"][3] < 0.6
