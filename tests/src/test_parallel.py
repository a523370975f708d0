"""Context parallelism: several processes give what one gives.

All cases run in one start of three processes: most in a group of the last two, whose ranks are not those of the world;
a ring of three besides, where it matters which way it turns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsereel import Segment, TokenGrid, parallel
from sparsereel.parallel import Shards, heads_of_rank
from sparsereel.patterns import Full, Neighborhood, Radial, Sharded, Spatial
from sparsereel.selectors import BlockTopk
from sparsereel_kernels import BlockMask, sparse_attention

pytestmark = pytest.mark.usefixtures("one_thread")

VIDEO = TokenGrid(3, 7, 9)  # 189 tokens: odd
TEXT_AFTER = TokenGrid(3, 7, 9, text=20)
TEXT_FIRST = TokenGrid(3, 7, 9, text=21, text_side="before")
REFERENCE = TokenGrid.of([Segment("text", length=11), Segment("video", 3, 5, 7), Segment("condition", 1, 5, 7)])
NEAR = Neighborhood((1, 3, 3))
DIFFERENT = [NEAR, Spatial(0), Full(), Radial()]
PROCESSES = 2
WORLD = 3
#: the cases of the ring of three
OF_THREE = ("a pattern a head", "rows without keys", "padded keys", "three segments for themselves")


def holes(grid: TokenGrid, heads: int = 4) -> BlockMask:
    """A mask of single tokens: rows without keys at all, and rows whose keys all lie with one process."""
    generator = torch.Generator().manual_seed(7)
    dense = torch.rand(heads, grid.seq_len, grid.seq_len, generator=generator) < 0.2
    dense[:, ::5] = False
    dense[:, 1::5, : grid.seq_len // 2] = False
    dense[1:, 2::5, grid.seq_len // 2 :] = False
    return BlockMask.from_dense(dense, (32, 16))


#: name: what is allowed, grid, options of the call, number of key heads
CASES = {
    "one pattern": (NEAR, VIDEO, {}, 4),
    "dense": (None, VIDEO, {}, 4),
    "text at the end": (NEAR, TEXT_AFTER, {}, 4),
    "a pattern a head": (DIFFERENT, TEXT_FIRST, {}, 4),
    "heads that know their number": (Sharded(run=8, local=1, stride=4), VIDEO, {"block": (32, 16)}, 4),
    "uneven lengths": (DIFFERENT, TEXT_AFTER, {"lengths": (150, 59)}, 4),
    "a process without tokens": (NEAR, VIDEO, {"lengths": (0, 189)}, 4),
    "shared key heads": (DIFFERENT, VIDEO, {}, 2),
    "one key head": (DIFFERENT, VIDEO, {}, 1),
    "rows without keys": (holes(TEXT_AFTER), TEXT_AFTER, {}, 4),
    "padded keys": (NEAR, TEXT_AFTER, {"key_lengths": torch.tensor([209, 60], dtype=torch.int32)}, 4),
    "a scale": (NEAR, VIDEO, {"scale": 0.7}, 4),
    "segments for themselves": (DIFFERENT, TEXT_FIRST, {"split": "segments"}, 4),
    "three segments for themselves": (DIFFERENT, REFERENCE, {"split": "segments"}, 4),
}


def inputs(grid: TokenGrid, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v of the whole sequence, (B, S, H, D)."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((4, 16), (kv_heads, 16), (kv_heads, 24))
    return [torch.randn(2, grid.seq_len, *size, generator=generator).to(dtype) for size in sizes]


def alone(name: str) -> torch.Tensor:
    """What one process gives, (B, S, H, D)."""
    allowed, grid, options, kv_heads = CASES[name]
    mask = allowed
    if isinstance(allowed, list):
        dense = [pattern.token_mask(grid, head=head) for head, pattern in enumerate(allowed)]
        mask = BlockMask.from_dense(torch.stack(dense))
    elif allowed is not None and not isinstance(allowed, BlockMask):
        dense = [allowed.token_mask(grid, head=head) for head in range(4)]
        mask = BlockMask.from_dense(torch.stack(dense))
    kept = {key: value for key, value in options.items() if key in ("scale", "key_lengths")}
    q, k, v = (x.transpose(1, 2) for x in inputs(grid, kv_heads))
    return sparse_attention(q, k, v, mask, backend="reference", **kept).transpose(1, 2)


def on_shards(name: str, mode: str, group, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """This process's part of the result."""
    allowed, grid, options, kv_heads = CASES[name]
    deal = {key: value for key, value in options.items() if key in ("split", "lengths")}
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    here = Shards.of(grid, size, **deal).positions(rank)
    q, k, v = (x[:, here] for x in inputs(grid, kv_heads, dtype))
    return parallel.attention(q, k, v, allowed, grid, group, mode, backend="torch", **options)


