"""Compensation against plain definitions that hold every pair of tokens, and as a plan option on tiny models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import sparsereel
from sparsereel import compensation, selectors
from sparsereel.compensation import FlashBias, Linear, MeanKey, Rectified, SparseCall, biased_attention, low_rank
from sparsereel.compensation.linear import features
from sparsereel.patterns import Full, Neighborhood, Skip
from sparsereel.plan import AttentionPlan
from sparsereel_kernels import BlockMask, merge_attention, sparse_attention

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = (32, 16)
IMMEDIATE = ["mean_key", "flash_bias", "rectified", "linear"]


def problem(*, seed=0, length=150, heads=4, kv_heads=2, batch=2, keep=0.4, lengths=None, isolated=None):
    """Random q, k, v and a block mask with at least one block a row; the sparse output, its lse, and the call."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, length, 16, generator=generator) for h in (heads, kv_heads, kv_heads))
    rows, columns = -(-length // BLOCK[0]), -(-length // BLOCK[1])
    kept = torch.rand(batch, heads, rows, columns, generator=generator) < keep
    kept[..., 0] = True
    dense = kept.repeat_interleave(BLOCK[0], 2).repeat_interleave(BLOCK[1], 3)[:, :, :length, :length]
    mask = BlockMask.from_dense(dense, BLOCK)
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    out, lse = sparse_attention(q, k, v, mask, key_lengths=key_lengths, return_lse=True, backend="reference")
    return SparseCall(q, k, v, mask, 0.25, key_lengths, isolated), out, lse, kept


def blocks_of(call):
    """(start, stop) of the valid tokens of each key block, a list for every sample."""
    return [
        [(s, min(s + BLOCK[1], int(n))) for s in range(0, call.k.shape[2], BLOCK[1])]
        for n in call.valid.expand(call.q.shape[0])
    ]


def by_definition(call, kept, stand_in):
    """Softmax over kept tokens and one stand-in for each skipped block: `stand_in(q, keys, values) -> logit, value`."""
    batch, heads, length, _ = call.q.shape
    out = torch.zeros_like(call.q)
    ratio = heads // call.k.shape[1]
    for b, h, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(length)):
        q, logits, values = call.q[b, h, i], [], []
        for j, (start, stop) in enumerate(blocks_of(call)[b]):
            if stop <= start:
                continue
            keys, content = call.k[b, h // ratio, start:stop], call.v[b, h // ratio, start:stop]
            if kept[b, h, i // BLOCK[0], j]:
                logits.append(keys @ q * call.scale)
                values.append(content)
            else:
                logit, value = stand_in(q, keys, content)
                logits.append(logit[None])
                values.append(value[None])
        out[b, h, i] = torch.softmax(torch.cat(logits), 0) @ torch.cat(values)
    return out


@pytest.mark.parametrize("lengths", [None, (150, 77)])
def test_mean_key_is_one_key_a_skipped_block(lengths):
    call, out, lse, kept = problem(lengths=lengths)

    def stand_in(q, keys, values):
        return keys.mean(0) @ q * call.scale + math.log(len(keys)), values.mean(0)

    torch.testing.assert_close(MeanKey().complete(call, out, lse), by_definition(call, kept, stand_in))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_flash_bias_adds_half_the_variance(strength):
    call, out, lse, kept = problem(seed=1)

    def stand_in(q, keys, values):
        spread = ((q * call.scale).square() * keys.var(0, unbiased=False)).sum() / 2
        return keys.mean(0) @ q * call.scale + math.log(len(keys)) + strength * spread, values.mean(0)

    expected = by_definition(call, kept, stand_in)
    torch.testing.assert_close(FlashBias(strength=strength).complete(call, out, lse), expected)


@pytest.mark.parametrize("feature", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("lengths", [None, (150, 77)])
def test_the_linear_branch_sums_over_skipped_blocks(feature, lengths):
    call, _, _, kept = problem(seed=2, lengths=lengths)
    q, k = features(call.q, feature), features(call.k, feature).repeat_interleave(2, 1)
    weights = q @ k.transpose(-1, -2)
    tokens = kept.repeat_interleave(BLOCK[0], 2).repeat_interleave(BLOCK[1], 3)[:, :, :150, :150]
    padding = torch.arange(150) >= call.valid[:, None]
    weights = weights.masked_fill(tokens | padding[:, None, None], 0)
    expected = weights @ call.v.repeat_interleave(2, 1) / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(compensation.linear_branch(call, feature), expected, rtol=1e-4, atol=1e-5)


def test_linear_mixes_by_the_mass_of_mean_keys():
    call, out, lse, kept = problem(seed=3)
    mass = torch.full_like(lse, -torch.inf)
    for j, (start, stop) in enumerate(blocks_of(call)[0]):
        pooled = (call.q @ call.k[:, :, start:stop].mean(2, keepdim=True).repeat_interleave(2, 1).transpose(-1, -2))[
            ..., 0
        ]
        logit = pooled * call.scale + math.log(stop - start)
        skipped = ~kept[..., j].repeat_interleave(BLOCK[0], 2)[..., :150]
        mass = torch.where(skipped, torch.logaddexp(mass, logit), mass)
    share = torch.exp(mass - torch.logaddexp(mass, lse))[..., None]
    expected = (1 - share) * out + share * compensation.linear_branch(call)
    torch.testing.assert_close(Linear().complete(call, out, lse), expected)


def test_a_trained_projection_is_the_form_of_sla(tmp_path):
    call, out, lse, kept = problem(seed=4)
    weight, bias = torch.randn(16, 16) * 0.1, torch.randn(16)
    save_file({"layers.0.weight": weight, "layers.0.bias": bias}, tmp_path / "p.safetensors")
    method = Linear(projection=str(tmp_path / "p.safetensors"))
    method.check_model(1)
    any_skipped = (~kept).any(-1).repeat_interleave(BLOCK[0], 2)[..., :150, None]
    expected = out + (compensation.linear_branch(call) @ weight.T + bias) * any_skipped
    torch.testing.assert_close(method.complete(call, out, lse), expected)
    with pytest.raises(ValueError, match=r"has no layers\.1\.weight; the model has 2 layers"):
        method.check_model(2)
    with pytest.raises(ValueError, match="does not exist"):
        Linear(projection=str(tmp_path / "none.safetensors")).check_model(1)


def test_the_linear_branch_can_be_trained():
    """Zero-initialised, SLA is plain sparsity; gradients reach the projection, q, k and v."""
    call, out, _, _ = problem(seed=5)
    parts = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    call = SparseCall(*parts, call.mask, call.scale)
    projection = torch.nn.Linear(16, 16)
    torch.nn.init.zeros_(projection.weight)
    torch.nn.init.zeros_(projection.bias)
    branch = compensation.linear_branch(call)
    total = out + projection(branch)
    torch.testing.assert_close(total, out)
    total.square().sum().backward(retain_graph=True)
    assert projection.weight.grad.abs().max() > 0
    branch.sum().backward()
    assert all(x.grad.abs().max() > 0 for x in parts)


def rectified_by_definition(call, out, kept, *, gated):
    batch, heads, length, _ = call.q.shape
    expected = torch.zeros_like(out)
    for b, h, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(kept.shape[2])):
        rows = slice(i * BLOCK[0], min(length, (i + 1) * BLOCK[0]))
        q = call.q[b, h, rows]
        mean_q, logits, values, corrected = q.mean(0), [], [], []
        for j, (start, stop) in enumerate(blocks_of(call)[b]):
            keys, content = call.k[b, h // 2, start:stop], call.v[b, h // 2, start:stop]
            mean_k = keys.mean(0)
            if call.isolated is not None and call.isolated[start:stop].any():
                logits.append(torch.logsumexp(keys @ mean_q * call.scale, 0))
            else:
                logits.append(mean_k @ mean_q * call.scale + math.log(stop - start))
            values.append(content.mean(0))
            error = ((q - mean_q).abs().mean(0) @ mean_k).abs() + (mean_q @ (keys - mean_k).abs().mean(0)).abs()
            worth = bool((mean_q @ mean_k).abs() > error) or not gated
            corrected.append(bool(~kept[b, h, i, j]) and worth)
        mass, chosen = torch.softmax(torch.stack(logits), 0), torch.tensor(corrected)
        expected[b, h, rows] = mass[~chosen].sum() * out[b, h, rows] + mass[chosen] @ torch.stack(values)[chosen]
    return expected


@pytest.mark.parametrize("flavour", ["gapr", "ipar"])
@pytest.mark.parametrize("text", [False, True])
def test_rectified_follows_the_paper(flavour, text):
    isolated = torch.arange(150) < 12 if text else None
    call, out, lse, kept = problem(seed=6, isolated=isolated)
    expected = rectified_by_definition(call, out, kept, gated=flavour == "gapr")
    torch.testing.assert_close(Rectified(flavour).complete(call, out, lse), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IMMEDIATE)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_blocks_of_equal_tokens_are_recovered_exactly(name, kv_heads):
    """Where nothing is lost by pooling, the compensated output is dense attention. Gains always beat an error of 0."""
    call, *_ = problem(seed=7, length=160, kv_heads=kv_heads)
    k, v = (x.unflatten(2, (-1, 16))[:, :, :, :1].expand(-1, -1, -1, 16, -1).flatten(2, 3) for x in (call.k, call.v))
    q = call.q.unflatten(2, (-1, 32))[:, :, :, :1].expand(-1, -1, -1, 32, -1).flatten(2, 3)
    call = SparseCall(q, k, v, call.mask, call.scale)
    out, lse = sparse_attention(q, k, v, call.mask, return_lse=True, backend="reference")
    dense = sparse_attention(q, k, v, backend="reference")
    assert (out - dense).abs().max() > 0.1
    found = compensation.make(name).complete(call, out, lse)
    if name == "linear":  # its mass is exact there, its content is linear attention
        assert (found - dense).square().mean() < (out - dense).square().mean()
    else:
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IMMEDIATE)
def test_nothing_skipped_nothing_changed(name):
    call, out, lse, _ = problem(keep=1.1)
    assert torch.equal(compensation.make(name).complete(call, out, lse), out)


@pytest.mark.parametrize("name", IMMEDIATE)
def test_rows_that_see_nothing_stay_nothing(name):
    q = torch.randn(1, 2, 64, 16)
    mask = BlockMask.from_dense(torch.zeros(64, 64, dtype=torch.bool), BLOCK)
    out, lse = sparse_attention(q, q, q, mask, return_lse=True, backend="torch")
    found = compensation.make(name).complete(SparseCall(q, q, q, mask, 0.25), out, lse)
    assert torch.equal(found, torch.zeros_like(q))


@pytest.mark.parametrize("name", [*IMMEDIATE, "cached_residual"])
def test_plans_carry_it(name):
    method = compensation.make(name)
    plan = AttentionPlan.uniform(Full(), compensation=name)
    assert plan.compensation == method
    assert AttentionPlan.from_dict(plan.to_dict()) == plan
    assert name in plan.describe()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("meankey", "compensation: unknown compensation 'meankey'; the compensations are mean_key, flash_bias"),
        ({"rectified": {"flavor": "ipar"}}, "has no argument 'flavor'; its arguments are: flavour=gapr"),
        ({"rectified": {"flavour": "x"}}, "flavour must be one of gapr, ipar, got 'x'"),
        ({"cached_residual": {"every": 0}}, "every must be a whole number of at least 1, got 0"),
        ({"flash_bias": {"strength": 2}}, "strength must be a number from 0 to 1, got 2"),
        ({"linear": {"feature": "exp"}}, "feature must be one of softmax, elu, relu"),
        ([1], "a compensation must be a name or"),
        ({"a": 1, "b": 2}, "a compensation must be a name or"),
        ({"linear": 3}, "the arguments of linear must be a mapping"),
    ],
)
def test_mistakes_in_plans_are_one_sentence(given, message):
    with pytest.raises(ValueError) as error:
        AttentionPlan.from_dict({"version": 1, "compensation": given})
    assert message in str(error.value)


