"""Every backend against the definition: out, lse and all gradients, within the budget that testing.py derives."""

from __future__ import annotations

import pytest
import torch

from sparsereel_kernels import BlockMask, dispatch
from sparsereel_kernels.run import Wants, problem_of
from sparsereel_kernels.testing import assert_matches_reference, frame_decay, key_bias, make_qkv, random_block_mask

LOW = [torch.bfloat16, torch.float16]
FAST = ["torch", "cpu"]
BLOCKS = [(128, 64), (64, 64), (32, 16), (16, 128)]


def skip_unless_it_runs(backend, q, k, v, *, gradients):
    problem = problem_of(q, k, v, None, None, None, Wants(lse=True, backward=gradients))
    reasons = dispatch.BY_NAME[backend].reasons(problem)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def compare(backend, q, k, v, mask, *, gradients=None, **options):
    """Compare gradients too wherever the backend has them."""
    if gradients is None:
        problem = problem_of(q, k, v, None, None, None, Wants(lse=True, backward=True))
        gradients = not dispatch.BY_NAME[backend].reasons(problem)
    skip_unless_it_runs(backend, q, k, v, gradients=gradients)
    assert_matches_reference(q, k, v, mask, backend=backend, gradients=gradients, **options)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(63, 63), (111, 111), (63, 200), (200, 63), (256, 256), (1, 1), (1, 111)]
)
def test_lengths_and_blocks(backend, block, q_len, kv_len):
    q, k, v = make_qkv(q_len, kv_len, head_dim=40, v_dim=24)
    compare(backend, q, k, v, random_block_mask(q_len, kv_len, block=block, density=0.5))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 72, 80, 96, 128, 160, 256])
def test_low_precision_and_head_dims(backend, dtype, head_dim):
    q, k, v = make_qkv(111, 140, head_dim=head_dim, dtype=dtype)
    compare(backend, q, k, v, random_block_mask(111, 140, block=(32, 16)))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_batches_groups_and_masks_of_their_own(backend, dtype, batch, heads, kv_heads):
    q, k, v = make_qkv(111, 90, batch=2, heads=4, kv_heads=kv_heads, head_dim=24, v_dim=40, dtype=dtype)
    mask = random_block_mask(111, 90, block=(32, 16), batch=batch, heads=heads, empty_rows=True)
    compare(backend, q, k, v, mask)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (10, 5), (18, 6)])
def test_many_heads(backend, heads, kv_heads):
    """More key heads than the torch backend takes at once, in groups that do not divide evenly."""
    q, k, v = make_qkv(70, 90, heads=heads, kv_heads=kv_heads, head_dim=16)
    mask = random_block_mask(70, 90, block=(32, 16), heads=heads)
    compare(backend, q, k, v, mask, modifier=key_bias(1, heads, 90))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("lengths", [None, [90, 33], [0, 90]], ids=str)
@pytest.mark.parametrize("modifier", ["none", "decay", "bias", "bias_batch", "bias_heads"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_key_lengths_and_modifiers(backend, lengths, modifier, dense):
    q, k, v = make_qkv(111, 90, batch=2, heads=4, kv_heads=2, head_dim=24)
    mask = None if dense else random_block_mask(111, 90, block=(32, 16), heads=4, empty_rows=True)
    made = {
        "none": None,
        "decay": frame_decay(111, 90),
        "bias": key_bias(90),
        "bias_batch": key_bias(2, 90),
        "bias_heads": key_bias(1, 4, 90),
    }[modifier]
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    compare(backend, q, k, v, mask, key_lengths=key_lengths, modifier=made)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "strided"])
def test_memory_orders(backend, layout):
    q, k, v = make_qkv(128, 128, heads=3, head_dim=16, layout=layout)
    compare(backend, q, k, v, random_block_mask(128, block=(32, 16)))


@pytest.mark.parametrize("backend", FAST)
def test_last_dimension_may_be_strided(backend):
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in make_qkv(100, head_dim=16))
    assert q.stride(-1) != 1
    compare(backend, q, k, v, random_block_mask(100, block=(32, 16)))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_no_tokens(backend, q_len, kv_len):
    q, k, v = make_qkv(q_len, kv_len, head_dim=16)
    mask = BlockMask.from_dense(torch.ones(q_len, kv_len, dtype=torch.bool), (32, 16))
    compare(backend, q, k, v, mask, lse=True)
    compare(backend, q, k, v, None, lse=True)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_rows_without_keys_give_zero_and_minus_infinity(backend):
    from sparsereel_kernels import sparse_attention

    q, k, v = make_qkv(100, head_dim=16)
    dense = torch.rand(100, 100) < 0.3
    dense[:40] = False
    dense[70] = False
    out, lse = sparse_attention(q, k, v, BlockMask.from_dense(dense, (32, 16)), return_lse=True, backend=backend)
    assert (out[:, :, :40] == 0).all()
    assert (out[:, :, 70] == 0).all()
    assert (lse[:, :, :40] == -torch.inf).all()
    assert not out.isnan().any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(backend, scale):
    q, k, v = make_qkv(70, head_dim=16)
    compare(backend, q, k, v, random_block_mask(70, block=(32, 16)), scale=scale)


@pytest.mark.parametrize("backend", FAST)
def test_large_scores_do_not_overflow(backend):
    q, k, v = make_qkv(70, head_dim=16)
    compare(backend, 40 * q, 40 * k, v, random_block_mask(70, block=(32, 16)))


@pytest.mark.parametrize("modifier", [None, "decay", "bias"])
@pytest.mark.parametrize("pairs", [1, 1 << 12])
def test_torch_merges_stretches_of_long_rows(monkeypatch, modifier, pairs):
    """With room for one block at a time every row is taken in stretches, as rows of very long sequences are."""
    from sparsereel_kernels import torch_blocks

    monkeypatch.setattr(torch_blocks.Call, "pairs_at_once", lambda *_: pairs)
    q, k, v = make_qkv(111, 200, batch=2, heads=2, kv_heads=1, head_dim=16)
    made = {None: None, "decay": frame_decay(111, 200), "bias": key_bias(2, 200)}[modifier]
    mask = random_block_mask(111, 200, block=(32, 16), heads=2, empty_rows=True)
    lengths = torch.tensor([200, 50])
    compare("torch", q, k, v, mask, modifier=made, key_lengths=lengths, gradients=True)


def test_torch_uses_fp32_products_where_the_processor_has_no_others(monkeypatch):
    from sparsereel_kernels import torch_blocks

    monkeypatch.setattr(torch_blocks, "compute_dtype", lambda dtype, device: torch.float32)
    q, k, v = make_qkv(111, head_dim=16, dtype=torch.bfloat16)
    compare("torch", q, k, v, random_block_mask(111, block=(32, 16)), gradients=True)


@pytest.mark.parametrize("backend", FAST)
def test_same_bits_every_time(backend):
    from sparsereel_kernels import sparse_attention

    q, k, v = make_qkv(300, head_dim=32, dtype=torch.bfloat16)
    mask = random_block_mask(300, block=(32, 16))
    first = sparse_attention(q, k, v, mask, backend=backend)
    assert all(torch.equal(first, sparse_attention(q, k, v, mask, backend=backend)) for _ in range(3))
