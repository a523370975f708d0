"""The judge: right on real clips of unseen handwriting at any size, strict on clips that were spoiled on purpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsereel_eval import judge as judging
from sparsereel_eval.classifier import WEIGHTS, load_classifier
from sparsereel_eval.digits import Clip, Digit, render, split
from sparsereel_eval.ink import find_ink
from sparsereel_eval.judge import Judge, average
from sparsereel_eval.train_judge import calibrate, train

PROMPT = "a red 7 moving right on navy"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def clip_of(**changes) -> np.ndarray:
    """A clip that PROMPT describes, but for the changes."""
    value, height, start = changes.pop("value", 7), 96, changes.pop("start", (4.0, 40.0))
    image = int(split("typical")[3 * value])
    velocity = changes.pop("velocity", (1.0, 0.0))
    digits = (Digit(image, value, changes.pop("colour", "red"), 24, start, velocity),)
    digits += changes.pop("more", ())
    return render(Clip(digits, changes.pop("background", "navy"), 33, height, 96))[0]


@pytest.mark.parametrize(("size", "frames", "two"), [(48, 17, 0.0), (96, 33, 0.0), (96, 33, 1.0), (200, 9, 0.0)])
def test_real_clips_of_unseen_handwriting(judge, size, frames, two):
    scores = calibrate(judge, 16 if size < 200 else 6, size=size, frames=frames, two=two)
    assert scores["digit"] >= 0.9
    assert scores["sound"] >= 0.9
    assert min(scores["colour"], scores["background"], scores["direction"], scores["count"]) >= 0.97
    assert scores["smoothness"] >= 0.85


def test_a_right_clip_is_sound(judge):
    score = judge.score(clip_of(), PROMPT)
    assert score.sound
    assert score.smoothness == 1.0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"value": 0}, "digit"),
        ({"colour": "green"}, "colour"),
        ({"background": "forest"}, "background"),
        ({"velocity": (-1.0, 0.0), "start": (60.0, 40.0)}, "direction"),
        ({"velocity": (0.0, 0.0)}, "direction"),
    ],
)
def test_one_fault_shows_in_its_score_only(judge, changes, field):
    scores = judge.score(clip_of(**changes), PROMPT).to_dict()
    assert scores.pop(field) == 0.0
    assert not scores.pop("sound")
    assert min(scores.values()) >= 0.9


def test_a_second_copy_is_punished(judge):
    copy = Digit(int(split("typical")[21]), 7, "red", 24, (4.0, 70.0), (1.0, 0.0))
    score = judge.score(clip_of(more=(copy,)), PROMPT)
    assert score.count == 0.0
    assert not score.sound


def test_a_digit_that_vanishes_is_punished(judge):
    video = clip_of()
    video[16:] = video[0, 0, 0]
    score = judge.score(video, PROMPT)
    assert score.count == pytest.approx(16 / 33)
    assert score.smoothness < 0.5


def test_jumps_are_not_smooth(judge):
    video = clip_of(velocity=(0.0, 0.0))
    video[::4] = np.roll(video[::4], 5, axis=1)
    assert judge.score(video, PROMPT).smoothness < 0.4


def test_no_named_direction_no_direction_score(judge):
    score = judge.score(clip_of(velocity=(0.0, 1.0)), "a red 7 on navy")
    assert score.direction is None
    assert score.sound
    assert "direction" not in average([score])


def test_an_empty_clip_scores_nothing(judge):
    score = judge.score(np.zeros((9, 64, 64, 3), np.uint8), "a red 7 moving up on black")
    assert (score.digit, score.colour, score.direction, score.count, score.smoothness) == (0, 0, 0, 0, 0)


def test_digits_that_touch_count_as_two(judge):
    other = Digit(int(split("typical")[9]), 3, "green", 24, (14.0, 44.0), (1.0, 0.0))
    score = judge.score(clip_of(more=(other,)), "a red 7 moving right and a green 3 moving right on navy")
    assert len(find_ink(clip_of(more=(other,))).blobs[0]) == 1
    assert score.count == 1.0
    assert score.colour == 1.0


def test_the_shape_of_the_video_is_checked(judge):
    with pytest.raises(ValueError, match="uint8"):
        judge.score(np.zeros((9, 64, 64, 3), np.float32), PROMPT)
    with pytest.raises(ValueError, match="no score"):
        average([])


def test_weights_are_small_and_missing_ones_are_named(tmp_path):
    assert WEIGHTS.stat().st_size < 150_000
    with pytest.raises(ValueError, match="train_judge"):
        load_classifier(tmp_path / "none.safetensors")


def test_training_starts_to_learn():
    torch.manual_seed(0)
    fresh = judging.Judge(train(40, clips=100))
    assert calibrate(fresh, 24, size=48, frames=5)["digit"] > 0.3