# ------------------------------------------------------------------ in a model


@pytest.mark.parametrize("name", IMMEDIATE)
@pytest.mark.parametrize("case", ["wan", "hunyuan_video", "cogvideox"])
def test_density_1_is_the_untouched_model(tiny, name, case):
    case = tiny.CASES[case]
    model, inputs = case.model(), case.inputs()
    before = tiny.run(model, inputs)
    plan = AttentionPlan.uniform(selectors.BlockTopk(density=1.0), compensation=name)
    with sparsereel.sparsified(model, plan):
        torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-4, atol=1e-5)
        assert sparsereel.report(model).layers[0].dense_calls == 0
    assert torch.equal(tiny.run(model, inputs), before)


@pytest.mark.parametrize("name", IMMEDIATE)
def test_layers_with_patterns_selectors_and_skipped_heads(tiny, name):
    """The same compensation over heads that differ, eager and compiled; a skipped head stays zero."""
    case = tiny.CASES["wan"]
    model, inputs = case.model(), tiny.wan_inputs()
    data = {
        "version": 1,
        "compensation": name,
        "components": {
            "transformer": {
                "layers": {
                    "*": {
                        "default": {"selector": "svg2", "iterations": 1, "threshold": 0.5, "min_density": 0.0},
                        "heads": {"0": {"neighborhood": {"window": [1, 3, 3]}}},
                    }
                }
            }
        },
    }
    with sparsereel.sparsified(model, AttentionPlan.from_dict(data)):
        eager = tiny.run(model, inputs)
        compiled = tiny.run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    torch.compiler.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    with sparsereel.sparsified(model, AttentionPlan.uniform(Skip(), compensation=name)):
        skipped = tiny.run(model, inputs)
    with sparsereel.sparsified(model, Skip()):
        torch.testing.assert_close(tiny.run(model, inputs), skipped)


