"""The triton_int8 backend against attention on the very numbers that its bytes stand for, and against the definition.

Runs on a GPU (`-m gpu`) and, started by test_triton_interpreter.py, in Triton's interpreter.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from sparsereel_kernels import (
    BackendUnavailable,
    FrameDecay,
    dispatch,
    reference,
    sparse_attention,
    triton,
    triton_int8,
)
from sparsereel_kernels.run import Wants, problem_of
from sparsereel_kernels.testing import key_bias, make_qkv, random_block_mask
from sparsereel_kernels.triton.quantise import mean_key, shift_of, smoothed, to_bytes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def of_bytes(x, block, tile):
    """`x` as its bytes have it, tile by tile, the plain way."""
    found = torch.empty_like(x, dtype=torch.float64)
    for start in range(0, x.shape[2], block):
        for first in range(start, min(start + block, x.shape[2]), tile):
            part = x[:, :, first : min(first + tile, start + block)].double()
            step = part.abs().amax((2, 3), keepdim=True) / 127
            found[:, :, first : first + part.shape[2]] = (part / step.clamp_min(1e-30)).round() * step
    return found


def from_bytes(x, block, tile):
    """What `to_bytes` made, as numbers again."""
    found, scale = to_bytes(x, block, tile)
    at, tiles = torch.arange(x.shape[2], device=x.device), -(-block // tile)
    return found.double() * scale.double()[:, :, at // block * tiles + at % block // tile, None]


def emulated(q, k, v, mask, scale, lengths=None, modifier=None):
    """out and lse in fp64 of what the bytes stand for, in the tiles that the kernel walks."""
    config = triton.call_of(q, k, v, mask, scale, lengths, modifier).config("forward")
    block = (config.tile_m, config.tile_n) if mask is None else mask.BLOCK_SIZE
    mean = mean_key(k, lengths)
    q_seen = from_bytes(q, block[0], config.tile_m)
    k_seen = from_bytes(smoothed(k, mean, lengths), block[1], config.tile_n)
    out, lse = reference.forward(q_seen, k_seen, v.double(), mask, scale, lengths, modifier)
    return out, lse + shift_of(q, mean, scale)


@on_devices
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize(
    ("block", "q_len", "kv_len", "head_dim"),
    [
        ((64, 64), 130, 150, 64),
        ((32, 16), 63, 40, 40),
        ((24, 40), 70, 90, 16),
        ((128, 64), 100, 100, 128),
        (None, 70, 90, 32),
    ],
    ids=str,
)
def test_it_is_attention_on_what_the_bytes_stand_for(device, block, q_len, kv_len, head_dim, dtype):
    q, k, v = make_qkv(q_len, kv_len, batch=2, heads=4, kv_heads=2, head_dim=head_dim, v_dim=24, dtype=dtype)
    q, k, v = (x.to(device) for x in (q, k + 3, v))
    mask = None
    if block is not None:
        mask = random_block_mask(q_len, kv_len, block=block, heads=4, density=0.6, empty_rows=True).to(device)
    lengths = torch.tensor([kv_len, kv_len // 2], dtype=torch.int32, device=device)
    scale = head_dim**-0.5
    out, lse = sparse_attention(q, k, v, mask, key_lengths=lengths, return_lse=True, backend="triton_int8")
    expected, expected_lse = emulated(q, k, v, mask, scale, lengths)
    assert (out - expected).abs().max() <= 4 * EPS[dtype] * v.abs().max()
    assert torch.allclose(lse.double(), expected_lse, atol=1e-4)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)


@on_devices
def test_a_bias_and_padded_keys_that_hold_nan(device):
    q, k, v = (x.to(device) for x in make_qkv(40, 64, batch=2, heads=2, head_dim=32, dtype=torch.float16))
    lengths = torch.tensor([40, 64], dtype=torch.int32, device=device)
    bias = key_bias(2, 64)
    bias = type(bias)(bias.bias.to(device))
    clean = sparse_attention(q, k, v, key_lengths=lengths, modifier=bias, backend="triton_int8")
    expected, _ = emulated(q, k, v, None, 32**-0.5, lengths, bias)
    assert (clean - expected).abs().max() <= 4 * EPS[q.dtype] * v.abs().max()
    k[0, :, 40:], v[0, :, 40:] = torch.nan, torch.nan
    assert torch.equal(sparse_attention(q, k, v, key_lengths=lengths, modifier=bias, backend="triton_int8"), clean)


@on_devices
@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_the_error_of_rounding_is_as_stated(device, offset):
    """Also for keys that share a large offset, which smoothing takes off."""
    q, k, v = make_qkv(200, heads=2, head_dim=64, dtype=torch.bfloat16)
    q, k, v = (x.to(device) for x in (q, k + offset, v))
    mask = random_block_mask(200, block=(64, 64), density=0.6).to(device)
    out = sparse_attention(q, k, v, mask, backend="triton_int8").double()
    exact, _ = reference.forward(q.double(), k.double(), v.double(), mask, 64**-0.5, None, None)
    assert (out - exact).std() <= 0.03 * exact.std()


@on_devices
@pytest.mark.parametrize("masked", [True, False], ids=["sparse", "dense"])
def test_few_queries_are_cut_along_the_keys(device, monkeypatch, masked):
    from sparsereel_kernels.triton import launch

    target = replace(triton.target_of(torch.device(device)), processors=8)
    monkeypatch.setattr(triton, "target_of", lambda device: target)
    made, run = [], launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: (made.append(self), run(self))[1])
    q, k, v = (x.to(device) for x in make_qkv(20, 1200, heads=1, head_dim=32, dtype=torch.bfloat16))
    mask = random_block_mask(20, 1200, block=(32, 32), density=0.5).to(device) if masked else None
    out = sparse_attention(q, k, v, mask, backend="triton_int8")
    expected, _ = emulated(q, k, v, mask, 32**-0.5)
    assert (out - expected).abs().max() <= 4 * EPS[q.dtype] * v.abs().max()
    if device == "cpu":
        assert made[0].shape.SPLITS > 1


# ------------------------------------------------------------------ without a GPU


@pytest.mark.parametrize(("block", "tile"), [(64, 64), (64, 16), (24, 16), (40, 32), (128, 128)])
@pytest.mark.parametrize("rows", [1, 63, 130])
def test_bytes_are_those_of_the_plain_way(block, tile, rows):
    torch.manual_seed(0)
    x = torch.randn(2, 3, rows, 8) * torch.rand(2, 3, rows, 1)
    found, scale = to_bytes(x, block, tile)
    tiles = -(-block // tile)
    assert found.dtype == torch.int8
    assert scale.shape == (2, 3, -(-rows // block) * tiles)
    at = torch.arange(rows)
    mine = scale[:, :, at // block * tiles + at % block // tile]
    assert torch.allclose((found.double() * mine.double()[..., None]), of_bytes(x, block, tile), atol=1e-6)


def test_smoothing_changes_logits_by_one_number_a_query():
    q, k, _ = make_qkv(10, 20, batch=2, heads=4, kv_heads=2, head_dim=8)
    lengths = torch.tensor([20, 7], dtype=torch.int32)
    mean = mean_key(k, lengths)
    near = smoothed(k, mean, lengths)
    change = (q @ k.repeat_interleave(2, 1).mT - q @ near.repeat_interleave(2, 1).mT) * 0.3
    expected = shift_of(q, mean, 0.3)[..., None]
    assert torch.allclose(change[0], expected[0].expand(-1, -1, 20), atol=1e-5)
    assert torch.allclose(change[1, :, :, :7], expected[1].expand(-1, -1, 7), atol=1e-5)
    assert (near[1, :, 7:] == 0).all()


def test_it_runs_only_by_name_and_says_what_it_cannot_do():
    q, k, v = make_qkv(10, head_dim=16)
    frames = torch.zeros(10, dtype=torch.int32)
    problem = problem_of(q, k, v, None, None, FrameDecay(frames, frames, torch.ones(1)), Wants(backward=True))
    reasons = " | ".join(dispatch.BY_NAME["triton_int8"].reasons(problem))
    for part in ("float32 is not supported", "frame_decay is not supported: smoothed", "gradients are not supported"):
        assert part in reasons
    assert not dispatch.BY_NAME["triton_int8"].automatic
    assert triton_int8.unsupported_reasons(replace(problem, device_type="cuda", dtype=torch.int32))
    with pytest.raises(BackendUnavailable, match="triton_int8"):
        sparse_attention(q, k, v, backend="triton_int8")
