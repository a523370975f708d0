"""The C++ kernels on every instruction set that runs here: results, gradients, bits and odd inputs."""

from __future__ import annotations

import pytest
import torch

from sparsereel_kernels import BackendUnavailable, BlockMask, FrameDecay, KeyBias, cpu, dispatch, sparse_attention
from sparsereel_kernels.testing import (
    assert_matches_reference,
    frame_decay,
    key_bias,
    make_qkv,
    random_block_mask,
)

pytestmark = pytest.mark.skipif(bool(cpu.build_status().reason), reason=cpu.build_status().reason)

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 0.125


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Pins one instruction set; skips those that this processor lacks."""
    if request.param not in cpu.isas():
        pytest.skip(f"{request.param} does not run here")
    monkeypatch.setenv("SPARSEREEL_ISA", request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (63, 63), (111, 1000), (1000, 111), (300, 300)])
def test_lengths(isa, dtype, q_len, kv_len):
    q, k, v = make_qkv(q_len, kv_len, head_dim=64, dtype=dtype, layout="bshd")
    mask = random_block_mask(q_len, kv_len, density=0.5, heads=2, empty_rows=q_len > 128)
    assert_matches_reference(q, k, v, mask, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_len", [1, 37, 140])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_few_queries_and_many_keys(isa, dtype, q_len, dense):
    """The keys of such calls are cut in pieces, whose results are merged."""
    q, k, v = make_qkv(q_len, 5000, batch=2, heads=2, kv_heads=1, head_dim=40, v_dim=24, dtype=dtype)
    mask = None if dense else random_block_mask(q_len, 5000, density=0.6, heads=2, empty_rows=q_len > 128)
    lengths = torch.tensor([5000, 1500], dtype=torch.int32)
    assert_matches_reference(q, k, v, mask, backend="cpu", key_lengths=lengths, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "v_dim"),
    [(8, 256), (32, 32), (33, 17), (40, 48), (72, 64), (80, 160), (96, 40), (128, 128), (160, 8), (256, 80)],
)
def test_head_dims(isa, dtype, head_dim, v_dim):
    q, k, v = make_qkv(131, 90, head_dim=head_dim, v_dim=v_dim, dtype=dtype)
    assert_matches_reference(q, k, v, random_block_mask(131, 90, block=(64, 32), density=0.6), backend="cpu")


@pytest.mark.parametrize("block", [(8, 8), (16, 24), (40, 72), (136, 64), (256, 128), (1024, 1024)], ids=str)
def test_block_sizes(isa, block):
    q, k, v = make_qkv(301, 275, head_dim=24)
    mask = random_block_mask(301, 275, block=block, density=0.5, partial_share=0.7, heads=2)
    assert_matches_reference(q, k, v, mask, backend="cpu", modifier=KeyBias(torch.randn(1, 275)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_groups_lengths_and_batches(isa, dtype, dense):
    q, k, v = make_qkv(150, 170, batch=3, heads=4, kv_heads=2, head_dim=40, dtype=dtype)
    mask = None if dense else random_block_mask(150, 170, block=(32, 16), batch=3, heads=4, empty_rows=True)
    lengths = torch.tensor([170, 0, 37], dtype=torch.int32)
    assert_matches_reference(q, k, v, mask, backend="cpu", key_lengths=lengths)


def tokens(n, start=0):
    return torch.arange(start, start + n, dtype=torch.int32)


# Strips of 16 keys take four roads: exempt, one frame, consecutive (decay by token distance) and mixed.
MODIFIERS = {
    "frames": lambda n, m: FrameDecay(tokens(n) // 48, tokens(m) // 48, torch.tensor([1.0, 0.5, 0.2])),
    "tokens": lambda n, m: FrameDecay(tokens(n, 3), tokens(m), 0.99 ** torch.arange(40.0)),
    "mixed": lambda n, m: frame_decay(n, m, frames=9),
    # Near pairs stay as they are: whole strips of them, and strips that begin among them.
    "window": lambda n, m: FrameDecay(tokens(n), tokens(m), torch.tensor([1.0] * 45 + [0.9])),
    "window_of_frames": lambda n, m: FrameDecay(tokens(n) // 32, tokens(m) // 32, torch.tensor([1.0, 1.0, 0.9])),
    "growth": lambda n, m: FrameDecay(tokens(n) // 48, tokens(m) // 48, torch.tensor([1.0, 1.5, 2.0])),
    "text": lambda n, m: FrameDecay(
        tokens(n) // 7 - 1, (tokens(m) // 32).clamp(max=3) - 1, torch.tensor([0.5, -0.5, 0.0])
    ),
    "bias": lambda n, m: key_bias(m),
    "bias_of_heads": lambda n, m: key_bias(2, 4, m),
    "bias_of_samples": lambda n, m: key_bias(2, 1, m),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_modifiers(isa, dtype, modifier):
    q, k, v = make_qkv(150, 171, batch=2, heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    mask = random_block_mask(150, 171, block=(64, 40), heads=4, density=0.6, empty_rows=True)
    assert_matches_reference(q, k, v, mask, backend="cpu", modifier=MODIFIERS[modifier](150, 171))


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
def test_scales_that_are_odd(isa, scale):
    q, k, v = make_qkv(90, 70, head_dim=16)
    assert_matches_reference(q, k, v, random_block_mask(90, 70, block=(32, 32)), backend="cpu", scale=scale)


def test_every_half_value_passes_through(isa):
    """One key: the output is the value, so conversions are seen bit by bit."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        normal = every.float().abs() >= (0 if dtype == torch.float16 else torch.finfo(dtype).tiny)
        q = torch.zeros(1, 256, 1, 8, dtype=dtype)
        out, _ = cpu.forward(q, q, every.view(1, 256, 1, 256), None, SCALE)
        same = (out.flatten() == every) | (out.flatten().isnan() & every.isnan())
        assert bool(same[normal | every.isnan()].all())


