"""`extend` on tiny pipelines: sizes and refusals, nothing changed where nothing should, UltraViCo against its dense
definition, alone and under sparse plans."""

from __future__ import annotations

import copy
import json
import logging
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

import sparsereel
from sparsereel import AttentionPlan, TokenGrid
from sparsereel.extend.recipes import METHODS, Recipe
from sparsereel.extend.rope import NTK, PositionInterpolation, RIFLEx, YaRN
from sparsereel.extend.ultravico import FirstFrame, UltraViCo
from sparsereel.patterns import Full, Neighborhood, Radial, SlidingTile

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINED = 5  # latent frames
LONG = TokenGrid(10, 8, 8)


class Short(WanPipeline):
    """A pipeline that was "trained" on 17 frames of 128 x 128: 5 x 8 x 8 tokens."""

    def __call__(self, *args, height=128, width=128, num_frames=17, **kwargs):
        return super().__call__(*args, height=height, width=width, num_frames=num_frames, **kwargs)


@pytest.fixture
def pipe(tiny):
    made, _ = tiny.wan_pipe(FlowMatchEulerDiscreteScheduler())
    made.__class__ = Short
    return made


@pytest.fixture
def forward(tiny):
    def run(pipe, frames, height=16, width=16):
        return tiny.run(pipe.transformer, tiny.wan_inputs(frames, height, width))

    return run


# ------------------------------------------------------------------ beside sparsified


def test_a_with_block_keeps_the_extension(pipe, forward):
    sparsereel.extend(pipe, frames=2.0, method="pi_time+freenoise")
    long, short, held = forward(pipe, 10), forward(pipe, 5), vars(pipe)["_sparsereel_extension"]
    with sparsereel.sparsified(pipe, Neighborhood(window=(1, 3, 3))):
        assert not torch.equal(forward(pipe, 10), long)
    assert torch.equal(forward(pipe, 10), long)
    assert torch.equal(forward(pipe, 5), short)
    assert vars(pipe)["_sparsereel_extension"] is held
    sparsereel.restore(pipe)
    assert torch.equal(forward(pipe, 5), short)
    assert not torch.equal(forward(pipe, 10), long)


# ------------------------------------------------------------------ sizes and refusals


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        ({"frames": 2.0}, {"num_frames": 37}),
        ({"frames": 33}, {"num_frames": 33}),
        ({"frames": 1.0}, {"num_frames": 17}),
        ({"height": 1.5, "width": 256}, {"height": 192, "width": 256}),
        ({"height": 1.3}, {"height": 160}),
    ],
)
def test_ratios_and_targets(pipe, asked, arguments):
    report = sparsereel.extend(pipe, **asked)
    assert report.arguments == arguments
    for name, value in arguments.items():
        assert f"{name}={value}" in str(report)
    assert report.replaced == 3
    assert json.loads(json.dumps(report.to_dict()))["extension"]["arguments"] == arguments


def test_ratio_of_wan_is_the_papers(pipe):
    pipe.__class__ = WanPipeline
    assert sparsereel.extend(pipe, frames=3.0).arguments == {"num_frames": 249}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({}, "needs frames, height or width"),
        ({"frames": 32}, "4k \\+ 1, got 32; the nearest is 33"),
        ({"frames": 2}, "a ratio is a float: 2.0"),
        ({"frames": True}, "got True"),
        ({"frames": -1.0}, "positive number, got -1.0"),
        ({"frames": float("nan")}, "positive number, got nan"),
        ({"height": 130}, "height must be a multiple of 16 pixels, got 130; the nearest is 128"),
        ({"frames": 2.0, "method": "warp"}, "unknown method 'warp'; allowed: auto, plain, riflex"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_no_trace(pipe, asked, text):
    with pytest.raises(ValueError, match=text):
        sparsereel.extend(pipe, **asked)
    assert "forward" not in vars(pipe.transformer.rope)
    with pytest.raises(ValueError, match="nothing to report"):
        sparsereel.report(pipe)


def test_other_families(tiny):
    cog, _ = tiny.cogvideox_pipe(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="does not know the family 'cogvideox'; it knows: wan, hunyuan_video, stab"):
        sparsereel.extend(cog, frames=2.0)
    with pytest.raises(ValueError, match="needs a diffusers pipeline of videos"):
        sparsereel.extend(tiny.CASES["wan"].model(), frames=2.0)


def test_methods_of_other_families_are_named(tiny):
    from diffusers import HunyuanVideoPipeline

    model = tiny.CASES["hunyuan_video"].model()
    none = dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2"))
    pipe = HunyuanVideoPipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **none)
    with pytest.raises(ValueError, match="'riflex' is for wan, not for hunyuan_video; allowed: auto, plain, ultravico"):
        sparsereel.extend(pipe, frames=2.0, method="riflex")
    report = sparsereel.extend(pipe, frames=2.0)
    assert report.arguments == {"num_frames": 261}
    assert report.recipe.decay == UltraViCo(0.95, 0.6, period=50.0, gamma=4.0)


