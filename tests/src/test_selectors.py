"""What holds for every selector: keep everything = dense, budgets, forced blocks, padding, odd sizes, no empty row."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sparsereel import selectors
from sparsereel.grid import Segment, TokenGrid
from sparsereel.selectors import Selection, SelectionContext, Selector, make
from sparsereel_kernels import sparse_attention
from sparsereel_kernels.block_lists import EMPTY, FULL

BLOCK = (32, 16)
GRIDS = {
    "video": TokenGrid(4, 8, 8),
    "odd": TokenGrid(5, 7, 5),
    "text after": TokenGrid(3, 7, 9, text=21),
    "text before": TokenGrid(3, 7, 9, text=21, text_side="before"),
    "image": TokenGrid(1, 15, 13),
    "condition": TokenGrid.of((Segment("condition", length=9), Segment("video", 3, 6, 7), Segment("text", length=5))),
}
# Arguments under which a selector keeps everything.
EVERYTHING = {
    "block_topk": {"density": 1.0},
    "block_topp": {"threshold": 1.0},
    "spargeattn": {"density": 1.0},
    "xattention": {"threshold": 1},
    "vertical_slash": {"vertical": 1.0},
    "svg": {"density": 1.0},
    "svg2": {"threshold": 1.0, "first_iterations": 3},
    "vsa": {"density": 1.0},
    "sparsed": {"density": 1.0},
    "adaspa": {"density": 1.0},
    "hip": {"density": 1.0},
    "biformer": {"density": 1.0, "region": 40},
    "anchor": {"theta": 1e9},
    "dhsa": {"density": 1.0},
}
VARIANTS = [
    ("spargeattn", {"flavour": "cdf", "threshold": 1.0, "similarity": -1.0}),
    ("spargeattn", {"similarity": 1.0, "density": 0.1}),
    ("xattention", {"threshold": 1.0, "stride": 4}),
    ("svg2", {"threshold": 1.0, "flavour": "blocks", "first_iterations": 3}),
    ("svg", {"density": 1.0, "reorder": False}),
    ("sparsed", {"density": 1.0, "flavour": "released"}),
    ("adaspa", {"density": 1.0, "cached": False, "by_head": False}),
    ("hip", {"density": 1.0, "representative": "mean"}),
    ("dhsa", {"density": 1.0, "chunks": "fixed"}),
]
# Rising budgets.
BUDGETS = {
    "block_topk": [{"density": d} for d in (0.05, 0.2, 0.6)],
    "block_topp": [{"threshold": p} for p in (0.1, 0.4, 0.8)],
    "spargeattn": [{"density": d} for d in (0.05, 0.2, 0.6)],
    "xattention": [{"threshold": p} for p in (0.1, 0.4, 0.8)],
    "vertical_slash": [{"vertical": v, "slash": v} for v in (0.0, 0.1, 0.4)],
    "svg": [{"density": d} for d in (0.05, 0.3, 0.8)],
    "svg2": [{"threshold": p, "min_density": 0.0, "first_iterations": 3} for p in (0.1, 0.4, 0.8)],
    "vsa": [{"density": d} for d in (0.05, 0.2, 0.6)],
    "sparsed": [{"density": d} for d in (0.05, 0.2, 0.6)],
    "adaspa": [{"density": d} for d in (0.05, 0.2, 0.6)],
    "hip": [{"density": d, "window": 0} for d in (0.05, 0.2, 0.6)],
    "biformer": [{"density": d, "region": 32} for d in (0.05, 0.2, 0.6)],
    "anchor": [{"theta": t, "group": 2} for t in (0.0, 1.0, 2.0)],
    "dhsa": [{"density": d} for d in (0.05, 0.2, 0.6)],
}
NAMES = selectors.names()


def tokens(grid: TokenGrid, *, batch: int = 1, heads: int = 2, kv_heads: int = 2, dim: int = 16, seed: int = 0):
    """Normal q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, grid.seq_len, dim, generator=generator)
    k, v = (torch.randn(batch, kv_heads, grid.seq_len, dim, generator=generator) for _ in range(2))
    return q, k, v


