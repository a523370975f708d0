"""The report of a search: small, self-contained, safe, and alive in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsereel
from sparsereel import minireel
from sparsereel.patterns import Skip, Spatial, Temporal
from sparsereel.search import evidence, report
from sparsereel.selectors import BlockTopk

pytestmark = pytest.mark.usefixtures("one_thread")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The unknown words are on purpose: they must come out as text.
PROMPTS = ["a red 3 moving right on navy", "a white 5 </script><b>bold</b> on navy"]
CANDIDATES = (Skip(), Spatial(0), Temporal(0.2), BlockTopk(0.4))


@pytest.fixture(scope="module")
def result() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    size: dict[str, Any] = {"frames": 9, "height": 64, "width": 64, "steps": 4, "buckets": 2, "held_out": 1}
    try:
        return sparsereel.search(minireel.load(), PROMPTS, budget=0.6, candidates=CANDIDATES, progress=False, **size)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def page(result: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "plan.html"
    result.report(path)
    return path


def test_the_page_is_small_and_needs_nothing_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 6_000_000
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.S)
    assert "default-src 'none'" in own
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?http", own)


def test_prompts_are_text(page):
    text = page.read_text(encoding="utf-8")
    assert "<b>bold</b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text


def test_its_data_is_what_the_search_found(result, page):
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert data["methods"] == result.plan.calibration["candidates"]
    assert len(data["layers"]) == 6
    assert all(len(layer["heads"]) == 8 for layer in data["layers"])
    plan = result.plan.resolve("transformer", [layer["name"] for layer in data["layers"]], [8] * 6)
    for layer in data["layers"]:
        for number, head in enumerate(layer["heads"]):
            # One dense step of four, then stretches of one and two steps.
            told = [data["methods"][n] for n in head["choice"]]
            assert told == [str(plan[layer["number"]].at(step, 4)[number]) for step in (1, 3)]
            assert 0 < head["entropy"] <= 1
            assert len(base64.b64decode(head["picture"])) == data["cells"] ** 2
    alone = {one["name"]: one for one in data["alternatives"]}
    assert alone["skip"]["density"] == pytest.approx(0.25, abs=1e-3)
    assert alone["skip"]["psnr"] < alone[str(BlockTopk(0.4))]["psnr"]
    assert data["rounds"][-1]["measured"]["psnr"] == pytest.approx(result.measured["psnr"], rel=1e-3)


def test_a_picture_is_the_mass_by_parts_of_the_sequence():
    sums = torch.zeros(evidence.CELLS, evidence.CELLS, dtype=torch.float64)
    sums[:, 3] = 3.0
    sums[:, 5] = 1.0
    cells = np.frombuffer(base64.b64decode(evidence.picture(sums, evidence.CELLS)), np.uint8).reshape(32, 32)
    assert (cells[:, 3] == 255).all()
    assert (cells[:, 5] == round(255 * (1 / 3) ** 0.5)).all()
    assert cells[:, [0, 4, 31]].max() == 0
    halved = np.frombuffer(base64.b64decode(evidence.picture(sums, 16)), np.uint8).reshape(16, 16)
    assert (halved[:, 1] == 255).all()
    assert halved[:, 0].max() == 0


def test_data_cannot_leave_its_script():
    text = report.as_script({"a": "</script><!--", "b": float("nan"), "c": [1.23456789]})
    assert "<" not in text
    assert json.loads(text) == {"a": "</script><!--", "b": None, "c": [1.2346]}


def test_clips_that_do_not_fit_are_counted(result, monkeypatch):
    monkeypatch.setattr(report, "CLIP_BYTES", 10)
    text = report.render(result)
    assert "1 held-out clips are too large for this page" in text
    assert "<video" not in text


def test_a_result_without_evidence_is_refused(result, tmp_path):
    from dataclasses import replace

    with pytest.raises(ValueError, match="no evidence"):
        replace(result, evidence=None).report(tmp_path / "plan.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_clicking_a_head_changes_the_picture(page, wait_for):
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            tab = browser.new_page(viewport={"width": 1200, "height": 1000})
            said: list[str] = []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto(page.as_uri())
            tab.wait_for_selector("#chosen .nsewdrag")
            picture = "document.getElementById('picture').toDataURL()"
            first, name = tab.evaluate(picture), tab.inner_text("#head-name")
            box = tab.locator("#chosen .nsewdrag").first.bounding_box()
            tab.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + 0.75 * box["height"])
            wait_for(tab, f"document.getElementById('head-name').innerText != {json.dumps(name)}")
            assert tab.evaluate(picture) != first
            assert "transformer 4 (blocks.4.attn1), head 5" in tab.inner_text("#head-name")
            assert "entropy" in tab.inner_text("#facts")
            tab.select_option("#stretch", index=1)
            assert tab.locator("#front .scatterlayer .trace").count() >= 3
            wait_for(tab, "[...document.querySelectorAll('video')].every(v => v.readyState >= 1)")
            assert said == []
        finally:
            browser.close()