def test_residuals_are_measured_at_the_last_dense_step(monkeypatch):
    """Right after the dense steps a frozen input gives the dense output back; later inputs get the same difference."""
    from sparsereel import minireel

    pipe = minireel.load()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 4, "output_type": "latent"}
    near = Neighborhood(window=(1, 3, 3))
    plain = AttentionPlan.uniform(near, dense_first=2)
    plan = AttentionPlan.uniform(near, dense_first=2, compensation="cached_residual")

    def run(plan):
        with sparsereel.sparsified(pipe, plan):
            out = pipe("a red 3 on navy", generator=torch.Generator().manual_seed(0), **call).frames
            return torch.as_tensor(out), sparsereel.report(pipe)

    dense = torch.as_tensor(pipe("a red 3 on navy", generator=torch.Generator().manual_seed(0), **call).frames)
    without, with_residual = run(plain)[0], run(plan)
    assert (with_residual[0] - dense).square().mean() < 0.75 * (without - dense).square().mean()
    # 2 branches x 4 steps; the two dense steps of the schedule stay the only dense ones.
    assert [(row.calls, row.dense_calls) for row in with_residual[1]] == [(8, 4)] * 6
    first = run(AttentionPlan.uniform(near, compensation="cached_residual"))[1]
    assert [(row.calls, row.dense_calls) for row in first] == [(8, 2)] * 6
    assert "the compensation measures its residual" in first.layers[0].reason
    anew = run(AttentionPlan.uniform(near, compensation={"cached_residual": {"every": 1}}))[1]
    assert [(row.calls, row.dense_calls) for row in anew] == [(8, 4)] * 6


