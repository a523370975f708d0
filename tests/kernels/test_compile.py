"""The operator under torch.compile and autograd: one graph for many masks, and backward with forward's mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from sparsereel_kernels import BlockMask, KeyBias, sparse_attention
from sparsereel_kernels.attention import mask_name
from sparsereel_kernels.testing import frame_decay, key_bias, make_qkv, random_block_mask

LAYERS = 20


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def masks(count=LAYERS, **options):
    return [random_block_mask(70, block=(32, 16), seed=seed, **options) for seed in range(count)]


class Layer(nn.Module):
    """One attention layer with a mask, or the name of one, in an attribute."""

    def __init__(self, mask):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.mask = mask

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return x + sparse_attention(q, k, v, self.mask, backend="torch").transpose(1, 2).flatten(2)


def eager(layers, x):
    """The same layers outside of any compiler."""
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize("hold", [lambda mask: mask, mask_name], ids=["mask", "name"])
@pytest.mark.parametrize("train", [False, True])
def test_one_graph_for_a_model_of_many_masks(hold, train):
    """One compile of a model with 20 layers and 20 masks; later calls see the masks that the layers hold then."""
    model = nn.Sequential(*(Layer(hold(mask)) for mask in masks()))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 70, 32, requires_grad=train)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(compiled(x), eager(model, x))
        for layer, mask in zip(model, reversed(masks()), strict=True):
            layer.mask = hold(mask)
        torch.testing.assert_close(compiled(x), eager(model, x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("hold", [lambda mask: mask, mask_name], ids=["mask", "name"])
def test_one_graph_for_one_layer_function(hold):
    """Regional compilation: the layer's function is compiled once, whichever of 20 masks it gets."""
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(lambda q, k, v, mask: sparse_attention(q, k, v, mask), backend=counter, fullgraph=True)
    q, k, v = make_qkv(70, head_dim=16)
    for mask in masks():
        torch.testing.assert_close(attend(q, k, v, hold(mask)), sparse_attention(q, k, v, mask))
    assert counter.frame_count == 1


def test_a_name_may_stand_for_dense():
    """So that a layer can go from sparse to dense and back in one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(sparse_attention, backend=counter, fullgraph=True)
    q, k, v = make_qkv(70, head_dim=16)
    (mask,) = masks(1)
    for name, expected in ((mask_name(mask), mask), (mask_name(None), None), (mask_name(mask), mask)):
        torch.testing.assert_close(attend(q, k, v, name), sparse_attention(q, k, v, expected))
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor(mode):
    q, k, v = (x.requires_grad_() for x in make_qkv(70, batch=2, heads=4, kv_heads=2, head_dim=16, layout="bshd"))
    mask, other = masks(2)
    attend = torch.compile(
        lambda q, k, v, mask: sparse_attention(q * 1.5, k, v, mask, return_lse=True), fullgraph=True, mode=mode
    )
    for chosen in (mask, other):
        out, lse = attend(q, k, v, chosen)
        expected = sparse_attention(q * 1.5, k, v, chosen, return_lse=True)
        torch.testing.assert_close((out, lse), expected)
        weights = torch.randn_like(out), torch.randn_like(lse)
        found = torch.autograd.grad((out, lse), (q, k, v), weights)
        torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k, v), weights))


@pytest.mark.parametrize("modifier", ["decay", "bias"])
def test_modifiers_and_key_lengths_in_a_graph(modifier):
    q, k, v = (x.requires_grad_() for x in make_qkv(70, batch=2, head_dim=16))
    bias = key_bias(2, 70, hidden=0).bias.requires_grad_()
    lengths = torch.tensor([70, 33], dtype=torch.int32)

    def call(q, k, v, mask, bias):
        made = KeyBias(bias) if modifier == "bias" else frame_decay(70, 70)
        return sparse_attention(q, k, v, mask, key_lengths=lengths, modifier=made)

    counter = CompileCounterWithBackend("aot_eager")
    decay = frame_decay(70, 70)

    def graph(q, k, v, mask, bias):
        made = KeyBias(bias) if modifier == "bias" else decay
        return sparse_attention(q, k, v, mask, key_lengths=lengths, modifier=made)

    inputs = (q, k, v, bias) if modifier == "bias" else (q, k, v)
    for mask in masks(3):
        out = torch.compile(graph, backend=counter, fullgraph=True)(q, k, v, mask, bias)
        found = torch.autograd.grad(out.square().sum(), inputs)
        expected = torch.autograd.grad(call(q, k, v, mask, bias).square().sum(), inputs)
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


def test_dynamic_lengths():
    attend = torch.compile(sparse_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (70, 90, 111):
        q, k, v = make_qkv(tokens, head_dim=16)
        mask = random_block_mask(tokens, block=(32, 16))
        torch.testing.assert_close(attend(q, k, v, mask), sparse_attention(q, k, v, mask))


def test_export_to_a_graph_with_fake_tensors():
    """The operator's fake implementation agrees with the real one in shapes, types and strides."""
    (mask,) = masks(1)
    for layout in ("bhsd", "bshd"):
        q, k, v = make_qkv(70, batch=2, heads=3, head_dim=16, v_dim=24, layout=layout)
        arguments = (q, k, v, mask.name, None, None, None, None, None, 0.25, "torch", True, True)
        torch.library.opcheck(
            torch.ops.sparsereel.sparse_attention.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


# ------------------------------------------------------------ forward's mask in backward


class Table:
    """A plan: which mask a layer uses now."""

    def __init__(self, mask):
        self.name = mask_name(mask)


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_uses_the_mask_of_forward(compiled):
    """The table changes between forward and backward, and the first mask is held by nobody but the graph."""
    q, k, v = (x.requires_grad_() for x in make_qkv(70, head_dim=16))
    first, second = masks(2)
    expected = torch.autograd.grad(sparse_attention(q, k, v, first).square().sum(), (q, k, v))
    table = Table(first)
    del first

    def layer(q, k, v):
        return sparse_attention(q, k, v, table.name)

    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    out = run(q, k, v)
    table.name = mask_name(second)
    forget_recent_masks()
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_needs_neither_the_mask_nor_the_name_that_forward_got(compiled):
    """A copy of a name owns nothing and may be overwritten; what forward used is kept by what forward returned."""
    q, k, v = (x.requires_grad_() for x in make_qkv(70, head_dim=16))
    first, second = masks(2)
    expected = torch.autograd.grad(sparse_attention(q, k, v, first).square().sum(), (q, k, v))
    run = torch.compile(sparse_attention, backend="aot_eager", fullgraph=True) if compiled else sparse_attention
    name = first.name.clone()
    out = run(q, k, v, name)
    name.copy_(second.name)
    del first
    forget_recent_masks()
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), expected)


