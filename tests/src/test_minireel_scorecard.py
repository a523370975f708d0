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
    small, large = np.full((5, 32, 48, 3), 10, np.uint8), np.full((9, 40, 56, 3), 200, np.uint8)
    path = tmp_path / "new" / "sheet.png"
    scorecard.contact_sheet([small, large], ["a red 3 on navy"] * 2, path, columns=4)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (14 + 32 + 3 + 14 + 40 + 3, 4 * (56 + 3), 3)
    assert (sheet[14 : 14 + 32, :48] == 10).all()
    assert (sheet[63 : 63 + 40, 3 * 59 : 3 * 59 + 56] == 200).all()


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
