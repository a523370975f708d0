"""The triton backend against the definition, within the budget that testing.py derives.

The same tests run on a GPU (`-m gpu`) and, where TRITON_INTERPRET=1 was set before Triton was imported, on CPU tensors
in Triton's interpreter: test_triton_interpreter.py starts that run in a process of its own.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from sparsereel_kernels import BlockMask, FrameDecay, KeyBias, sparse_attention
from sparsereel_kernels.testing import assert_matches_reference, frame_decay, key_bias, make_qkv, random_block_mask

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.parametrize("device", DEVICES)

if INTERPRETED or torch.cuda.is_available():
    import triton
    import triton.language as tl

    from sparsereel_kernels.triton import primitives
    from sparsereel_kernels.triton.primitives import head_offset, row_ptrs

    @triton.jit
    def offsets_kernel(view, found_ptr, b, h, start, S: tl.constexpr):
        """The offset of a head in elements, and of the last element of a tile of 16 x 16 in bytes."""
        base = head_offset(view, b, h, S)
        tl.store(found_ptr, base)
        address = row_ptrs(view, base, start, 16, 16, S).to(tl.int64) - view.ptr.to(tl.int64)
        tl.store(found_ptr + 1, tl.max(tl.max(address, 1), 0))


def compare(device, q, k, v, mask, *, modifier=None, key_lengths=None, **options):
    """Move everything to the device and compare out, lse and all gradients."""
    if isinstance(modifier, KeyBias):
        modifier = KeyBias(modifier.bias.to(device))
    elif isinstance(modifier, FrameDecay):
        modifier = FrameDecay(*(x.to(device) for x in (modifier.frame_of_q, modifier.frame_of_k, modifier.table)))
    if key_lengths is not None:
        key_lengths = torch.tensor(key_lengths, dtype=torch.int32, device=device)
    mask = None if mask is None else mask.to(device)
    q, k, v = (x.to(device) for x in (q, k, v))
    options = {"modifier": modifier, "key_lengths": key_lengths, "gradients": True} | options
    assert_matches_reference(q, k, v, mask, backend="triton", **options)


def pretend(monkeypatch, architecture, processors=1):
    """Choose tiles, descriptors and splits as on another GPU."""
    from sparsereel_kernels import triton

    target = replace(triton.target_of(torch.device("cpu")), architecture=architecture, processors=processors)
    monkeypatch.setattr(triton, "target_of", lambda device: target)


def record(monkeypatch):
    """The launches that will be made."""
    from sparsereel_kernels.triton import launch

    made, run = [], launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: (made.append(self), run(self))[1])
    return made


@pytest.mark.parametrize(
    ("block", "q_len", "kv_len"),
    [
        ((128, 64), 200, 150),
        ((64, 64), 63, 63),
        ((32, 16), 63, 40),
        ((16, 128), 40, 200),
        ((24, 40), 70, 90),
        ((8, 8), 20, 30),
        ((96, 48), 111, 100),
        ((32, 32), 1, 1),
        ((32, 32), 1, 70),
        ((64, 64), 128, 128),
    ],
    ids=str,
)
def test_lengths_and_blocks(device, block, q_len, kv_len):
    q, k, v = make_qkv(q_len, kv_len, heads=1, head_dim=40, v_dim=24)
    compare(device, q, k, v, random_block_mask(q_len, kv_len, block=block, density=0.6))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "v_dim"),
    [
        (torch.bfloat16, 8, 8),
        (torch.float16, 40, 64),
        (torch.float32, 64, 40),
        (torch.bfloat16, 72, 72),
        (torch.float16, 80, 80),
        (torch.bfloat16, 96, 96),
        (torch.float32, 128, 128),
        (torch.float16, 160, 160),
        (torch.bfloat16, 256, 256),
        (torch.float32, 256, 8),
    ],
    ids=str,
)
def test_dtypes_and_head_dims(device, dtype, head_dim, v_dim):
    q, k, v = make_qkv(40, 50, heads=1, head_dim=head_dim, v_dim=v_dim, dtype=dtype)
    compare(device, q, k, v, random_block_mask(40, 50, block=(32, 32), density=1.0))


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 1, 2), (2, 1, 1), (1, 4, 2), (2, 4, 4), (2, 4, 1)])
def test_batches_groups_and_masks_of_their_own(device, batch, heads, kv_heads):
    q, k, v = make_qkv(60, 50, batch=2, heads=4, kv_heads=kv_heads, head_dim=16, v_dim=24, dtype=torch.bfloat16)
    compare(device, q, k, v, random_block_mask(60, 50, block=(32, 32), batch=batch, heads=heads, empty_rows=True))


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    ("modifier", "lengths"),
    [
        ("none", [60, 33]),
        ("none", [0, 60]),
        ("decay", None),
        ("decay", [60, 33]),
        ("bias", [60, 33]),
        ("bias_batch", None),
        ("bias_heads", [0, 60]),
    ],
    ids=str,
)
def test_key_lengths_and_modifiers(device, lengths, modifier, dense):
    q, k, v = make_qkv(50, 60, batch=2, heads=2, kv_heads=1, head_dim=16)
    mask = None if dense else random_block_mask(50, 60, block=(32, 16), heads=2, density=0.6, empty_rows=True)
    made = {
        "none": None,
        "decay": frame_decay(50, 60),
        "bias": key_bias(60),
        "bias_batch": key_bias(2, 60),
        "bias_heads": key_bias(1, 2, 60),
    }[modifier]
    compare(device, q, k, v, mask, key_lengths=lengths, modifier=made)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "strided"])
def test_memory_orders(device, layout):
    q, k, v = make_qkv(64, heads=2, head_dim=16, layout=layout)
    compare(device, q, k, v, random_block_mask(64, block=(32, 32)))


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(device, scale):
    q, k, v = make_qkv(50, heads=1, head_dim=16)
    compare(device, q, k, v, random_block_mask(50, block=(32, 32), density=1.0), scale=scale)


def test_large_scores_do_not_overflow(device):
    q, k, v = make_qkv(50, heads=1, head_dim=16)
    compare(device, 40 * q, 40 * k, v, random_block_mask(50, block=(32, 32), density=1.0))


def test_full_blocks_only(device):
    q, k, v = make_qkv(100, heads=1, head_dim=16)
    mask = random_block_mask(100, block=(32, 32), partial_share=0.0, density=0.6)
    assert not mask.has_partial
    compare(device, q, k, v, mask)


def test_rows_without_keys_give_zero_and_minus_infinity(device):
    q, k, v = (x.to(device) for x in make_qkv(100, head_dim=16))
    dense = torch.rand(100, 100) < 0.3
    dense[:40] = False
    dense[70] = False
    mask = BlockMask.from_dense(dense, (32, 32)).to(device)
    out, lse = sparse_attention(q, k, v, mask, return_lse=True, backend="triton")
    assert (out[:, :, :40] == 0).all()
    assert (out[:, :, 70] == 0).all()
    assert (lse[:, :, :40] == -torch.inf).all()
    assert (lse[:, :, 70] == -torch.inf).all()
    assert not out.isnan().any()
    assert lse[:, :, 71:].isfinite().all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_no_tokens(device, q_len, kv_len):
    q, k, v = make_qkv(q_len, kv_len, head_dim=16)
    mask = BlockMask.from_dense(torch.ones(q_len, kv_len, dtype=torch.bool), (32, 16))
    compare(device, q, k, v, mask)
    compare(device, q, k, v, None)


def surrounded_by_nan(x):
    """`x` as a view into a larger tensor of NaN, with NaN before, between and after its rows."""
    batch, heads, tokens, features = x.shape
    room = torch.full((batch + 2, heads + 2, tokens + 40, features + 8), torch.nan, dtype=x.dtype)
    room[1:-1, 1:-1, 20:-20, :features] = x
    return room[1:-1, 1:-1, 20:-20, :features]


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("masked", [True, False], ids=["sparse", "dense"])
def test_nothing_outside_the_tensors_counts(device, monkeypatch, architecture, masked):
    pretend(monkeypatch, architecture)
    q, k, v = (surrounded_by_nan(x) for x in make_qkv(50, 70, heads=1, head_dim=32, dtype=torch.float16))
    mask = random_block_mask(50, 70, block=(32, 32), density=0.7) if masked else None
    compare(device, q, k, v, mask)


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_padded_keys_may_hold_nan(device, monkeypatch, architecture):
    """Keys past a sample's length are not only masked, they are not read into any sum."""
    pretend(monkeypatch, architecture)
    q, k, v = (x.to(device) for x in make_qkv(40, 64, batch=2, heads=1, head_dim=16, dtype=torch.float16))
    lengths = torch.tensor([40, 64], dtype=torch.int32, device=device)
    clean = sparse_attention(q, k, v, key_lengths=lengths, backend="triton")
    k[0, :, 40:], v[0, :, 40:] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sparse_attention(q, k, v, key_lengths=lengths, backend="triton")
    assert torch.equal(out, clean)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("modifier", [None, "decay"])