def test_a_residual_makes_a_repeated_call_dense():
    from sparsereel.compensation.cached_residual import Residuals

    store = Residuals({})
    dense, sparse = torch.randn(2, 3), torch.randn(2, 3)
    store.hold("key", 4, dense, sparse)
    torch.testing.assert_close(sparse + store.at("key", 5, None), dense)
    assert store.at("other", 5, None) is None
    assert store.at("key", 6, 2) is not None
    assert store.at("key", 7, 2) is None
    store.hold("key", 4, dense, sparse)
    assert store.at("key", 4, None) is None, "a step that is not later belongs to another generation"


def test_without_a_known_step_cached_residuals_stay_dense(tiny):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    before = tiny.run(model, inputs)
    plan = AttentionPlan.uniform(Neighborhood(window=(1, 3, 3)), compensation="cached_residual")
    with sparsereel.sparsified(model, plan):
        torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-4, atol=1e-5)
        assert "step is unknown" in sparsereel.report(model).layers[0].reason


def test_ultravico_refuses_a_compensation():
    from sparsereel import minireel

    pipe = minireel.load()
    sparsereel.sparsify(pipe, AttentionPlan.uniform(Neighborhood(window=(0.5, 0.5, 0.5)), compensation="mean_key"))
    with pytest.raises(ValueError, match="does not combine with the compensation of this plan"):
        sparsereel.extend(pipe, frames=2.0, method="ultravico")
    sparsereel.restore(pipe)