def attend(selection: Selection, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    arranged = selection.arrange(q, k, v)
    return selection.restore(sparse_attention(*arranged, selection.mask, key_lengths=lengths, backend="reference"))


def pairs(selection: Selection, q: Tensor, k: Tensor) -> Tensor:
    """bool [B, H, S, S]: which pairs are visited, in the order of q and k."""
    shape = (*q.shape[:3], k.shape[2])
    seen = selection.mask.to_dense().expand(shape)
    for order, axis in ((selection.order_q, 2), (selection.order_k, 3)):
        if order is not None:
            order = order.repeat_interleave(q.shape[1] // order.shape[1], 1).expand(shape[0], shape[1], -1)
            index = order.unsqueeze(5 - axis).expand(shape)
            seen = torch.zeros_like(seen).scatter_(axis, index, seen)
    return seen


def smallest(name: str) -> Selector:
    """The selector with the lowest of its rising budgets."""
    return make(name, **BUDGETS[name][0])


def test_every_selector_is_tested_here():
    assert set(NAMES) == set(EVERYTHING) == set(BUDGETS)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("name", "arguments"), [*EVERYTHING.items(), *VARIANTS])
def test_keeping_everything_is_dense_attention(name, arguments, grid):
    q, k, v = tokens(grid)
    selection = make(name, **arguments)(q, k, SelectionContext(grid, BLOCK))
    torch.testing.assert_close(attend(selection, q, k, v), sparse_attention(q, k, v, backend="reference"))
    assert selection.mask.density == 1


@pytest.mark.parametrize("name", NAMES)
def test_more_budget_never_visits_less(name):
    grid = GRIDS["video"]
    q, k, _ = tokens(grid, heads=4)
    made = [make(name, **arguments)(q, k, SelectionContext(grid, BLOCK)) for arguments in BUDGETS[name]]
    densities = [selection.mask.density for selection in made]
    assert densities == sorted(densities)
    assert densities[0] < densities[-1] < 1


@pytest.mark.parametrize("order", [None, (2, 4, 4)], ids=["grid order", "tile order"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_no_row_is_empty_and_text_sees_and_is_seen(name, grid, order):
    q, k, _ = tokens(grid, seed=1)
    order = order and grid.tile_order(order)
    selection = smallest(name)(q, k, SelectionContext(grid, BLOCK, order=order))
    assert selection.mask.shape == (1, 2, grid.seq_len, grid.seq_len)
    assert bool((selection.mask.full_kv_num_blocks > 0).all())
    seen = pairs(selection, q, k)
    outside = grid.coordinates()[0] < 0
    if order is not None:
        outside = outside[order.indices]
    assert bool(seen[:, :, outside].all())
    assert bool(seen[:, :, :, outside].all())
    assert bool(seen.any(-1).all())


@pytest.mark.parametrize("order", [None, (2, 4, 4)], ids=["grid order", "tile order"])
@pytest.mark.parametrize("name", NAMES)
def test_kept_sinks_are_seen_by_all(name, order):
    grid = GRIDS["text after"]
    q, k, _ = tokens(grid)
    order = order and grid.tile_order(order)
    context = SelectionContext(grid, BLOCK, order=order)
    first = grid.coordinates()[0] == 0
    if order is not None:
        first = first[order.indices]
    arguments = BUDGETS[name][0]
    assert bool(pairs(make(name, keep_sinks=True, **arguments)(q, k, context), q, k)[..., first].all())
    assert not bool(pairs(make(name, **arguments)(q, k, context), q, k)[..., first].all())


@pytest.mark.parametrize("name", NAMES)
def test_sinks_of_an_image_are_not_the_whole_image(name):
    grid = GRIDS["image"]
    q, k, _ = tokens(grid)
    arguments = BUDGETS[name][0]
    with_sinks, without = (
        make(name, keep_sinks=kept, **arguments)(q, k, SelectionContext(grid, BLOCK)) for kept in (True, False)
    )
    assert with_sinks.mask.density == without.mask.density


@pytest.mark.parametrize("grid", ["odd", "text after"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_is_never_chosen_and_what_lies_in_it_does_not_matter(name, grid):
    grid = GRIDS[grid]
    q, k, v = tokens(grid, batch=2, heads=4)
    lengths = torch.tensor([grid.seq_len, grid.seq_len - 37], dtype=torch.int32)
    context = SelectionContext(grid, BLOCK, key_lengths=lengths)
    selection = smallest(name)(q, k, context)
    kept = (selection.mask.block_map() != EMPTY).expand(2, -1, -1, -1)
    present = torch.arange(kept.shape[-1]) * BLOCK[1] < lengths[:, None]
    assert not bool((kept & ~present[:, None, None]).any())
    assert bool(kept.any(-1).all())
    valid = int(lengths[1])
    chosen = pairs(selection, q, k)
    dense = sparse_attention(q, k, v, key_lengths=lengths, backend="reference")
    everything = attend(make(name, **EVERYTHING[name])(q, k, context), q, k, v, lengths)
    torch.testing.assert_close(everything[0], dense[0])
    torch.testing.assert_close(everything[1, :, :valid], dense[1, :, :valid])
    q[1, :, valid:], k[1, :, valid:] = torch.nan, torch.nan
    again = pairs(smallest(name)(q, k, SelectionContext(grid, BLOCK, key_lengths=lengths)), q, k)
    assert torch.equal(again[:, :, :valid, :valid], chosen[:, :, :valid, :valid])


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_alone_and_in_a_batch_choose_alike(name):
    grid = GRIDS["text after"]
    q, k, _ = tokens(grid, batch=2, seed=3)
    lengths = torch.tensor([grid.seq_len - 10, grid.seq_len], dtype=torch.int32)
    together = pairs(smallest(name)(q, k, SelectionContext(grid, BLOCK, key_lengths=lengths)), q, k)
    for i in range(2):
        one = slice(i, i + 1)
        alone = smallest(name)(q[one], k[one], SelectionContext(grid, BLOCK, key_lengths=lengths[one]))
        valid = int(lengths[i])
        assert torch.equal(pairs(alone, q[one], k[one])[:, :, :valid], together[one, :, :valid])


@pytest.mark.parametrize("name", NAMES)
def test_query_heads_share_key_heads(name):
    grid = GRIDS["text after"]
    q, k, v = tokens(grid, heads=4, kv_heads=2)
    context = SelectionContext(grid, BLOCK)
    shared = smallest(name)(q, k, context)
    assert shared.mask.shape[1] == 4
    out = attend(make(name, **EVERYTHING[name])(q, k, context), q, k, v)
    torch.testing.assert_close(out, sparse_attention(q, k, v, backend="reference"))
    repeated = smallest(name)(q, k.repeat_interleave(2, 1), SelectionContext(grid, BLOCK))
    # SVG decides for a key head, since its keys can only lie in one order.
    if name != "svg":
        assert torch.equal(pairs(shared, q, k), pairs(repeated, q, k.repeat_interleave(2, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_input_gives_the_same_blocks(name):
    grid = GRIDS["odd"]
    q, k, _ = tokens(grid, heads=3, kv_heads=3)
    first, second = (smallest(name)(q, k, SelectionContext(grid, BLOCK)) for _ in range(2))
    assert torch.equal(first.mask.block_map(), second.mask.block_map())


@pytest.mark.parametrize("name", NAMES)
def test_heads_taken_a_few_at_a_time_choose_alike(name, monkeypatch):
    grid = GRIDS["text after"]
    q, k, _ = tokens(grid, heads=4)
    whole = smallest(name)(q, k, SelectionContext(grid, BLOCK))
    monkeypatch.setattr("sparsereel.selectors.partition.NUMBERS_AT_ONCE", {"cpu": 1})
    parts = smallest(name)(q, k, SelectionContext(grid, BLOCK))
    assert torch.equal(whole.mask.block_map(), parts.mask.block_map())


@pytest.mark.parametrize("name", NAMES)
def test_other_blocks_layouts_and_dtypes(name):
    grid = TokenGrid(3, 12, 12, text=5)
    q, k, _ = (x.transpose(1, 2).contiguous().transpose(1, 2).bfloat16() for x in tokens(grid))
    for block in ((16, 64), (64, 24)):
        selection = make(name, **EVERYTHING[name])(q, k, SelectionContext(grid, block))
        assert tuple(selection.mask.BLOCK_SIZE) == tuple(block)
        assert selection.mask.density == 1
        assert 0 < smallest(name)(q, k, SelectionContext(grid, block)).mask.density <= 1


def test_masks_are_valid_block_masks():
    from sparsereel_kernels import BlockMask

    grid = GRIDS["odd"]
    q, k, _ = tokens(grid)
    mask = make("block_topp", threshold=0.3)(q, k, SelectionContext(grid, BLOCK)).mask
    again = BlockMask.from_lists(mask.seq_lengths, mask.BLOCK_SIZE, **mask.tensors())
    assert torch.equal(again.block_map(), mask.block_map())
    assert set(mask.block_map().unique().tolist()) == {EMPTY, FULL}


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_positive_and_grows_with_the_sequence(name):
    costs = [make(name).cost(TokenGrid(f, 16, 16), (128, 64), 12, 64) for f in (4, 8)]
    assert 0 < costs[0] < costs[1]


@pytest.mark.parametrize("name", NAMES)
def test_selectors_keep_nothing_in_themselves(name):
    selector, grid = smallest(name), GRIDS["video"]
    before = {**vars(type(selector))}, {key: value for key, value in vars(selector).items() if key != "_written"}
    q, k, _ = tokens(grid)
    selector(q, k, SelectionContext(grid, BLOCK))
    after = {**vars(type(selector))}, {key: value for key, value in vars(selector).items() if key != "_written"}
    assert before == after


# In a process of its own: in the suite's, the heap's history and other threads count as memory of the call.
PEAKS = """
import json, sys, torch
from sparsereel.grid import TokenGrid
from sparsereel.selectors import SelectionContext, make
from sparsereel_kernels.memory import peak_extra_bytes
grid = TokenGrid(8, 32, 32)
q, k = torch.randn(2, 1, 2, grid.seq_len, 16)
peaks = {}
for name in sys.argv[1:]:
    selector = make(name)
    selector(q, k, SelectionContext(grid))
    # The least of three: a table that is needed is there every time, pages that are slow to go back are not.
    peaks[name] = min(peak_extra_bytes(lambda: selector(q, k, SelectionContext(grid))) for _ in range(3))
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_square_of_the_length():
    names = ["block_topp", "vertical_slash", "sparsed", "anchor", "vsa", "hip"]
    done = subprocess.run([sys.executable, "-c", PEAKS, *names], capture_output=True, text=True, check=True)
    # One fp32 table of tokens x tokens for one head would take 256 MiB.
    peaks = json.loads(done.stdout)
    assert all(peaks[name] < 200 * 2**20 for name in names), peaks
