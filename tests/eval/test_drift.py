"""The judge over time and `sparsereel eval judge`: on drawn clips whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sparsereel.cli.main import run
from sparsereel_eval.digits import render, sample_clip
from sparsereel_eval.drift import drift, judge_over_time


@pytest.fixture(scope="module")
def drawn():
    """Three seconds of one digit, and its description."""
    for seed in range(50):
        clip = sample_clip(np.random.default_rng(seed), frames=48, height=96, width=96, two=0.0, named=1.0)
        if clip.digits[0].value == 3:
            return render(clip)[0], clip
    raise AssertionError("no 3 among 50 clips")


def test_a_steady_clip_does_not_drift(drawn):
    video, clip = drawn
    windows = judge_over_time(iter(video), clip.prompt, fps=16)
    assert [w.start for w in windows] == [0, 1, 2]
    assert windows[0].score.direction == 1
    assert windows[1].score.direction is None
    found = drift(windows)
    assert set(found) == {"digit", "colour", "background", "count", "smoothness"}
    assert found["digit"] == found["colour"] == {"start": 1, "end": 1, "change": 0}


def test_a_digit_that_turns_into_another_is_noticed(drawn):
    video, clip = drawn
    other = replace(clip, digits=(replace(clip.digits[0], image=_image_of(7), value=7, colour="cyan"),))
    mixed = np.concatenate([video[:32], render(other)[0][32:]])
    windows = judge_over_time(mixed, clip.prompt, fps=16)
    assert [w.score.digit for w in windows] == [1, 1, 0]
    assert drift(windows)["digit"] == {"start": 1, "end": 0, "change": -1}
    assert drift(windows)["colour"]["change"] == (0 if clip.digits[0].colour == "cyan" else -1)


def _image_of(value):
    from sparsereel_eval.digits import handwriting, split

    return next(int(i) for i in split("typical") if handwriting()[1][i] == value)


def test_a_short_rest_is_left_out_and_too_few_frames_refused(drawn):
    video, clip = drawn
    assert len(judge_over_time(video[:36], clip.prompt, fps=16)) == 2
    assert [w.frames for w in judge_over_time(video[:21], clip.prompt, fps=16)] == [16, 5]
    with pytest.raises(ValueError, match="5 are needed"):
        judge_over_time(video, clip.prompt, fps=16, seconds=0.1)
    with pytest.raises(ValueError, match="the video has 4 frames"):
        judge_over_time(video[:4], clip.prompt, fps=16)


def test_the_command(drawn, tmp_path, capsys):
    video, clip = drawn
    np.save(tmp_path / "one.npy", video)
    (tmp_path / "one.json").write_text(json.dumps({"prompt": clip.prompt}))
    assert run(["eval", "judge", str(tmp_path), "--json", "-"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["table"]["digit"]["mean"] == 1
    assert result["drift"]["digit"] == {"start": 1, "end": 1, "change": 0, "clips": 1}
    assert len(result["clips"][0]["windows"]) == 3
    assert "digit over time: 1.000 at the start" in said.err
    wrong = clip.prompt.replace("a ", "a big ")
    assert run(["eval", "judge", str(tmp_path / "one.npy"), "--prompt", wrong]) == 2
    assert "Cannot judge the prompt" in capsys.readouterr().err
