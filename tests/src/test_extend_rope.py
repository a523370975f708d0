"""Rotary policies against plain formulas, and Wan's tables at lengths that diffusers' own do not hold."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from sparsereel.extend.extension import Extension
from sparsereel.extend.recipes import Recipe
from sparsereel.extend.rope import (
    NTK,
    PositionInterpolation,
    RIFLEx,
    RopePolicy,
    YaRN,
    axis_table,
    periods,
    plain_frequencies,
)
from sparsereel.extend.sizes import Scale, Sizes
from sparsereel.extend.tables import WanTables, known

POLICIES = [RopePolicy(), PositionInterpolation(), NTK(), YaRN(), RIFLEx()]
#: axes of real models: (channels, base, trained)
WAN_TIME, HUNYUAN_TIME, COG_TIME = (44, 1e4, 21), (16, 256.0, 33), (16, 1e4, 13)


def theta(j: int, dim: int, base: float) -> float:
    return base ** (-2 * j / dim)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("length", [1, 13, 21])
def test_an_axis_that_did_not_grow_is_left_alone(policy, length):
    assert torch.equal(policy.frequencies(44, 1e4, 21, length), plain_frequencies(44, 1e4))
    assert policy.magnitude(length / 21) == 1.0


def test_plain_tables_are_those_of_diffusers_bit_for_bit():
    rope = WanRotaryPosEmbed(128, (1, 2, 2), 64)
    tables = [axis_table(plain_frequencies(dim, 1e4), 64) for dim in (rope.t_dim, rope.h_dim, rope.w_dim)]
    assert torch.equal(torch.cat([cos for cos, _ in tables], 1), rope.freqs_cos)
    assert torch.equal(torch.cat([sin for _, sin in tables], 1), rope.freqs_sin)


@pytest.mark.parametrize(("dim", "base", "trained"), [WAN_TIME, HUNYUAN_TIME, (4, 1e4, 5)])
@pytest.mark.parametrize("length", [34, 84])
def test_formulas(dim, base, trained, length):
    s = length / trained
    plain = [theta(j, dim, base) for j in range(dim // 2)]

    def check(policy, expected):
        torch.testing.assert_close(
            policy.frequencies(dim, base, trained, length),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-12,
            atol=0,
        )

    check(RopePolicy(), plain)
    check(PositionInterpolation(), [t / s for t in plain])
    check(NTK(), [theta(j, dim, base * s ** (dim / (dim - 2))) for j in range(dim // 2)])
    by_parts = []
    for t in plain:
        turns = trained / (2 * math.pi / t)
        keep = 1.0 if turns > 2 else 0.0 if turns < 1 else turns - 1
        by_parts.append(keep * t + (1 - keep) * t / s)
    check(YaRN(), by_parts)
    assert YaRN().magnitude(s) == pytest.approx(0.1 * math.log(s) + 1)
    assert YaRN(temper=False).magnitude(s) == 1.0


def test_ntk_leaves_the_fastest_and_interpolates_the_slowest():
    plain, changed = plain_frequencies(44, 1e4), NTK().frequencies(44, 1e4, 21, 63)
    assert changed[0] == plain[0]
    assert float(plain[-1] / changed[-1]) == pytest.approx(3.0, rel=1e-12)


def test_yarn_parts_of_wan():
    # Periods 6.3, 9.5 and 14.5 turn within 21 frames; from 22.1 on they do not.
    share = YaRN().frequencies(44, 1e4, 21, 42) / plain_frequencies(44, 1e4)
    assert share[:2].tolist() == [1.0, 1.0]
    assert 0.5 < share[2] < 1.0
    torch.testing.assert_close(share[3:], torch.full((19,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("axis", "seen", "expected"), [(HUNYUAN_TIME, 48, (4, 50)), (COG_TIME, 20, (2, 20)), (WAN_TIME, 51, (6, 51))]
)
def test_riflex_finds_the_published_components(axis, seen, expected):
    assert RIFLEx(loop=seen).intrinsic(*axis) == expected


def test_riflex_changes_one_frequency_so_that_the_clip_stays_within_one_turn():
    dim, base, trained = HUNYUAN_TIME
    policy = RIFLEx(component=4)
    plain, changed = plain_frequencies(dim, base), policy.frequencies(dim, base, trained, 66)
    assert (plain != changed).nonzero().flatten().tolist() == [3]
    assert float(changed[3]) * 66 == pytest.approx(0.9 * 2 * math.pi)
    # A clip that the component's period holds: nothing to do.
    assert torch.equal(policy.frequencies(dim, base, trained, 50), plain)
    assert not torch.equal(policy.frequencies(dim, base, trained, 51), plain)


def test_riflex_without_a_hint_takes_the_shortest_period_that_holds_the_trained_length():
    assert periods(16, 1e4) == [6, 20, 63, 199, 628, 1987, 6283, 19869]
    assert RIFLEx().intrinsic(16, 1e4, 6) == (1, 6)
    assert RIFLEx().intrinsic(*COG_TIME) == (2, 20)
    assert RIFLEx().intrinsic(*HUNYUAN_TIME) == (4, 50)
    # Longer than every period: the longest.
    assert RIFLEx().intrinsic(4, 100.0, 500) == (2, 63)
    # Wan's is known.
    assert known(RIFLEx(), 44) == RIFLEx(component=6)
    assert known(RIFLEx(loop=22), 44) == RIFLEx(loop=22)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RIFLEx(component=0), "from 1, got 0"),
        (lambda: RIFLEx(margin=1.5), "margin in"),
        (lambda: RIFLEx(component=9).frequencies(16, 256.0, 33, 66), "component 9 does not exist"),
        (lambda: YaRN(low=2, high=1), "low < high"),
    ],
)
def test_wrong_settings_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# ------------------------------------------------------------------ tables of a model


def tables(rope, recipe, trained, target):
    scale = Scale(frames=1, pixels=1, patch=(1, 1, 1))
    return WanTables(rope, Extension(Sizes(scale, trained, target, (True, True, True)), recipe, "wan"))


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(time=NTK(), space=YaRN())], ids=["plain", "changed"])
def test_positions_beyond_the_table_of_diffusers(recipe):
    rope = WanRotaryPosEmbed(16, (1, 1, 1), 32)
    size = (5, 3, 47)
    latents = torch.zeros(1, 4, *size)
    with pytest.raises(RuntimeError):
        rope(latents)
    cos, sin = tables(rope, recipe, (3, 3, 16), size).forward(latents)
    assert cos.shape == sin.shape == (1, 5 * 3 * 47, 1, 16)
    assert cos.dtype == torch.float32
    # The last token: frame 4, row 2, column 46.
    angles = []
    for axis, (dim, position) in enumerate(zip((rope.t_dim, rope.h_dim, rope.w_dim), (4, 2, 46), strict=True)):
        angles.append(position * recipe.policy(axis).frequencies(dim, 1e4, (3, 3, 16)[axis], size[axis]))
    angle = torch.cat(angles).repeat_interleave(2)
    factor = 1 if recipe == Recipe() else 0.1 * math.log(47 / 16) + 1
    torch.testing.assert_close(cos[0, -1, 0].double(), angle.cos() * factor, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin[0, -1, 0].double(), angle.sin() * factor, rtol=1e-6, atol=1e-6)


def test_within_the_table_plain_is_what_diffusers_gives():
    rope = WanRotaryPosEmbed(16, (1, 1, 1), 64)
    latents = torch.zeros(1, 4, 9, 3, 40)
    short = WanRotaryPosEmbed(16, (1, 1, 1), 32)
    ours = tables(short, Recipe(), (3, 3, 16), (9, 3, 40)).forward(latents)
    assert all(torch.equal(a, b) for a, b in zip(ours, rope(latents), strict=True))


def test_buffers_are_not_written_to():
    rope = WanRotaryPosEmbed(16, (1, 1, 1), 32)
    before = rope.freqs_cos.clone(), rope.freqs_sin.clone()
    held = tables(rope, Recipe(time=PositionInterpolation()), (3, 4, 4), (9, 4, 4))
    held.install()
    latents = torch.zeros(1, 4, 9, 4, 4)
    changed = rope(latents)[0]
    held.remove()
    assert not torch.equal(changed, rope(latents)[0])
    assert torch.equal(before[0], rope.freqs_cos)
    assert torch.equal(before[1], rope.freqs_sin)
    assert "forward" not in vars(rope)