def forget_recent_masks():
    from sparsereel_kernels import registry

    registry._recent.clear()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_recomputes_with_the_mask_of_forward(use_reentrant, compiled):
    """The name is an argument of the checkpointed function, so that the second run gets the one of the first."""
    if compiled and use_reentrant:
        pytest.skip("torch.compile traces only the non-reentrant kind")
    q, k, v = (x.requires_grad_() for x in make_qkv(70, head_dim=16))
    first, second = masks(2)
    expected = torch.autograd.grad(sparse_attention(q, k, v, first).square().sum(), (q, k, v))
    table = Table(first)
    del first

    def block(q, k, v, name):
        return sparse_attention(q, k, v, name).square()

    def model(q, k, v):
        return checkpoint(block, q, k, v, table.name, use_reentrant=use_reentrant).sum()

    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    loss = run(q, k, v)
    table.name = mask_name(second)
    forget_recent_masks()
    loss.backward()
    torch.testing.assert_close((q.grad, k.grad, v.grad), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_with_a_mask_object(use_reentrant):
    q, k, v = (x.requires_grad_() for x in make_qkv(70, head_dim=16))
    (mask,) = masks(1)
    expected = torch.autograd.grad(sparse_attention(q, k, v, mask).square().sum(), (q, k, v))
    checkpoint(sparse_attention, q, k, v, mask, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close((q.grad, k.grad, v.grad), expected)


def test_saved_names_survive_offloading_to_cpu():
    q, k, v = (x.requires_grad_() for x in make_qkv(70, head_dim=16))
    (mask,) = masks(1)
    with torch.autograd.graph.save_on_cpu():
        out = sparse_attention(q, k, v, mask)
    expected = torch.autograd.grad(sparse_attention(q, k, v, mask).sum(), q)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q), expected)


def test_names_keep_masks_alive_and_say_when_they_cannot():
    import gc
    import weakref

    (mask,) = masks(1)
    name, plain, gone = mask_name(mask), mask.name, weakref.ref(mask)
    del mask
    gc.collect()
    assert isinstance(gone(), BlockMask)
    q, k, v = make_qkv(70, head_dim=16)
    sparse_attention(q, k, v, name)
    del name
    forget_recent_masks()
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="no longer exists; keep the BlockMask"):
        sparse_attention(q, k, v, plain)


def test_recently_used_masks_outlive_copies_of_their_names():
    (mask,) = masks(1)
    q, k, v = make_qkv(70, head_dim=16)
    copy = mask_name(mask).clone()
    expected = sparse_attention(q, k, v, copy)
    del mask
    torch.testing.assert_close(sparse_attention(q, k, v, copy), expected)


def test_names_lie_on_the_cpu_and_serve_training_wherever_they_were_made():
    with torch.device("meta"), torch.inference_mode():
        name = mask_name(None)
    assert name.device.type == "cpu"
    assert not name.is_inference()
    with torch.inference_mode():
        (mask,) = masks(1)
    q, k, v = (x.requires_grad_() for x in make_qkv(70, head_dim=16))
    for run in (sparse_attention, torch.compile(sparse_attention, backend="aot_eager", fullgraph=True)):
        run(q, k, v, mask, backend="torch").sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_torch_attention_does(compiled):
    q, k, v = (x.requires_grad_() for x in make_qkv(70, head_dim=16))
    (mask,) = masks(1)
    run = torch.compile(sparse_attention, backend="aot_eager", fullgraph=True) if compiled else sparse_attention
    with torch.autocast("cpu", torch.bfloat16):
        out = run(q, k, v.bfloat16(), mask, backend="torch")
    expected = sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, backend="torch")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