@pytest.mark.parametrize(
    ("asked", "recipe"),
    [
        ({"frames": 2.0}, Recipe(decay=UltraViCo())),
        ({"frames": 1.0}, Recipe()),
        ({"height": 2.0}, Recipe(space=YaRN())),
        ({"frames": 2.0, "width": 2.0}, Recipe(space=YaRN(), decay=UltraViCo())),
    ],
)
def test_automatic_choice(pipe, asked, recipe):
    assert sparsereel.extend(pipe, **asked).recipe == recipe


# ------------------------------------------------------------------ nothing changed where nothing should


@pytest.mark.parametrize("method", METHODS["wan"])
def test_ratio_one_native_calls_and_restore_are_bit_identical(pipe, forward, method):
    native, long = forward(pipe, TRAINED), forward(pipe, 10, 24, 24)
    sparsereel.extend(pipe, frames=1.0, height=1.0, width=1.0, method=method)
    assert torch.equal(forward(pipe, TRAINED), native)
    sparsereel.extend(pipe, frames=2.0, height=1.5, width=1.5, method=method)
    assert torch.equal(forward(pipe, TRAINED), native)
    assert torch.equal(forward(pipe, 10, 24, 24), long) == (method == "plain")
    sparsereel.restore(pipe)
    assert torch.equal(forward(pipe, TRAINED), native)
    assert torch.equal(forward(pipe, 10, 24, 24), long)
    assert "forward" not in vars(pipe.transformer.rope)


def test_whole_pipeline(pipe, tiny):
    _, call = tiny.wan_pipe(FlowMatchEulerDiscreteScheduler())

    def run(**size):
        g = torch.Generator().manual_seed(1)
        return pipe(**{**call, **size}, num_inference_steps=2, generator=g).frames

    native, long = run(), run(num_frames=37)
    report = sparsereel.extend(pipe, frames=2.0)
    assert torch.equal(run(), native)
    extended = run(**report.arguments)
    assert extended.shape == long.shape
    assert not torch.equal(extended, long)
    # Once more: what was kept from the first call changes nothing.
    assert torch.equal(run(**report.arguments), extended)
    sparsereel.restore(pipe)
    assert torch.equal(run(num_frames=37), long)


def test_a_long_call_of_another_size_is_left_alone_and_said(pipe, forward, caplog):
    other = forward(pipe, 8)
    sparsereel.extend(pipe, frames=2.0)
    with caplog.at_level(logging.WARNING, logger="sparsereel"):
        assert torch.equal(forward(pipe, 8), other)
    assert "8 x 8 x 8 tokens is larger than trained but not the size" in caplog.text


def test_sizes_that_were_not_named_are_free(pipe, forward):
    wide = forward(pipe, 10, 16, 24)
    sparsereel.extend(pipe, frames=2.0, method="pi")
    assert not torch.equal(forward(pipe, 10, 16, 24), wide)


def test_two_pipelines_do_not_influence_each_other(pipe, forward):
    other = copy.deepcopy(pipe)
    plain = forward(pipe, 10)
    sparsereel.extend(pipe, frames=2.0, method="pi")
    assert torch.equal(forward(other, 10), plain)
    interpolated = forward(pipe, 10)
    sparsereel.extend(other, frames=2.0, method="ultravico")
    assert torch.equal(forward(pipe, 10), interpolated)
    decayed = forward(other, 10)
    assert not torch.equal(decayed, interpolated)
    sparsereel.restore(pipe)
    assert torch.equal(forward(pipe, 10), plain)
    assert torch.equal(forward(other, 10), decayed)