def test_tensor_descriptors(device, monkeypatch, dtype, modifier):
    pretend(monkeypatch, "sm90")
    made = record(monkeypatch)
    q, k, v = make_qkv(100, 90, batch=2, heads=2, kv_heads=1, head_dim=32, dtype=dtype, layout="bshd")
    mask = random_block_mask(100, 90, block=(32, 32), density=0.6, heads=2, empty_rows=True)
    options = {"modifier": frame_decay(100, 90)} if modifier else {}
    compare(device, q, k, v, mask, key_lengths=[90, 50], **options)
    kernels = {launch.kernel.__name__: launch.shape.TMA for launch in made}
    assert [kernels[f"{name}_kernel"] for name in ("forward", "query_gradient", "key_gradient")] == [True] * 3


def test_descriptors_only_where_the_inputs_allow_them(device, monkeypatch):
    pretend(monkeypatch, "sm90")
    made = record(monkeypatch)
    for head_dim in (24, 32):
        q, k, v = (x.to(device) for x in make_qkv(32, heads=1, head_dim=head_dim, dtype=torch.float16))
        sparse_attention(q, k, v, backend="triton")
    assert [launch.shape.TMA for launch in made] == [False, True]


@pytest.mark.parametrize("masked", [True, False], ids=["sparse", "dense"])
def test_few_queries_and_many_keys_are_cut_along_the_keys(device, monkeypatch, masked):
    pretend(monkeypatch, "sm80", processors=8)
    made = record(monkeypatch)
    q, k, v = make_qkv(20, 1200, batch=2, heads=1, head_dim=16, dtype=torch.bfloat16)
    mask = random_block_mask(20, 1200, block=(32, 32), density=0.5) if masked else None
    compare(device, q, k, v, mask, key_lengths=[1200, 90], gradients=False)
    assert made[0].shape.SPLITS > 1
    assert made[1].kernel.__name__ == "merge_kernel"