def test_large_scores_do_not_overflow(isa):
    q, k, v = make_qkv(64, 640, head_dim=16)
    out, lse = cpu.forward(q * 50, k * 50, v, None, 1.0)
    assert bool(out.isfinite().all() & lse.isfinite().all())
    assert_matches_reference(q * 50, k * 50, v, None, backend="cpu", scale=1.0, gradients=False)


def test_nan_stays_in_its_row(isa):
    q, k, v = make_qkv(100, 100, heads=1, head_dim=16)
    q[0, 0, 7, 3] = float("nan")
    out, lse = cpu.forward(q, k, v, None, SCALE)
    wrong = out.isnan().any(-1)[0, 0]
    assert wrong.nonzero().flatten().tolist() == [7]
    assert lse.isnan()[0, 0].nonzero().flatten().tolist() == [7]


def test_padding_never_reaches_a_result(isa):
    """Keys past the key length may hold NaN."""
    q, k, v = make_qkv(70, 90, batch=2, head_dim=24)
    lengths = torch.tensor([90, 41], dtype=torch.int32)
    dirty = [x.clone() for x in (k, v)]
    for x in dirty:
        x[1, :, 41:] = float("nan")
    clean, lse = cpu.forward(q, k, v, None, SCALE, lengths)
    out, dirty_lse = cpu.forward(q, *dirty, None, SCALE, lengths)
    assert torch.equal(out, clean)
    assert torch.equal(lse, dirty_lse)
    grads = cpu.backward(torch.randn_like(out), None, q, *dirty, out, lse, None, SCALE, lengths)
    assert all(bool(x.isfinite().all()) for x in grads[:3])
    assert bool((grads[1][1, :, 41:] == 0).all() & (grads[2][1, :, 41:] == 0).all())