def test_a_copy_of_an_extended_model_is_its_own(pipe, forward):
    plain = forward(pipe, 10)
    sparsereel.extend(pipe, frames=2.0, method="pi")
    extended = forward(pipe, 10)
    twin = copy.deepcopy(pipe)
    sparsereel.restore(pipe)
    assert torch.equal(forward(twin, 10), extended)
    assert torch.equal(forward(pipe, 10), plain)
    sparsereel.restore(twin)
    assert torch.equal(forward(twin, 10), plain)


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use(pipe, tiny):
    sparsereel.extend(pipe, frames=2.0, method=Recipe(time=NTK(), decay=UltraViCo()))
    inputs = tiny.wan_inputs(10)
    with torch.inference_mode():
        pipe.transformer(**inputs)
    pipe.transformer(**inputs).sample.sum().backward()
    assert pipe.transformer.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------ what rotary methods do


@pytest.mark.parametrize(
    "recipe",
    [Recipe(time=RIFLEx(component=1)), Recipe(time=PositionInterpolation()), Recipe(time=NTK()), Recipe(time=YaRN())],
    ids=lambda recipe: recipe.time.name,
)
def test_the_model_runs_on_the_policys_tables(pipe, forward, recipe):
    """Against the stock model whose buffers hold tables made with plain loops."""
    stock = copy.deepcopy(pipe)
    rope = stock.transformer.rope
    frequencies = recipe.time.frequencies(rope.t_dim, 1e4, TRAINED, 10)
    for position in range(10):
        for pair, radians in enumerate(frequencies.tolist()):
            angle = torch.tensor(position * radians, dtype=torch.float64)
            rope.freqs_cos[position, 2 * pair : 2 * pair + 2] = angle.cos()
            rope.freqs_sin[position, 2 * pair : 2 * pair + 2] = angle.sin()
    factor = recipe.time.magnitude(2.0)
    rope.register_forward_hook(lambda module, args, output: tuple(table * factor for table in output))
    expected = forward(stock, 10)
    sparsereel.extend(pipe, frames=2.0, method=recipe)
    torch.testing.assert_close(forward(pipe, 10), expected, rtol=1e-4, atol=1e-5)
    sparsereel.restore(pipe)
    assert (forward(pipe, 10) - expected).abs().max() > 1e-3


def test_positions_beyond_the_table(pipe, forward):
    # The tiny model's tables hold 32 positions, as Wan's hold 1,024.
    with pytest.raises(RuntimeError):
        forward(pipe, 40, 4, 4)
    sparsereel.extend(pipe, frames=8.0, method="plain")
    out = forward(pipe, 40, 4, 4)
    assert out.shape[2] == 40
    assert out.isfinite().all()


# ------------------------------------------------------------------ UltraViCo


def factor_of(rule: UltraViCo, grid: TokenGrid, trained: int) -> torch.Tensor:
    """lambda_ij (S, S), entry by entry."""
    t, y, x = (axis.tolist() for axis in grid.coordinates())
    place = [(f * grid.height + row) * grid.width + column for f, row, column in zip(t, y, x, strict=True)]
    bands = [] if rule.period is None else [m * rule.period for m in range(1, grid.frames)]
    frame_tokens = grid.height * grid.width
    factors = torch.ones(grid.seq_len, grid.seq_len).tolist()
    for i in range(grid.seq_len):
        for j in range(grid.seq_len):
            if t[i] < 0 or t[j] < 0:
                continue
            if rule.by == "frames":
                apart: float = abs(t[i] - t[j])
                far = apart > trained // 2
            else:
                apart = abs(place[i] - place[j]) / frame_tokens
                far = apart > trained / 2
            if far:
                risky = any(abs(apart - band) <= rule.gamma for band in bands)
                factors[i][j] = rule.beta if risky else rule.alpha
    return torch.tensor(factors, dtype=torch.float64)


@contextmanager
def dense_definition(factors, allowed):
    """torch's own attention, with UltraViCo written out on self-attention calls."""
    original = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, *args, **kwargs):
        if not query.shape[2] == key.shape[2] == factors.shape[0]:
            return original(query, key, value, attn_mask, *args, **kwargs)
        logits = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
        logits = torch.where(logits > 0, logits * factors, logits).masked_fill(~allowed, float("-inf"))
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        return (logits.softmax(-1) @ value.double()).to(query.dtype)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


