"""The scorecard: fixed prompts, a score a clip, a sheet and a JSON file."""

from __future__ import annotations

import json
import sys

import numpy as np
from PIL import Image

from sparsereel.minireel import NATIVE, Size, scorecard


def test_prompts_are_fixed_and_lists_start_alike():
    assert scorecard.prompts_for(NATIVE, 2, two=0.0) == scorecard.prompts_for(NATIVE, 5, two=0.0)[:2]
    assert all(" and " in prompt for prompt in scorecard.prompts_for(NATIVE, 5, two=1.0))


def test_a_sheet_has_a_row_a_clip(tmp_path):
    clips = [np.zeros((5, 32, 48, 3), np.uint8)] * 2
    scorecard.contact_sheet(clips, ["a red 3 on navy"] * 2, tmp_path / "new" / "sheet.png", columns=4)
    width, height = Image.open(tmp_path / "new" / "sheet.png").size
    assert width == 4 * (48 + 3)
    assert height > 2 * 32


def test_the_command_scores_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scorecard, "NATIVE", Size(frames=5, height=48, width=48, steps=2, guidance=3.5, tokens=72))
    asked = ["scorecard", "--clips", "2", "--json", str(tmp_path / "s.json"), "--sheet", str(tmp_path / "s.png")]
    monkeypatch.setattr(sys, "argv", asked)
    scorecard.main()
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["clips"] == len(written["details"]) == 2
    assert 0 <= written["sound"] <= 1
    assert (tmp_path / "s.png").exists()
    assert "size native" in capsys.readouterr().out