def test_expanded_and_strided_inputs(isa):
    q, k, v = make_qkv(90, 90, batch=2, heads=4, head_dim=24, layout="strided")
    k, v = k[:, :1].expand(2, 4, 90, 24), v[:1].expand(2, 4, 90, 24)
    plain = cpu.forward(q.contiguous(), k.contiguous(), v.contiguous(), None, SCALE)
    assert all(map(torch.equal, cpu.forward(q, k, v, None, SCALE), plain))
    grad = torch.randn(2, 4, 1, 24).expand(2, 4, 90, 24)
    rest = (*plain, None, SCALE)
    ours = cpu.backward(grad, None, q, k, v, *rest)
    theirs = cpu.backward(grad.contiguous(), None, q.contiguous(), k.contiguous(), v.contiguous(), *rest)
    assert all(map(torch.equal, ours[:3], theirs[:3]))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0), (1, 1, 0, 0)], ids=str)
def test_nothing_to_do(isa, shape):
    batch, heads, q_len, kv_len = shape
    q, k = torch.randn(batch, heads, q_len, 16), torch.randn(batch, heads, kv_len, 16)
    out, lse = cpu.forward(q, k, k, None, SCALE)
    assert bool((out == 0).all() & (lse == -torch.inf).all())
    grads = cpu.backward(torch.randn_like(out), None, q, k, k, out, lse, None, SCALE)
    assert all(bool((x == 0).all()) for x in grads[:3])


# Tasks of a head that share the sums of its queries wait for each other: blocks of keys that are cut, and no mask.
@pytest.mark.parametrize("block", [(128, 64), (32, 256), None])
def test_same_bits_whatever_the_threads(isa, block):
    q, k, v = make_qkv(700, 700, batch=2, heads=4, kv_heads=2, head_dim=32, dtype=torch.bfloat16)
    mask = None if block is None else random_block_mask(700, heads=4, density=0.4, block=block)
    bias = KeyBias(torch.randn(2, 4, 700))
    grad = torch.randn_like(q)
    before, results = torch.get_num_threads(), []
    few = torch.randn(1, 1, 9, 32)
    many = torch.randn(1, 1, 4096, 32)
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            out, lse = cpu.forward(q, k, v, mask, SCALE, None, bias)
            grads = cpu.backward(grad, lse, q, k, v, out, lse, mask, SCALE, None, bias)
            results.append((out, lse, *grads, *cpu.forward(few, many, many, None, SCALE)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSEREEL_ISA", "mmx")
    dispatch.forget()
    q, k, v = make_qkv(32, head_dim=16)
    with pytest.raises(BackendUnavailable, match="SPARSEREEL_ISA=mmx does not run here"):
        sparse_attention(q, k, v, backend="cpu")
    with pytest.raises(ValueError, match="instruction set"):
        cpu.forward(q, k, v, None, SCALE)
    monkeypatch.delenv("SPARSEREEL_ISA")
    dispatch.forget()


def test_a_mask_for_other_sizes_is_refused():
    q, k, v = make_qkv(64, 64, head_dim=16)
    with pytest.raises(ValueError, match="64 and k has 64 tokens"):
        cpu.forward(q, k, v, random_block_mask(128, 64), SCALE)


@pytest.mark.parametrize(
    "field", ["kv_indices", "full_kv_indices", "partial_tile", "kv_num_blocks", "full_kv_num_blocks"]
)
@pytest.mark.parametrize("value", [-1, 1000])
def test_lists_that_point_outside_are_refused(field, value):
    """Masks are checked when they are built; the kernels do not trust them nevertheless."""
    q, k, v = make_qkv(256, 256, head_dim=16)
    good = random_block_mask(256, density=0.5)
    tensors = {name: x.clone() for name, x in good.tensors().items()}
    tensors[field].view(-1)[0] = value
    bad = BlockMask((256, 256), good.BLOCK_SIZE, tensors)
    with pytest.raises(ValueError, match="does not exist"):
        cpu.forward(q, k, v, bad, SCALE)
    out, lse = cpu.forward(q, k, v, good, SCALE)
    with pytest.raises(ValueError, match="does not exist"):
        cpu.backward(out, None, q, k, v, out, lse, bad, SCALE)