def test_tuning_stores_the_fastest_that_agrees(device, monkeypatch, tmp_path):
    from sparsereel_kernels.triton import configs, launch, target_of
    from sparsereel_kernels.triton.tune import tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.tuned.cache_clear()
    fast, slow, wrong = (configs.Config(*x) for x in ((32, 16, 4, 1), (32, 32, 4, 2), (16, 16, 1, 1)))
    run = launch.Launch.run

    def run_wrongly(self):
        run(self)
        if self.config == wrong:
            written = self.arguments[3].ptr if self.kernel.__name__ == "forward_kernel" else self.arguments[4].ptr
            written += 1.0

    monkeypatch.setattr(launch.Launch, "run", run_wrongly)
    time = {fast: 1.0, slow: 2.0, wrong: 0.5}
    options = {"tokens": 64, "heads": 1, "head_dim": 16, "block": (32, 32), "device": device}
    found = tune(
        **options,
        kernels=("forward", "keys"),
        measure=lambda made: time.get(made.config, 3.0),
        tried=lambda architecture, block: iter([slow, fast, wrong]),
    )
    assert found == {"forward": fast, "keys": fast}
    name = target_of(torch.device(device)).device
    assert configs.choose(name, "sm80", "forward", 16, 16, (32, 32)) == fast
    assert configs.choose(name, "sm80", "queries", 16, 16, (32, 32)) != fast
    with pytest.raises(ValueError, match="kernels must be among forward, queries, keys, got sideways"):
        tune(kernels=("sideways",))
    configs.tuned.cache_clear()


def test_same_bits_every_time(device):
    q, k, v = (x.to(device).requires_grad_() for x in make_qkv(100, head_dim=16, dtype=torch.bfloat16))
    mask = random_block_mask(100, block=(32, 32), density=0.6).to(device)

    def once():
        out, lse = sparse_attention(q, k, v, mask, return_lse=True, backend="triton")
        return out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, v))

    first = once()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("step", [1, 8])
def test_offsets_beyond_32_bits(device, step):
    """Sample, head and row times their strides, as the kernels work them out, for tensors of some 2**43 elements."""
    found = torch.zeros(2, dtype=torch.int64, device=device)
    here = torch.zeros(1, dtype=torch.float16, device=device)
    batch, head, token = 2**31 - 8, 2**30 + 8, 3072
    b, h, start = 4095, 63, 2_000_000
    view = primitives.View(here, batch // step, head // step, token // step)
    shape = primitives.Shape(*[16] * 8, True, False, False, 8, "none", True, False, "ieee", STEP=step)
    offsets_kernel[(1,)](view, found, b, h, start, S=shape)
    base = b * batch + h * head
    assert found.tolist() == [base, 2 * (base + (start + 15) * token + 15)]