def refusals(group) -> dict[str, str]:
    """What wrong use says, before anything is exchanged: so the first process can try alone."""
    three = [x[:, :95, :3] for x in inputs(VIDEO, 4)]
    q, k, v = (x[:, :95] for x in inputs(VIDEO, 4))
    by_segment = Shards.of(REFERENCE, PROCESSES, split="segments").positions(0)
    moved = [x[:, by_segment] for x in inputs(REFERENCE, 4)]

    def attend(*args, **options):
        return lambda: parallel.attention(*args, group=group, **options)

    wrong = {
        "heads": attend(*three, NEAR, VIDEO),
        "tokens": attend(*inputs(VIDEO, 4), NEAR, VIDEO),
        "mode": attend(q, k, v, NEAR, VIDEO, mode="star"),
        "patterns": attend(q, k, v, [NEAR, NEAR], VIDEO),
        "selector": attend(q, k, v, BlockTopk(0.5), VIDEO),
        "mask": attend(q, k, v, holes(TEXT_AFTER), VIDEO),
        "gradients": attend(q.clone().requires_grad_(), k, v, NEAR, VIDEO),
        "moved mask": attend(*moved, holes(REFERENCE), REFERENCE, mode="ring", split="segments"),
    }
    said = {}
    for name, call in wrong.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


def work(folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    pair = torch.distributed.new_group(list(range(WORLD - PROCESSES, WORLD)))
    found = {(name, "of three"): on_shards(name, "ring", None) for name in OF_THREE}
    three = [x[:, :, :3][:, Shards.of(VIDEO, WORLD).positions(torch.distributed.get_rank())] for x in inputs(VIDEO, 4)]
    found["three heads", "ulysses"] = parallel.attention(*three, NEAR, VIDEO, backend="torch")
    said = {}
    if torch.distributed.get_rank() >= WORLD - PROCESSES:
        for mode in ("ulysses", "ring"):
            found |= {(name, mode): on_shards(name, mode, pair) for name in CASES}
            found["bf16", mode] = on_shards("text at the end", mode, pair, torch.bfloat16)
        rank = torch.distributed.get_rank(pair)
        three = [x[:, :, :3][:, Shards.of(VIDEO, PROCESSES).positions(rank)] for x in inputs(VIDEO, 4)]
        found["three heads", "ring"] = parallel.attention(*three, NEAR, VIDEO, pair, "ring", backend="torch")
        said = refusals(pair) if rank == 0 else {}
    file = folder / str(torch.distributed.get_rank())
    save_file({"/".join(name): value.contiguous() for name, value in found.items()}, file.with_suffix(".safetensors"))
    file.with_suffix(".json").write_text(json.dumps(said))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory, gloo_processes):
    """What each process found, and what the first of the pair was told."""
    folder = tmp_path_factory.mktemp("parallel")
    gloo_processes(__file__, folder, WORLD, timeout=120)
    return [read(folder / str(rank)) for rank in range(WORLD)]


def read(file: Path) -> tuple[dict[tuple[str, ...], torch.Tensor], dict[str, str]]:
    """What one process left behind."""
    found = load_file(file.with_suffix(".safetensors"))
    return {tuple(name.split("/")): value for name, value in found.items()}, json.loads(
        file.with_suffix(".json").read_text()
    )


