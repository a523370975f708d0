"""FlexAttention: conversion of masks, the compiled backend, and its gradients' arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from sparsereel_kernels import BlockMask, KeyBias, dispatch, flex, reference, sparse_attention
from sparsereel_kernels.run import Wants, problem_of
from sparsereel_kernels.testing import assert_matches_reference, frame_decay, key_bias, make_qkv, random_block_mask

BLOCK = (32, 16)


@pytest.fixture
def compiled_flex():
    """Skips where flex cannot be compiled."""
    q, k, v = make_qkv(64, head_dim=16)
    reasons = dispatch.BY_NAME["flex"].reasons(problem_of(q, k, v, None, None, None, Wants()))
    if reasons:
        pytest.skip("; ".join(reasons))


def near(b, h, q_idx, kv_idx):
    """A band whose width depends on the head."""
    return (q_idx - kv_idx).abs() < 20 + h


def test_from_flex_evaluates_the_mask_function():
    table = torch.rand(100, 70) < 0.5
    for mask_mod in (near, lambda b, h, q, k: table[q, k], lambda b, h, q, k: k >= 0):
        theirs = torch_flex.create_block_mask(mask_mod, 2, 3, 100, 70, device="cpu", BLOCK_SIZE=BLOCK)
        dense = torch_flex.create_mask(mask_mod, 2, 3, 100, 70, device="cpu")
        assert torch.equal(BlockMask.from_flex(theirs).to_dense(), dense)


@pytest.mark.parametrize("allowed", [True, False])
def test_masks_without_partial_blocks_go_both_ways(allowed):
    dense = torch.full((1, 1, 100, 70), allowed)
    mask = BlockMask.from_dense(dense, BLOCK)
    assert not mask.has_partial
    assert torch.equal(BlockMask.from_flex(mask.to_flex()).to_dense(), dense)


def test_from_flex_refuses_other_blocks():
    theirs = torch_flex.create_block_mask(near, 1, 1, 100, 70, device="cpu", BLOCK_SIZE=(10, 16))
    with pytest.raises(ValueError, match=r"multiple of 8 from 8 to 1024, got \(10, 16\)"):
        BlockMask.from_flex(theirs)


def test_to_flex_has_the_lists_and_bits():
    mask = random_block_mask(100, 70, block=BLOCK, batch=2, heads=3)
    theirs = mask.to_flex()
    assert theirs.shape == (2, 3, 100, 70)
    dense = torch_flex.create_mask(theirs.mask_mod, 2, 3, 100, 70, device="cpu")
    assert torch.equal(dense, mask.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(theirs, name), getattr(mask, name))
    assert mask.to_flex() is theirs


def test_compiled_backend_matches_with_and_without_modifiers(compiled_flex):
    q, k, v = make_qkv(100, 70, batch=2, heads=4, kv_heads=2, head_dim=40, v_dim=24)
    mask = random_block_mask(100, 70, block=BLOCK, heads=4, empty_rows=True)
    lengths = torch.tensor([70, 30], dtype=torch.int32)
    for modifier, key_lengths in ((None, None), (frame_decay(100, 70), lengths), (key_bias(2, 1, 70), None)):
        assert_matches_reference(
            q, k, v, mask, backend="flex", modifier=modifier, key_lengths=key_lengths, lse=False, gradients=False
        )


def test_one_compile_for_many_masks(compiled_flex):
    torch._dynamo.reset()
    q, k, v = make_qkv(100, heads=3, head_dim=16, dtype=torch.bfloat16)
    assert_matches_reference(q, k, v, None, backend="flex", lse=False, gradients=False)
    masks = [random_block_mask(100, block=BLOCK, heads=3, seed=seed, density=0.4) for seed in range(5)]
    assert_matches_reference(q, k, v, masks[0], backend="flex", lse=False, gradients=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mask in masks[1:]:
            assert_matches_reference(q, k, v, mask, backend="flex", lse=False, gradients=False)


def test_inputs_that_require_grad_run_without_recording(compiled_flex):
    q, k, v = (x.requires_grad_() for x in make_qkv(64, head_dim=16))
    with torch.no_grad():
        out = sparse_attention(q, k, v, backend="flex")
    torch.testing.assert_close(out, sparse_attention(q, k, v, backend="reference").detach())


def test_what_it_cannot_do_it_says():
    q, k, v = make_qkv(64, head_dim=16)
    plain = problem_of(q, k, v, None, None, None, Wants())
    from dataclasses import replace

    for changed, reason in (
        ({"needs_backward": True}, "gradients are not supported on CPU"),
        ({"needs_lse": True}, "lse is not supported on CPU"),
        ({"dtype": torch.float64}, "dtype float64 is not supported (float32, bfloat16, float16)"),
        ({"q_len": 0}, "empty tensors are not supported"),
        ({"device_type": "xpu"}, "device xpu is not supported (cpu, cuda)"),
        ({"device_type": "cuda", "head_dim": 8}, "head dims 8, 16 are not supported (at least 16)"),
        ({"device_type": "cuda", "block": (16, 8)}, "blocks (16, 8) without a common divisor of 16"),
    ):
        assert any(reason in said for said in flex.unsupported_reasons(replace(plain, **changed)))


@pytest.mark.parametrize("modifier", ["none", "decay", "bias"])
def test_gradients_go_through_the_operator(monkeypatch, modifier):
    """FlexAttention has no gradients on CPU except uncompiled, behind a check: enough to test our side of them."""
    dispatch.forget()
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_compiled", lambda with_lse, kind: lambda *a: flex._attend(True, kind, *a))
    monkeypatch.setattr(flex, "forward", reference.forward)
    monkeypatch.setattr(flex, "_cpu_reasons", lambda problem: [])
    q, k, v = make_qkv(100, 70, batch=2, heads=2, kv_heads=1, head_dim=16)
    made = {"none": None, "decay": frame_decay(100, 70), "bias": KeyBias(torch.randn(2, 1, 70))}[modifier]
    mask = random_block_mask(100, 70, block=BLOCK)
    lengths = torch.tensor([70, 66], dtype=torch.int32)
    assert_matches_reference(q, k, v, mask, backend="flex", modifier=made, key_lengths=lengths)
    dispatch.forget()
