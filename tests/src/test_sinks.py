"""Attention sinks: the probe finds planted ones, plans carry them, patterns and selectors keep them."""

from __future__ import annotations

import pytest
import torch

import sparsereel
from sparsereel import AttentionPlan, TokenGrid, selectors
from sparsereel.families.layout import text, video
from sparsereel.patterns import Full, KeepSinks, Neighborhood, Sink, SinkTokens, Skip, Spatial
from sparsereel.plan_entries import Numbers, SinkMap
from sparsereel.selectors import SelectionContext
from sparsereel.sinks import _judge, _Watcher, find_sinks, sink_map, with_sinks

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = TokenGrid(5, 8, 12, text=7)
PLACES = ((0, 0.25, 0.5), (2, 7, 0.99))
#: their positions in the sequence: frame, row 2 and 7, column 6 and 11
COLUMNS = [2 * 12 + 6, 2 * 96 + 7 * 12 + 11]


def test_sink_tokens_are_a_few_columns():
    mask = SinkTokens(PLACES).token_mask(GRID)
    text = torch.arange(GRID.seq_len) >= 480
    expected = text[:, None] | text
    expected[:, COLUMNS] = True
    assert torch.equal(mask, expected)
    assert torch.equal(SinkTokens(PLACES).block_mask(GRID, (32, 16)).to_dense()[0, 0], mask)


def test_places_outside_a_small_grid_are_left_out():
    small = TokenGrid(2, 4, 4)
    assert SinkTokens(((3, 0, 0), (1, 2, 3))).token_mask(small)[0].nonzero().flatten().tolist() == [16 + 8 + 3]
    assert SinkTokens(((3, 0, 0),)).token_mask(small)[0].nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((), "places must name at least one"),
        (((0, 1),), r"a place must be \(frame, row, column\)"),
        (((0, 1.0, 0),), r"a share in \[0.0, 1.0\) of the axis, got 1.0"),
        (((0, -1, 0),), "counts from 0"),
        (((0, True, 0),), "counts from 0"),
    ],
)
def test_bad_places(places, message):
    with pytest.raises(ValueError, match=message):
        SinkTokens(places)
    if places:
        with pytest.raises(ValueError, match=message):
            selectors.BlockTopk(sinks=places)
        with pytest.raises(ValueError, match=message):
            AttentionPlan.from_dict({"version": 1, "sink_map": {"0": [list(p) for p in places]}})


@pytest.mark.parametrize("name", selectors.names())
def test_every_selector_keeps_them_at_a_cost_of_a_few_blocks(name):
    """In videos and in images; the choice costs no more than without them, but for their blocks."""
    torch.manual_seed(3)
    for grid in (GRID, TokenGrid(1, 20, 24)):
        q, k = (torch.randn(1, 2, grid.seq_len, 16) for _ in range(2))
        places = ((0, 0.25, 0.5),)
        column = int(0.25 * grid.height) * grid.width + int(0.5 * grid.width)
        context = SelectionContext(grid, (32, 16))
        arguments = {"window": 16} if name == "hip" else {"stride": 4} if name == "xattention" else {}
        chosen = selectors.make(name, keep_sinks=True, sinks=places, **arguments)(q, k, context)
        dense = chosen.mask.to_dense().expand(1, 2, -1, -1)
        for head in range(2):
            order = chosen.order_k
            where = column
            if order is not None:
                where = int((order.expand(1, 2, -1)[0, head] == column).nonzero())
            assert bool(dense[0, head, :, where].all()), (name, head)
        without = selectors.make(name, **arguments)(q, k, context)
        # One token sits in one block of 24 or 31; a moved sequence may split it off a cluster.
        assert chosen.mask.density <= without.mask.density + 3 / (grid.seq_len // 16)


def test_plans_keep_mapped_sinks_by_default():
    data = {
        "version": 1,
        "sink_map": {"0,2": [[0, 0.25, 0.5]], "3": [[0, 1, 2], [4, 0.5, 0.5]]},
        "patterns": {"top": {"selector": "block_topk"}},
        "components": {"*": {"layers": {"*": {"default": {"spatial": {}}, "heads": {"1": "top", "2": "skip"}}}}},
    }
    plan = AttentionPlan.from_dict(data)
    assert plan.keep_sinks
    assert AttentionPlan.from_dict(plan.to_dict()) == plan
    layers = plan.resolve("transformer", list("abcd"), [3] * 4)
    one = ((0, 0.25, 0.5),)
    assert layers[0].at(0, 1) == (
        KeepSinks(Spatial(), places=one),
        selectors.BlockTopk(keep_sinks=True, sinks=one),
        Skip(),
    )
    assert layers[1].at(0, 1) == (Spatial(), selectors.BlockTopk(), Skip()), "no sinks were found in layer 1"
    assert len(layers[3].at(0, 1)[0].places) == 2
    assert "mapped sinks" in plan.describe()
    off = AttentionPlan.from_dict({**data, "keep_sinks": False})
    assert off.resolve("transformer", ["a"], [3])[0].at(0, 1)[0] == Spatial()
    with pytest.raises(ValueError, match="a layer is named twice: '0-2' and '1' overlap"):
        AttentionPlan.from_dict({"version": 1, "sink_map": {"0-2": [[0, 0, 0]], "1": [[0, 0, 0]]}})


def test_mapped_sinks_cost_less_than_the_first_frame():
    grid = TokenGrid(9, 32, 32)
    near = Neighborhood(window=(1, 8, 8))
    frame, mapped = (KeepSinks(near, places=p).block_mask(grid).density for p in ((), ((0, 0.5, 0.5),)))
    plain = near.block_mask(grid).density
    assert plain < mapped < frame
    assert mapped - plain <= 1 / 144 + 1e-6


# ------------------------------------------------------------------ the probe


def watched(q, k, grid=GRID, lengths=None):
    class Named:
        name, index = "blocks.0.attn1", 0

    watcher = _Watcher()
    watcher.see(Named, video(*grid.shape) + text(grid.text), None, q, k, k, lengths, None)
    return watcher.found["blocks.0.attn1", 0]


def test_the_probe_finds_planted_sinks():
    """Two keys point where all queries point."""
    torch.manual_seed(0)
    common = torch.randn(16)
    q = torch.randn(1, 2, GRID.seq_len, 16) * 0.3 + common
    k = torch.randn(1, 2, GRID.seq_len, 16) * 0.3
    k[:, :, COLUMNS] += 1.2 * common
    found = _judge("a", 0, watched(q, k), ratio=20.0, most=8)
    assert {
        tuple(int(v * n) if isinstance(v, float) else v for v, n in zip(p, GRID.shape, strict=True))
        for p in found.places
    } == {(0, 2, 6), (2, 7, 11)}
    exact = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1).mean((0, 1, 2))
    assert found.mass == pytest.approx(float(exact[COLUMNS].sum()), abs=0.03)
    assert found.text == pytest.approx(float(exact[480:].sum()), abs=0.01)
    assert found.first_frame == pytest.approx(float(exact[:96].sum()), abs=0.03)
    assert found.fair_share == pytest.approx(2 / 487)
    # The map holds shares: the same places on a larger grid.
    places = sink_map([found]).places(0)
    large = SinkTokens(places).token_mask(TokenGrid(5, 16, 24))[0].nonzero().flatten().tolist()
    assert sorted(large) == [5 * 24 + 13, 2 * 384 + 15 * 24 + 22]


