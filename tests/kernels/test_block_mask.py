"""BlockMask: construction, what it says about itself, and that wrong lists are refused in one sentence."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref

import pytest
import torch

from sparsereel_kernels import BlockMask
from sparsereel_kernels.bits import merge_equal_tiles, pack_bits, unpack_bits
from sparsereel_kernels.testing import random_block_mask


def lists(**changed):
    """Keyword arguments of a small valid mask: 100 x 70 tokens in blocks of 32 x 16, so 4 x 5 blocks."""
    tiles = torch.zeros(2, 32, 2, dtype=torch.uint8)
    tiles[0], tiles[1, :4] = 0x0F, 0xF0
    arguments = {
        "seq_lengths": (100, 70),
        "BLOCK_SIZE": (32, 16),
        "kv_num_blocks": torch.tensor([[[1, 0, 2, 1]]]),
        "kv_indices": torch.tensor([[[[3, 9], [9, 9], [0, 4], [2, 9]]]]),
        "full_kv_num_blocks": torch.tensor([[[2, 0, 1, 1]]]),
        "full_kv_indices": torch.tensor([[[[0, 1], [7, 7], [1, 7], [3, 7]]]]),
        "partial_tile": torch.tensor([[[[0, 9], [9, 9], [1, 1], [1, 9]]]]),
        "partial_bits": tiles,
    }
    arguments["partial_bits"] = arguments["partial_bits"].clone()
    # The last key block holds 6 of 16 columns and is partial in query block 2 through tile 1.
    arguments["partial_bits"][1, :, 0] &= 0x3F
    arguments["partial_bits"][1, :, 1] = 0
    return arguments | changed


def test_lists_decode_as_the_docstring_says():
    mask = BlockMask.from_lists(**lists())
    dense = torch.zeros(1, 1, 128, 80, dtype=torch.bool)
    for i in range(4):
        for n in range(int(mask.full_kv_num_blocks[0, 0, i])):
            j = int(mask.full_kv_indices[0, 0, i, n])
            dense[0, 0, i * 32 : (i + 1) * 32, j * 16 : (j + 1) * 16] = True
        for n in range(int(mask.kv_num_blocks[0, 0, i])):
            j, tile = int(mask.kv_indices[0, 0, i, n]), unpack_bits(mask.partial_bits[mask.partial_tile[0, 0, i, n]])
            dense[0, 0, i * 32 : (i + 1) * 32, j * 16 : (j + 1) * 16] = tile
    assert torch.equal(mask.to_dense(), dense[:, :, :100, :70])


def test_lists_are_int32_trimmed_and_zero_past_the_counts():
    mask = BlockMask.from_lists(
        **lists(
            kv_indices=torch.tensor([[[[3, 9, 9], [9, 9, 9], [0, 4, 9], [2, 9, 9]]]]),
            partial_tile=torch.tensor([[[[0, 9, 9], [9, 9, 9], [1, 1, 9], [1, 9, 9]]]]),
        )
    )
    assert mask.kv_indices.tolist() == [[[[3, 0], [0, 0], [0, 4], [2, 0]]]]
    assert mask.full_kv_indices.tolist() == [[[[0, 1], [0, 0], [1, 0], [3, 0]]]]
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "partial_tile"):
        assert getattr(mask, name).dtype == torch.int32


def test_full_lists_alone_and_partial_lists_alone():
    given = lists()
    whole = BlockMask.from_lists(
        (100, 70),
        (32, 16),
        full_kv_num_blocks=given["full_kv_num_blocks"],
        full_kv_indices=given["full_kv_indices"],
    )
    assert not whole.has_partial
    some = BlockMask.from_lists(
        (100, 70),
        (32, 16),
        **{key: given[key] for key in ("kv_num_blocks", "kv_indices", "partial_tile", "partial_bits")},
    )
    assert some.full_kv_indices.shape[-1] == 0
    assert torch.equal((whole | some).to_dense(), BlockMask.from_lists(**given).to_dense())


BROKEN = {
    "block not a multiple of 8": ({"BLOCK_SIZE": (30, 16)}, r"multiple of 8 from 8 to 1024, got \(30, 16\)"),
    "block too large": ({"BLOCK_SIZE": (2048, 16)}, r"got \(2048, 16\)"),
    "negative length": ({"seq_lengths": (-1, 70)}, r"got \(-1, 70\)"),
    "wrong number of query blocks": ({"seq_lengths": (64, 70)}, r"must be \[B, H, 2\] for 64 queries"),
    "count above the width": ({"kv_num_blocks": torch.tensor([[[1, 0, 3, 1]]])}, r"0 to 2 .* got 0 to 3"),
    "negative count": ({"kv_num_blocks": torch.tensor([[[1, -1, 2, 1]]])}, r"got -1 to 2"),
    "index past the keys": (
        {"kv_indices": torch.tensor([[[[5, 0], [0, 0], [0, 4], [2, 0]]]])},
        r"kv_indices must lie in 0 to 4 \(5 key blocks\), got 0 to 5",
    ),
    "descending": ({"kv_indices": torch.tensor([[[[3, 0], [0, 0], [4, 0], [2, 0]]]])}, "must ascend"),
    "twice": ({"full_kv_indices": torch.tensor([[[[1, 1], [0, 0], [1, 0], [3, 0]]]])}, "must ascend"),
    "full and partial": ({"full_kv_indices": torch.tensor([[[[0, 3], [0, 0], [1, 0], [3, 0]]]])}, "both as full and"),
    "no such tile": (
        {"partial_tile": torch.tensor([[[[2, 0], [0, 0], [1, 1], [1, 0]]]])},
        r"partial_tile must lie in 0 to 1 \(2 tiles\), got 1 to 2",
    ),
    "tiles of another block": ({"partial_bits": torch.zeros(2, 32, 8, dtype=torch.uint8)}, r"\[tiles, 32, 2\]"),
    "tiles of bool": ({"partial_bits": torch.zeros(2, 32, 2, dtype=torch.bool)}, "uint8"),
    "bits outside": ({"partial_bits": torch.full((2, 32, 2), 255, dtype=torch.uint8)}, "outside the sequence"),
    "float counts": ({"kv_num_blocks": torch.tensor([[[1.0, 0.0, 2.0, 1.0]]])}, "kv_num_blocks must hold integers"),
    "other shapes": ({"full_kv_num_blocks": torch.zeros(2, 1, 4, dtype=torch.int32)}, r"\[1, 1, 4\]"),
    "tile list of another shape": ({"partial_tile": torch.zeros(1, 1, 4, 1, dtype=torch.int32)}, "partial_tile must"),
    "not tensors": ({"kv_num_blocks": [[[1, 0, 2, 1]]]}, "needs tensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_lists_are_refused(case):
    changed, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        BlockMask.from_lists(**lists(**changed))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(4, 4), r"bool tensor .* got torch.float32 \(4, 4\)"),
        (torch.zeros(4, dtype=torch.bool), r"got torch.bool \(4,\)"),
        ([[True]], "got list"),
    ],
)
def test_from_dense_refuses_what_is_no_mask(mask, message):
    with pytest.raises(ValueError, match=message):
        BlockMask.from_dense(mask)


def test_from_block_map_tidies():
    """Whole tiles become FULL, also at the ragged end; empty ones vanish; equal ones are shared; unused ones go."""
    tiles = torch.zeros(6, 8, 1, dtype=torch.uint8)
    tiles[0], tiles[2], tiles[3], tiles[4], tiles[5] = 255, 1, 1, 0b111, 77
    block_map = torch.tensor([[[[0, 1, 4], [2, 3, -2]]]])
    mask = BlockMask.from_block_map(block_map, tiles, (16, 19), (8, 8))
    assert mask.block_map().tolist() == [[[[-2, -1, -2], [0, 0, -2]]]]
    assert mask.partial_bits.shape[0] == 1


def test_from_block_map_refuses():
    tiles = torch.zeros(1, 8, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"block_map must be \[B, H, 2, 3\]"):
        BlockMask.from_block_map(torch.zeros(1, 1, 3, 3, dtype=torch.int32), tiles, (16, 19), (8, 8))
    with pytest.raises(ValueError, match=r"block_map must lie in -2 to 0 \(1 tiles\), got 0 to 1"):
        BlockMask.from_block_map(torch.tensor([[[[0, 1, 0], [0, 0, 0]]]]), tiles, (16, 19), (8, 8))


def test_immutable_and_itself():
    mask = random_block_mask(100, block=(32, 16))
    with pytest.raises(AttributeError, match="immutable"):
        mask.seq_lengths = (1, 1)
    with pytest.raises(AttributeError, match="immutable"):
        del mask.kv_indices
    assert copy.deepcopy(mask) is mask
    assert copy.copy(mask) is mask
    assert mask.to("cpu") is mask
    other = random_block_mask(100, block=(32, 16))
    assert len({mask, other, mask}) == 2
    assert mask != other


def test_pickles():
    mask = random_block_mask(100, block=(32, 16))
    twin = pickle.loads(pickle.dumps(mask))
    assert torch.equal(twin.to_dense(), mask.to_dense())
    assert int(twin.name) != int(mask.name)


def test_masks_are_freed():
    mask = random_block_mask(100, block=(32, 16))
    mask.transposed(), mask.density
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None


def test_densities_and_text():
    dense = torch.zeros(100, 70, dtype=torch.bool)
    dense[:32, :16] = True
    dense[96:, 64:] = True
    dense[40, 20] = True
    mask = BlockMask.from_dense(dense, (32, 16))
    assert mask.full_kv_num_blocks.tolist() == [[[1, 0, 0, 1]]]
    assert mask.density == pytest.approx(3 / 20)
    assert mask.token_density == pytest.approx(dense.float().mean().item())
    assert str(mask) == "BlockMask(1×1 heads, 100×70 tokens, block 32×16, density 0.15, token density 0.0767, cpu)"


def test_head_and_stack():
    masks = [random_block_mask(100, 70, block=(32, 16), density=d, seed=i) for i, d in enumerate((0.2, 0.8, 0.4))]
    stacked = BlockMask.stack(masks)
    assert stacked.shape == (1, 3, 100, 70)
    for h, mask in enumerate(masks):
        assert torch.equal(stacked.head(h).to_dense(), mask.to_dense())
    assert stacked.launch_order.tolist() == [1, 2, 0]
    assert masks[0].head(2) is masks[0]
    assert BlockMask.stack(masks[:1]) is masks[0]
    with pytest.raises(ValueError, match="head must be 0 to 2, got 3"):
        stacked.head(3)
    with pytest.raises(ValueError, match="at least one mask"):
        BlockMask.stack([])
    with pytest.raises(ValueError, match=r"one seq_lengths, got \(100, 70\) and \(100, 71\)"):
        BlockMask.stack([masks[0], random_block_mask(100, 71, block=(32, 16))])


def test_masks_that_do_not_fit_together():
    mask = random_block_mask(100, block=(32, 16))
    with pytest.raises(ValueError, match=r"& needs masks of one block, got \(32, 16\) and \(16, 16\)"):
        mask & random_block_mask(100, block=(16, 16))
    with pytest.raises(ValueError, match=r"\| needs masks of one heads, got 2 and 3"):
        random_block_mask(100, block=(32, 16), heads=2) | random_block_mask(100, block=(32, 16), heads=3)
    with pytest.raises(TypeError):
        mask & 1


def test_transposed_lists_name_the_same_blocks():
    mask = random_block_mask(300, 200, block=(32, 16), heads=2)
    turned = mask.transposed()
    pairs = set()
    for h in range(2):
        for j in range(turned.q_num_blocks.shape[-1]):
            for n in range(int(turned.q_num_blocks[0, h, j])):
                pairs.add((h, int(turned.q_indices[0, h, j, n]), j, int(turned.partial_tile[0, h, j, n])))
            for n in range(int(turned.full_q_num_blocks[0, h, j])):
                pairs.add((h, int(turned.full_q_indices[0, h, j, n]), j, -2))
    block_map = mask.block_map()[0]
    assert pairs == {(h, i, j, int(block_map[h, i, j])) for h, i, j in (block_map != -1).nonzero().tolist()}
    assert mask.transposed() is turned


def test_equal_hashes_do_not_merge_different_tiles(monkeypatch):
    from sparsereel_kernels import bits

    monkeypatch.setattr(bits, "_hash", lambda words: torch.zeros(words.shape[0], dtype=torch.int64))
    tiles = pack_bits(torch.rand(10, 16, 16) < 0.5)
    tiles = torch.cat([tiles, tiles[:3]])
    merged, row = merge_equal_tiles(tiles)
    assert merged.shape[0] == 10
    assert torch.equal(merged[row], tiles)


def test_long_sequences_take_little_time_and_memory():
    """115,200 tokens: 900 x 1,800 blocks. A dense mask would be 13 GB."""
    start = time.process_time()
    mask = random_block_mask(115_200, density=0.1)
    both = (mask & random_block_mask(115_200, density=0.1, seed=1)) | mask
    assert both.token_density == pytest.approx(mask.token_density)
    assert time.process_time() - start < 5
    assert both.nbytes < 20e6
