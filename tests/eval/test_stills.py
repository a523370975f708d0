"""The judge of still pictures: right on real ones of unseen handwriting at any side, strict on copies."""

from __future__ import annotations

import numpy as np
import pytest

from sparsereel_eval.digits import render
from sparsereel_eval.stills import StillJudge, average, reduce_to, sample_still


@pytest.fixture(scope="module")
def judge() -> StillJudge:
    return StillJudge()


def picture_of(seed: int, side: int = 64, images: str = "typical") -> tuple[np.ndarray, str]:
    still = sample_still(np.random.default_rng(seed), side, images=images)
    return render(still)[0][0], still.prompt


@pytest.mark.parametrize("side", [64, 128, 256])
def test_real_pictures_of_unseen_handwriting(judge, side):
    scores = []
    for seed in range(24):
        picture, prompt = picture_of(seed, side, "test")
        scores.append(judge.score(picture, prompt, side=64))
    found = average(scores)
    assert found["digit"] >= 0.95
    assert min(found["colour"], found["background"], found["count"]) == 1


def test_copies_are_counted(judge):
    picture, prompt = picture_of(0)
    four = np.tile(picture, (2, 2, 1))
    score = judge.score(four, prompt, side=64)
    assert (score.blobs, score.count, score.sound) == (4, 0.0, False)
    assert score.digit == score.colour == 1


def test_another_digit_colour_or_ground_is_seen(judge):
    picture, prompt = picture_of(0)
    colour, digit, ground = prompt.split()[1:3] + prompt.split()[-1:]
    assert judge.score(picture, prompt, side=64).sound
    wrong = prompt.replace(digit, "0" if digit != "0" else "1")
    assert judge.score(picture, wrong, side=64).digit == 0
    assert judge.score(picture, prompt.replace(colour, "red" if colour != "red" else "blue"), side=64).colour == 0
    assert judge.score(picture, prompt.replace(ground, "navy" if ground != "navy" else "grey"), 64).background == 0


def test_an_empty_picture_scores_nothing(judge):
    empty = np.zeros((64, 64, 3), np.uint8)
    score = judge.score(empty, "a red 3 on black", side=64)
    assert (score.digit, score.colour, score.background, score.count, score.blobs) == (0, 0, 1, 0, 0)


def test_what_cannot_be_judged_is_refused(judge):
    empty = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="asks for 2"):
        judge.score(empty, "a red 3 and a blue 4 on black", side=64)
    with pytest.raises(ValueError, match="no multiple of 48"):
        reduce_to(empty, 48)
    with pytest.raises(ValueError, match="height, width, 3"):
        reduce_to(empty.astype(np.float32), 64)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        sample_still(np.random.default_rng(0), 16)
    with pytest.raises(ValueError, match="no score"):
        average([])
