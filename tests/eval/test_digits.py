"""The digit renderer: the same clip everywhere, and what the description says."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from sparsereel_eval.digits import BACKGROUNDS, COLOURS, Clip, Digit, render, sample_clip, split
from sparsereel_eval.prompts import WantedDigit, parse_prompt

SIZE = {"frames": 9, "height": 48, "width": 64}


def drawn(seed: int, **options):
    return sample_clip(np.random.default_rng(seed), **SIZE, **options)


def test_same_seed_same_pixels():
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    first, second = (render(drawn(3))[0] for _ in range(2))
    assert hashlib.sha256(first.tobytes()).digest() == hashlib.sha256(second.tobytes()).digest()
    assert first.shape == (9, 48, 64, 3)
    assert first.dtype == np.uint8


def test_pixels_are_background_and_ink():
    clip = drawn(0, two=0.0)
    video, ink = render(clip)
    assert (video[ink == 0] == BACKGROUNDS[clip.background]).all()
    full = video[ink > 0.999].astype(int)
    assert len(full)
    assert np.abs(full - COLOURS[clip.digits[0].colour]).max() <= 1


def test_the_track_bounces_between_the_walls():
    digit = Digit(int(split("typical")[0]), 0, "red", 24, (30.0, 0.0), (4.0, 0.0))
    track = Clip((digit,), "black", 9, 48, 64).track(digit)
    assert track[:, 0].tolist() == [30, 34, 38, 38, 34, 30, 26, 22, 18]
    assert (track[:, 1] == 0).all()


def test_whole_pixels_move_the_glyph_unchanged():
    digit = Digit(int(split("typical")[0]), 0, "red", 24, (4.0, 8.0), (1.0, 2.0))
    _, ink = render(Clip((digit,), "black", 3, 48, 64))
    np.testing.assert_array_equal(ink[1], np.roll(ink[0], (2, 1), (0, 1)))


def test_splits_do_not_overlap():
    train, test, typical = (set(split(name).tolist()) for name in ("train", "test", "typical"))
    assert len(train) == 1500
    assert len(test) == 297
    assert not train & test
    assert typical <= train
    assert len(typical) == 30
    with pytest.raises(ValueError, match="train, test or typical"):
        split("validation")


def test_a_prompt_reads_back():
    for seed in range(20):
        clip = drawn(seed, two=0.5, named=0.5)
        wanted = parse_prompt(clip.prompt)
        assert wanted.background == clip.background
        assert wanted.digits == tuple(WantedDigit(d.colour, d.value, d.direction) for d in clip.digits)
    assert parse_prompt("An orange 3  moving LEFT on grey").digits == (WantedDigit("orange", 3, "left"),)


@pytest.mark.parametrize("prompt", ["", "a cat surfing", "a red 3", "a red 33 on navy", "a pink 3 on navy"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="COLOUR DIGIT"):
        parse_prompt(prompt)


def test_a_canvas_too_small_is_refused():
    with pytest.raises(ValueError, match="at least 26 x 26"):
        sample_clip(np.random.default_rng(0), frames=5, height=16, width=64)