@pytest.fixture(scope="module")
def pair(results):
    """The same of the group of two."""
    return results[WORLD - PROCESSES :]


@pytest.mark.parametrize("name", OF_THREE)
def test_a_ring_of_three(results, name):
    _, grid, options, _ = CASES[name]
    shards = Shards.of(grid, WORLD, **{key: options[key] for key in ("split",) if key in options})
    for rank, (found, _) in enumerate(results):
        expected = alone(name)[:, shards.positions(rank)]
        torch.testing.assert_close(found[name, "of three"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["ulysses", "ring"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(pair, name, mode):
    _, grid, options, _ = CASES[name]
    expected = alone(name)
    shards = Shards.of(grid, 2, **{key: options[key] for key in ("split", "lengths") if key in options})
    for rank, (found, _) in enumerate(pair):
        torch.testing.assert_close(found[name, mode], expected[:, shards.positions(rank)], rtol=1e-5, atol=1e-5)


def test_rows_without_keys_are_zero(pair):
    shards = Shards.of(TEXT_AFTER, PROCESSES)
    for rank, (found, _) in enumerate(pair):
        empty = shards.positions(rank) % 5 == 0
        for mode in ("ulysses", "ring"):
            out = found["rows without keys", mode]
            assert not out[:, empty].any()
            # These see keys of the second process only.
            assert out[:, shards.positions(rank) % 5 == 1].any(-1).all()


@pytest.mark.parametrize("mode", ["ulysses", "ring"])
def test_bf16_keeps_its_dtype(pair, mode):
    expected, shards = alone("text at the end"), Shards.of(TEXT_AFTER, 2)
    for rank, (found, _) in enumerate(pair):
        assert found["bf16", mode].dtype == torch.bfloat16
        torch.testing.assert_close(
            found["bf16", mode].float(), expected[:, shards.positions(rank)], rtol=0.03, atol=0.03
        )


@pytest.mark.parametrize(("size", "mode"), [(2, "ring"), (3, "ulysses")])
def test_three_heads(results, size, mode):
    q, k, v = (x[:, :, :3].transpose(1, 2) for x in inputs(VIDEO, 4))
    expected = sparse_attention(q, k, v, NEAR.block_mask(VIDEO), backend="reference").transpose(1, 2)
    for rank, (found, _) in enumerate(results[WORLD - size :]):
        here = Shards.of(VIDEO, size).positions(rank)
        torch.testing.assert_close(found["three heads", mode], expected[:, here], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "text"),
    {
        "heads": "ulysses needs heads that divide by the 2 processes, got 3",
        "tokens": "95 tokens",
        "mode": "mode must be one of ulysses, ring, got 'star'",
        "patterns": "4 patterns, one for each head",
        "selector": "give a pattern, a BlockMask, None or 4 patterns",
        "mask": "the mask must be for 189 tokens and 1 or 4 heads",
        "gradients": "no backward pass",
        "moved mask": "takes patterns only",
    }.items(),
)
def test_wrong_use_is_refused(pair, what, text):
    assert text in pair[0][1][what]


def test_without_processes_the_call_is_refused():
    with pytest.raises(ValueError, match="init_process_group"):
        parallel.attention(*inputs(VIDEO, 4), NEAR, VIDEO)


@pytest.mark.parametrize("split", ["sequence", "segments"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shards_hold_every_token_once(split, size):
    for grid in (VIDEO, TEXT_AFTER, REFERENCE, TokenGrid(1, 1, 2, text=1)):
        shards = Shards.of(grid, size, split=split)
        places = [shards.positions(rank) for rank in range(size)]
        assert [place.numel() for place in places] == list(shards.lengths)
        assert torch.cat(places).sort().values.tolist() == list(range(grid.seq_len))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"split": "rows"}, "split must be one of"),
        ({"lengths": (100, 88)}, "add up to 189"),
        ({"lengths": (100, 89), "split": "segments"}, "sequence"),
    ],
)
def test_shards_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Shards.of(VIDEO, 2, **options)


def test_ranks_own_heads_in_runs():
    assert [list(heads_of_rank(6, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