def test_the_probe_finds_nothing_in_even_attention():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, GRID.seq_len, 16) * 0.3 for _ in range(2))
    found = _judge("a", 0, watched(q, k), ratio=20.0, most=8)
    assert found.places == ()
    assert 1 <= found.peak < 20
    assert sink_map([found]) == SinkMap(())


def test_the_probe_runs_a_model_and_leaves_it_as_it_was(tiny):
    case = tiny.CASES["hunyuan_video"]
    model, inputs = case.model(), case.inputs()
    before = tiny.run(model, inputs)
    found = find_sinks(model, lambda: tiny.run(model, inputs), ratio=1.01, most=2)
    assert [layer.layer for layer in found] == list(range(case.layers))
    assert all(1 <= len(layer.places) <= 2 and 0 < layer.text < 1 for layer in found)
    assert torch.equal(tiny.run(model, inputs), before)
    plan = with_sinks(AttentionPlan.uniform(Neighborhood(window=(1, 3, 3))), found)
    assert plan.sink_map.entries[0][0] == Numbers("0", ((0, 0),))
    pattern = KeepSinks(Neighborhood(window=(1, 3, 3)), places=found[0].places)

    def mask_of(call, grid):
        return (Neighborhood(window=(1, 3, 3)) | SinkTokens(found[call].places)).token_mask(grid)

    with tiny.dense_under(mask_of, case.grids):
        expected = tiny.run(model, inputs)
    with sparsereel.sparsified(model, plan):
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
        assert str(pattern) in sparsereel.report(model).layers[0].pattern
    with pytest.raises(ValueError, match="no self-attention layer was called"):
        find_sinks(model, lambda: None)
    with pytest.raises(ValueError, match="ratio must be above 1"):
        find_sinks(model, lambda: None, ratio=0.5)


def test_full_heads_need_no_sinks():
    plan = AttentionPlan.uniform(Full(), sink_map=SinkMap(((Numbers("0", ((0, 0),)), ((0, 0, 0),)),)), keep_sinks=True)
    assert plan.resolve("transformer", ["a"], [1])[0].uniform_full
    assert Sink() != SinkTokens(((0, 0, 0),))


def test_the_command_writes_a_plan(tmp_path, capsys):
    from sparsereel.cli.main import run

    path, prompts = tmp_path / "plan.yaml", tmp_path / "prompts.txt"
    prompts.write_text("a red 3 moving right on navy\n")
    assert (
        run(
            [
                "inspect",
                "radial",
                "--sinks",
                "--prompts",
                str(prompts),
                "--steps",
                "1",
                "--sink-ratio",
                "2",
                "-o",
                str(path),
            ]
        )
        == 0
    )
    plan = AttentionPlan.load(path)
    assert plan.keep_sinks
    assert plan.sink_map is not None
    assert run(["inspect", "radial", "--sinks", "--grid", "2x2x2"]) == 2
    assert run(["inspect", "radial", "-o", str(path)]) == 2
    captured = capsys.readouterr()
    assert "share of attention that goes to the sinks" in " ".join((captured.out + captured.err).split())