RULES = [
    UltraViCo(0.3),
    UltraViCo(0.3, by="frames"),
    UltraViCo(0.6, 0.2, period=4.0, gamma=1.0),
    UltraViCo(0.6, 0.2, period=4.0, gamma=1.0, by="frames"),
]
PLANS = {
    "dense": None,
    "near": Neighborhood(window=(3, 5, 5)),
    "radial": Radial(),
    "tiles": SlidingTile(window=(1, 1, 1), tile=(5, 4, 8)),
}


@pytest.fixture(scope="module")
def factors():
    return {rule: factor_of(rule, LONG, TRAINED) for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_ultravico_equals_its_dense_definition(pipe, forward, factors, rule, name):
    pattern = PLANS[name]
    first = FirstFrame(TRAINED)
    allowed = (first if pattern is None else pattern & first).token_mask(LONG)
    with dense_definition(factors[rule], allowed):
        expected = forward(pipe, 10)
    plan = None if pattern is None else AttentionPlan.uniform(pattern)
    report = sparsereel.extend(pipe, frames=2.0, method=Recipe(decay=rule), plan=plan)
    out = forward(pipe, 10)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)
    sparsereel.restore(pipe)
    assert (forward(pipe, 10) - expected).abs().max() > 1e-3, report


def test_ultravico_with_text_in_the_sequence(tiny):
    """HunyuanVideo: text at the end is exempt, padded text is not seen, and there is no rule for the first frame."""
    from diffusers import HunyuanVideoPipeline

    class Trained(HunyuanVideoPipeline):
        def __call__(self, height=128, width=128, num_frames=9):
            raise NotImplementedError

    model = tiny.CASES["hunyuan_video"].model()
    none = dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2"))
    pipe = Trained(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **none)
    inputs = tiny.hunyuan_inputs()
    assert not inputs["encoder_attention_mask"].all()
    grid = TokenGrid(5, 8, 8, text=tiny.TEXT)
    plain = tiny.run(model, inputs)
    for rule in RULES:
        with dense_definition(factor_of(rule, grid, 3), torch.tensor(True)):
            expected = tiny.run(model, inputs)
        sparsereel.extend(pipe, frames=17, method=Recipe(decay=rule))
        out = tiny.run(model, inputs)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)
        assert (out - plain).abs().max() > 1e-3
        sparsereel.restore(pipe)


def test_tiles_are_really_reordered(pipe, forward):
    sparsereel.extend(pipe, frames=2.0, plan=AttentionPlan.uniform(PLANS["tiles"]))
    forward(pipe, 10)
    runtime = pipe.transformer._sparsereel_injection.runtime
    assert set(runtime._tiles.values()) == {(5, 4, 8)}
    assert sparsereel.report(pipe).density < 0.7


def test_dense_steps_of_a_sparse_plan_follow_the_rule_too(pipe, forward, factors):
    # Fewer tokens than the plan asks for: every call is dense.
    sparsereel.extend(
        pipe, frames=2.0, method=Recipe(decay=RULES[0]), plan=AttentionPlan.uniform(PLANS["near"], min_tokens=5000)
    )
    out = forward(pipe, 10)
    assert sparsereel.report(pipe).density == 1.0
    sparsereel.restore(pipe)
    with dense_definition(factors[RULES[0]], FirstFrame(TRAINED).token_mask(LONG)):
        torch.testing.assert_close(out, forward(pipe, 10), rtol=1e-4, atol=2e-5)


def test_heads_of_several_kinds(pipe, forward, factors):
    plan = {"version": 1, "patterns": {"near": {"neighborhood": {"window": [3, 5, 5]}}}}
    plan["components"] = {"transformer": {"layers": {"0-2": {"default": "near", "heads": {"1": "full"}}}}}
    plan["schedule"] = {"dense_first": 0, "min_tokens": 0, "max_density": 1.0}
    plan["model"] = {"family": "wan"}
    plan["keep_sinks"] = False
    first = FirstFrame(TRAINED)
    allowed = torch.stack([(PLANS["near"] & first).token_mask(LONG), first.token_mask(LONG)])
    with dense_definition(factors[RULES[0]], allowed):
        expected = forward(pipe, 10)
    sparsereel.extend(pipe, frames=2.0, method=Recipe(decay=RULES[0]), plan=AttentionPlan.from_dict(plan))
    torch.testing.assert_close(forward(pipe, 10), expected, rtol=1e-4, atol=2e-5)


