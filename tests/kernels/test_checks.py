"""Wrong calls: each is refused with one sentence that names what was given and what is allowed."""

from __future__ import annotations

import pytest
import torch

from sparsereel_kernels import FrameDecay, KeyBias, sparse_attention
from sparsereel_kernels.attention import mask_name
from sparsereel_kernels.testing import frame_decay, key_bias, make_qkv, random_block_mask

Q, K, V = make_qkv(50, 70, batch=2, heads=4, kv_heads=2, head_dim=16)
MASK = random_block_mask(50, 70, block=(32, 16))

WRONG = {
    "not tensors": (([[1]], K, V), {}, "q must be a tensor, got list"),
    "three dimensions": (
        (Q[0], K, V),
        {},
        r"q must have 4 dimensions \(batch, heads, tokens, features\), got \(4, 50, 16\)",
    ),
    "devices": ((Q, K.to("meta"), V), {}, "one device, got cpu, meta and cpu"),
    "dtypes": ((Q, K.half(), V), {}, "one dtype, got torch.float32, torch.float16 and torch.float32"),
    "integers": ((Q.int(), K.int(), V.int()), {}, "must be float32, bfloat16, float16, float64, got int32"),
    "batch": ((Q, K[:1], V[:1]), {}, "one batch size, got 2, 1 and 1"),
    "k and v": ((Q, K, V[:, :, :60]), {}, "same heads and tokens, got 2×70 and 2×60"),
    "heads": ((Q[:, :3], K, V), {}, "must divide the 3 heads of q, got 2"),
    "head dims": ((Q[..., :8], K, V), {}, "same head dim, got 8 and 16"),
    "small head dim": ((Q[..., :4], K[..., :4], V), {}, "head dim of q and k must be 8 to 256, got 4"),
    "large head dim": ((Q, K, V.repeat(1, 1, 1, 20)), {}, "head dim of v must be 8 to 256, got 320"),
    "mask type": ((Q, K, V, torch.ones(50, 70)), {}, r"got a tensor torch.float32 \(50, 70\) on cpu"),
    "mask of another kind": ((Q, K, V, "radial"), {}, "must be a BlockMask, a name from mask_name.. or None, got str"),
    "mask lengths": (
        (Q, K, V, random_block_mask(50, 64)),
        {},
        "mask is for 50 queries and 64 keys, but q has 50 and k has 70 tokens",
    ),
    "mask heads": (
        (Q, K, V, random_block_mask(50, 70, heads=3)),
        {},
        r"mask has heads 3, but q has 4 \(allowed: 1 or 4\)",
    ),
    "mask batch": ((Q, K, V, random_block_mask(50, 70, batch=3)), {}, "mask has batch 3, but q has 2"),
    "lengths shape": ((Q, K, V), {"key_lengths": torch.tensor([5])}, r"shape \(2,\), one length a sample, got \(1,\)"),
    "lengths type": ((Q, K, V), {"key_lengths": torch.tensor([5.0, 6.0])}, "key_lengths must be int32, got float32"),
    "lengths list": ((Q, K, V), {"key_lengths": [5, 6]}, "got list"),
    "decay lengths": (
        (Q, K, V),
        {"modifier": frame_decay(50, 71)},
        "an index for each of 50 queries and 70 keys, got 50 and 71",
    ),
    "bias shape": (
        (Q, K, V),
        {"modifier": key_bias(3, 70)},
        r"\(70,\), \(2 or 1, 70\) or \(2 or 1, 4 or 1, 70\), got \(3, 70\)",
    ),
    "modifier type": ((Q, K, V), {"modifier": 3}, "FrameDecay, a KeyBias or None, got int"),
    "modifier device": ((Q, K, V), {"modifier": KeyBias(torch.zeros(70, device="meta"))}, "q's device cpu, got meta"),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case, gradients):
    arguments, options, message = WRONG[case]
    if gradients:
        arguments = [
            x.clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments
        ]
    with pytest.raises(ValueError, match=message) as error:
        sparse_attention(*arguments, **options)
    assert "\n" not in str(error.value)


def test_modifiers_refuse_nonsense():
    frames, table = torch.zeros(5, dtype=torch.int32), torch.ones(3)
    for arguments, message in (
        ((frames.long(), frames, table), "frame_of_q must be torch.int32, got torch.int64"),
        ((frames, frames[None], table), r"frame_of_k must have 1 dimensions, got shape \(1, 5\)"),
        ((frames, frames, table[:0]), "at least one factor"),
        ((frames, frames, table.double()), "table must be torch.float32"),
        ((frames, frames, table.clone().requires_grad_()), "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            FrameDecay(*arguments)
    with pytest.raises(ValueError, match="bias must be torch.float32, got torch.float16"):
        KeyBias(torch.zeros(5, dtype=torch.float16))
    with pytest.raises(ValueError, match="1 or 2 or 3 dimensions"):
        KeyBias(torch.zeros(1, 1, 1, 5))
    with pytest.raises(ValueError, match="must be a tensor, got list"):
        KeyBias([0.0])


def test_names_are_checked_too():
    q, k, v = make_qkv(50, 71, head_dim=16)
    with pytest.raises(ValueError, match="mask is for 50 queries and 70 keys"):
        sparse_attention(q, k, v, mask_name(MASK))
    compiled = torch.compile(sparse_attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="mask is for 50 queries and 70 keys"):
        compiled(q, k, v, MASK)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_are_read_only_when_asked_for(monkeypatch, value):
    q = Q.clone()
    q[0, 0, 0, 0] = value
    sparse_attention(q, K, V, MASK)
    monkeypatch.setenv("SPARSEREEL_CHECK", "1")
    with pytest.raises(ValueError, match=r"q must be finite, got 1 of 6400 values NaN or infinite"):
        sparse_attention(q, K, V, MASK)
    sparse_attention(Q, K, V, MASK)


def test_check_reads_lengths_biases_and_tables(monkeypatch):
    monkeypatch.setenv("SPARSEREEL_CHECK", "1")
    with pytest.raises(ValueError, match=r"key_lengths must lie in 0 to 70, got \[3, 71\]"):
        sparse_attention(Q, K, V, MASK, key_lengths=torch.tensor([3, 71]))
    with pytest.raises(ValueError, match=r"finite or -inf"):
        sparse_attention(Q, K, V, MASK, modifier=KeyBias(torch.full((70,), torch.nan)))
    frames = frame_decay(50, 70)
    with pytest.raises(ValueError, match="table must be finite"):
        sparse_attention(Q, K, V, modifier=FrameDecay(frames.frame_of_q, frames.frame_of_k, torch.tensor([torch.inf])))


def test_check_reports_a_backend_that_gives_nan(monkeypatch):
    from sparsereel_kernels import reference

    monkeypatch.setenv("SPARSEREEL_CHECK", "1")
    monkeypatch.setattr(reference, "forward", lambda q, *rest: (q * torch.nan, q[..., 0]))
    with pytest.raises(FloatingPointError, match="backend reference gave NaN for finite inputs"):
        sparse_attention(Q, K, V, backend="reference")


def test_the_mask_is_never_changed():
    before = {name: tensor.clone() for name, tensor in MASK.tensors().items()}
    for backend in ("auto", "torch", "reference"):
        sparse_attention(Q, K, V, MASK, key_lengths=torch.tensor([5, 70]), backend=backend)
    assert all(torch.equal(before[name], tensor) for name, tensor in MASK.tensors().items())
