"""The definition itself: against plain softmax attention, and its closed-form gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsereel_kernels import BlockMask, FrameDecay, KeyBias, reference, sparse_attention
from sparsereel_kernels.testing import frame_decay, key_bias, make_qkv, random_block_mask


def test_dense_is_torch_attention():
    q, k, v = make_qkv(50, 70, batch=2, heads=4, kv_heads=2, head_dim=16, v_dim=24)
    out = sparse_attention(q, k, v, backend="reference")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_mask_is_torch_attention_with_that_mask():
    q, k, v = make_qkv(50, 70, head_dim=16)
    mask = random_block_mask(50, 70, block=(16, 8), density=0.6, seed=3)
    assert mask.to_dense().any(-1).all()
    out = sparse_attention(q, k, v, mask, scale=0.3, backend="reference")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense(), scale=0.3))


def test_lse_is_the_log_of_the_row_sum():
    q, k, v = make_qkv(20, 30, head_dim=16)
    _, lse = sparse_attention(q, k, v, return_lse=True, backend="reference")
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.transpose(-1, -2) / 4, -1))


def test_frame_decay_by_hand():
    """Positive logits are multiplied, others and text stay, distances past the table use its last factor."""
    q = torch.ones(1, 1, 3, 8)
    k = torch.stack([torch.full((8,), x) for x in (0.5, -0.5, 0.5, 0.5)])[None, None]
    decay = FrameDecay(
        torch.tensor([0, 1, -1], dtype=torch.int32),
        torch.tensor([0, 0, -1, 9], dtype=torch.int32),
        torch.tensor([1.0, 0.5, 0.25]),
    )
    s, factor = reference.logits(q, k, 1.0, decay)
    expected = torch.tensor([[4, -4, 4, 1], [2, -4, 4, 1], [4, -4, 4, 4]], dtype=torch.float32)
    assert torch.equal(s[0, 0], expected)
    assert factor is not None
    assert factor[0, 0, 0, 1] == 1


def test_key_bias_adds_to_logits():
    q, k, v = make_qkv(20, 30, batch=2, head_dim=16)
    bias = key_bias(2, 30)
    out = sparse_attention(q, k, v, modifier=bias, backend="reference")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=bias.bias[:, None, None]))


@pytest.mark.parametrize("modifier", ["none", "decay"])
@pytest.mark.parametrize("lengths", [None, [12, 5]], ids=str)
def test_gradients_are_finite_differences(modifier, lengths):
    q, k, v = (
        x.requires_grad_() for x in make_qkv(10, 12, batch=2, heads=2, kv_heads=1, head_dim=8, dtype=torch.float64)
    )
    dense = torch.rand(10, 12) < 0.7
    dense[3] = False
    mask = BlockMask.from_dense(dense, (8, 8))
    key_lengths = None if lengths is None else torch.tensor(lengths)

    def run(q, k, v):
        made = frame_decay(10, 12) if modifier == "decay" else None
        out, lse = sparse_attention(
            q, k, v, mask, key_lengths=key_lengths, modifier=made, return_lse=True, backend="reference"
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("shape", [(12,), (2, 12), (1, 12), (2, 1, 12), (1, 2, 12)], ids=str)
def test_bias_gradient_is_that_of_the_definition(shape):
    q, k, v = make_qkv(10, 12, batch=2, head_dim=8, dtype=torch.float64)
    bias = torch.randn(shape, requires_grad=True)
    out, lse = reference.forward(q, k, v, None, 0.3, None, KeyBias(bias))
    grads = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), bias, grads)[0]
    found = reference.backward(*grads, q, k, v, out.detach(), lse.detach(), None, 0.3, None, KeyBias(bias.detach()))[3]
    torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused():
    q, k, v = (x.requires_grad_() for x in make_qkv(10, head_dim=8))
    (grad,) = torch.autograd.grad(sparse_attention(q, k, v, backend="reference").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
