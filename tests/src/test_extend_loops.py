"""Loops in clips whose period is known."""

from __future__ import annotations

import numpy as np
import pytest

from sparsereel.extend.loops import autocorrelation, find_loop, loop_score
from sparsereel.extend.rope import RIFLEx


def circling(frames, period, size=48, drift=0.0):
    """A bright dot that comes round every `period` frames, or never where it drifts."""
    video = np.zeros((frames, size, size, 3), np.uint8)
    for number in range(frames):
        angle = 2 * np.pi * number / period
        x = int(size / 2 + (size / 3) * np.cos(angle) + drift * number)
        y = int(size / 2 + (size / 3) * np.sin(angle))
        video[number, max(y - 4, 0) : y + 4, max(x - 4, 0) : x + 4] = 255
    return video


@pytest.mark.parametrize("period", [12, 20, 31])
def test_the_period_of_a_loop_is_found(period):
    video = circling(96, period)
    assert find_loop(video) == pytest.approx(period, abs=1)
    assert loop_score(video, 8) > 0.9


def test_a_clip_that_never_comes_back_has_no_loop():
    straight = np.zeros((60, 64, 64, 3), np.uint8)
    for number in range(60):
        straight[number, 28:36, number : number + 8] = 255
    assert find_loop(straight) is None
    assert loop_score(straight, 16) < 0.3


def test_a_still_clip_is_one_everywhere():
    still = np.full((20, 32, 32, 3), 7, np.uint8)
    assert (autocorrelation(still) == 1).all()
    assert find_loop(still) is None


def test_riflex_takes_the_component_of_an_observed_loop():
    loop = find_loop(circling(120, 88), shortest=16)
    assert loop is not None
    # 88 frames are 22 latent ones: Wan's fourth component comes round in 22.
    assert RIFLEx(loop=round(loop / 4)).intrinsic(44, 1e4, 21) == (4, 22)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="expected frames"):
        autocorrelation(np.zeros((10, 8, 8, 3), np.uint8))