def test_first_frame_does_not_see_past_the_trained_length():
    mask = FirstFrame(3).token_mask(TokenGrid(5, 2, 2))
    assert not mask[:4, 12:].any()
    assert mask[:4, :12].all()
    assert mask[4:].all()
    blocks = FirstFrame(3).block_mask(TokenGrid(5, 6, 6))
    assert torch.equal(blocks.to_dense()[0, 0], FirstFrame(3).token_mask(TokenGrid(5, 6, 6)))


def test_text_is_exempt():
    decay = UltraViCo(0.5, by="frames").modifier(TokenGrid(4, 1, 2, text=3), 2, None, torch.device("cpu"))
    assert decay.frame_of_q.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, -1, -1, -1]
    assert decay.table.tolist() == [1.0, 1.0, 0.5, 0.5]
    tokens = UltraViCo(0.5).modifier(TokenGrid(4, 1, 2, text=3), 2, None, torch.device("cpu"))
    assert tokens.frame_of_q.tolist() == [*range(8), -1, -1, -1]
    assert tokens.table.tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_risk_bands_of_hunyuan_lie_where_the_released_code_has_them():
    table = UltraViCo(0.9, 0.6, period=50.0, gamma=4.0, by="frames").factors(33, 132, 2040)
    risky = (table == torch.tensor(0.6)).nonzero().flatten().tolist()
    assert risky == [*range(46, 55), *range(96, 105)]
    assert (table[:17] == 1).all()
    assert table[17] == torch.tensor(0.9)


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 0.0}, {"alpha": 1.1}, {"alpha": 0.5, "beta": 0.6, "period": 5.0}, {"beta": 0.5}, {"by": "rows"}],
)
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match="UltraViCo"):
        UltraViCo(**settings)


# ------------------------------------------------------------------ together with sparsify


def test_a_plan_is_kept_and_a_later_one_keeps_the_extension(pipe, forward):
    sparsereel.sparsify(pipe, AttentionPlan.uniform(PLANS["near"]))
    report = sparsereel.extend(pipe, frames=2.0)
    assert all(layer.pattern.startswith("neighborhood") for layer in report)
    together = forward(pipe, 10)
    sparsereel.restore(pipe)
    sparsereel.extend(pipe, frames=2.0)
    dense = forward(pipe, 10)
    sparsereel.sparsify(pipe, AttentionPlan.uniform(PLANS["near"]))
    assert torch.equal(forward(pipe, 10), together)
    sparsereel.sparsify(pipe, AttentionPlan.uniform(Full()))
    torch.testing.assert_close(forward(pipe, 10), dense, rtol=1e-4, atol=2e-5)


def test_selectors_do_not_combine_with_ultravico(pipe, forward):
    sparsereel.sparsify(pipe, AttentionPlan.uniform(PLANS["near"]))
    before = forward(pipe, TRAINED)
    plan = AttentionPlan.uniform(sparsereel.selectors.make("block_topk", density=0.5))
    with pytest.raises(ValueError, match="ultravico combines with patterns, not with the selectors"):
        sparsereel.extend(pipe, frames=2.0, plan=plan)
    assert torch.equal(forward(pipe, TRAINED), before)
    sparsereel.extend(pipe, frames=2.0, method="ntk", plan=plan)
    assert forward(pipe, 10).isfinite().all()


def test_riflex_says_when_it_changes_nothing(pipe):
    report = sparsereel.extend(pipe, frames=2.0, method=Recipe(time=RIFLEx(loop=600)))
    assert any("riflex changes nothing" in note for note in report.notes)
    assert any("beyond the 4x" in note for note in sparsereel.extend(pipe, frames=6.0).notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "tiles"])
def test_compiled_models_are_extended_too(pipe, forward, tiny, name):
    plan = None if PLANS[name] is None else AttentionPlan.uniform(PLANS[name])
    recipe = Recipe(time=PositionInterpolation(), decay=UltraViCo(0.3))
    sparsereel.extend(pipe, frames=2.0, method=recipe, plan=plan)
    long, native = forward(pipe, 10), forward(pipe, TRAINED)
    compiled = torch.compile(pipe.transformer)
    torch.testing.assert_close(tiny.run(compiled, tiny.wan_inputs(10)), long, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiny.run(compiled, tiny.wan_inputs(TRAINED)), native, rtol=1e-4, atol=1e-5)