# ------------------------------------------------------------------ FlashBias


def test_bias_columns_equal_a_dense_bias():
    """Squared distance of places is exact at rank 4: |x|^2 - 2 x y + |y|^2, with 2 axes."""
    q, k, v = (torch.randn(2, 4, 60, 16) for _ in range(3))
    places = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(10.0), indexing="ij"), -1).flatten(0, 1)
    bias = -0.05 * torch.cdist(places, places).square()
    ones, squares = torch.ones(60, 1), places.square().sum(-1, keepdim=True)
    phi_q = -0.05 * torch.cat([squares, -2 * places, ones], -1)
    phi_k = torch.cat([ones, places, squares], -1)
    found = biased_attention(q, k, v, phi_q[None, None], phi_k[None, None], backend="torch")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    mask = BlockMask.from_dense(torch.rand(60, 60) < 0.5, (32, 16))
    found = biased_attention(q, k, v, phi_q[None, None], phi_k[None, None], mask, backend="torch")
    hidden = bias.masked_fill(~mask.to_dense()[0, 0], -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_factors_get_gradients():
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    phi_q, phi_k = (torch.randn(1, 1, 40, 3, requires_grad=True) for _ in range(2))
    biased_attention(q, k, v, phi_q, phi_k, backend="torch").square().sum().backward()
    found = phi_q.grad, phi_k.grad
    phi_q.grad = phi_k.grad = None
    bias = phi_q @ phi_k.transpose(-1, -2)
    F.scaled_dot_product_attention(q, k, v, attn_mask=bias).square().sum().backward()
    for actual, expected in zip(found, (phi_q.grad, phi_k.grad), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_low_rank_says_its_error():
    table = torch.randn(30, 4) @ torch.randn(4, 20)
    phi_q, phi_k, error = low_rank(table, energy=1.0)
    assert phi_q.shape[-1] == 4
    assert error < 1e-4
    noisy = table + 0.01 * torch.randn(30, 20)
    phi_q, phi_k, error = low_rank(noisy, energy=0.99)
    assert phi_q.shape[-1] <= 4
    assert error == pytest.approx(float((phi_q @ phi_k.T - noisy).abs().max()))
    with pytest.raises(ValueError, match="bias must be finite"):
        low_rank(torch.tensor([[0.0, -torch.inf]]))


# ------------------------------------------------------------------ merging


def test_parts_of_keys_merge_to_the_whole():
    q, k, v = (torch.randn(2, 3, 50, 16) for _ in range(3))
    parts = [sparse_attention(q, k[:, :, s], v[:, :, s], return_lse=True, backend="torch") for s in cuts(50, 20, 33)]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge_attention(out, lse, *part)
    whole, whole_lse = sparse_attention(q, k, v, return_lse=True, backend="torch")
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


def cuts(length, *places):
    bounds = [0, *places, length]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def test_merging_with_empty_parts_never_gives_nan():
    out, lse = torch.randn(1, 1, 3, 8), torch.tensor([[[500.0, -torch.inf, -torch.inf]]])
    other, other_lse = torch.randn(1, 1, 3, 8), torch.tensor([[[-torch.inf, -500.0, -torch.inf]]])
    merged, merged_lse = merge_attention(out, lse, other, other_lse)
    assert torch.equal(merged[0, 0, 0], out[0, 0, 0])
    assert torch.equal(merged[0, 0, 1], other[0, 0, 1])
    assert torch.equal(merged[0, 0, 2], torch.zeros(8))
    assert merged_lse.tolist() == [[[500.0, -500.0, -torch.inf]]]
