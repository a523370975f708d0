"""`sparsereel eval run`: a whole study on the model in the box, resumed, changed, and its report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from sparsereel.cli.main import run
from sparsereel.evaluate.config import load_config
from sparsereel.evaluate.html import render
from sparsereel.evaluate.plots import pareto

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEAR = "version: 1\ncomponents:\n  '*':\n    layers:\n      '*': {spatial: {frames: %d}}\n"
TEXT = {
    "prompts": ["a red 3 moving right on navy", "a blue 7 <script>alert(1)</script> on black"],
    "seeds": [0, 1],
    "plans": {"tight": "tight.yaml", "loose & wide": "loose.yaml"},
    "frames": 9,
    "height": 48,
    "width": 48,
    "steps": 1,
    "lpips": "off",
    "name": "Study <b>",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that has run once: folder, its configuration, its result."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tight.yaml").write_text(NEAR % 0)
    (folder / "loose.yaml").write_text(NEAR % 1)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**TEXT, "prompts": ["a red 3 moving right on navy", "a blue 7 on black"]}))
    assert run(["eval", "run", str(path), "-o", str(folder / "out")]) == 0
    return folder, path, json.loads((folder / "out" / "result.json").read_text())


def test_result(study):
    folder, _, result = study
    assert set(result["runs"]) == {"tight", "loose & wide"}
    for name, row in result["summary"].items():
        assert row["clips"] == 4
        assert row["figures"]["psnr"]["n"] == 4
        assert 5 < row["figures"]["psnr"]["mean"] < 90
        assert 0 < row["density"] <= 1
        assert row["speedup"] > 0
        assert row["speedup_clips"] == 3, "a plan's first clip builds kernels and is not timed"
        assert result["plans"][name]["components"]
    assert any(row["on_front"] for row in result["summary"].values())
    assert result["environment"]["torch"]
    assert result["between"][0]["n"] == 2, "paired by prompt"
    # The tighter plan lets fewer pairs attend and is farther from dense.
    tight, loose = (result["summary"][n] for n in ("tight", "loose & wide"))
    assert tight["token_density"] < loose["token_density"] < 1
    assert tight["figures"]["psnr"]["mean"] < loose["figures"]["psnr"]["mean"]
    assert len(list((folder / "out" / "clips").glob("*.safetensors"))) == 12


def test_resumes(study, capsys):
    folder, path, result = study
    clips = folder / "out" / "clips"
    stamps = {file.name: file.stat().st_mtime_ns for file in clips.iterdir()}
    (clips / "0001-1-2.json").unlink()
    assert run(["eval", "run", str(path), "-o", str(folder / "out")]) == 0
    assert "11 of 12 clips are there already" in capsys.readouterr().err
    changed = {file.name for file in clips.iterdir() if stamps.get(file.name) != file.stat().st_mtime_ns}
    assert changed == {"0001-1-2.json", "0001-1-2.safetensors"}
    again = json.loads((folder / "out" / "result.json").read_text())
    for name, row in result["summary"].items():
        assert again["summary"][name]["figures"] == row["figures"], "the redone clip is the same"


def test_a_changed_configuration_is_noticed(study, capsys):
    folder, path, _ = study
    before = path.read_text()
    data = yaml.safe_load(before)
    try:
        path.write_text(yaml.safe_dump({**data, "seeds": [0]}))
        command = ["eval", "run", str(path), "-o", str(folder / "out")]
        assert run(command) == 2
        assert "holds a study with other seeds" in " ".join(capsys.readouterr().err.split())
        path.write_text(yaml.safe_dump({**data, "thresholds": {"psnr": 99}}))
        assert run([*command, "--json", "-"]) == 1
        said = capsys.readouterr()
        assert len(json.loads(said.out)["missed"]) == 2
        assert "below the threshold of 99" in said.err
        limits = {"sound": 1.1, "colour": 0, "speedup": 1e4, "token_density": 0, "ms_ssim": 0.5}
        path.write_text(yaml.safe_dump({**data, "thresholds": limits}))
        assert run([*command, "--json", "-"]) == 1
        missed = json.loads(capsys.readouterr().out)["missed"]
        tight = [line for line in missed if line.startswith("tight: ")]
        assert [line.split()[1] for line in tight] == ["sound", "speedup", "token_density", "ms_ssim"]
        assert "above the threshold of 0" in tight[2]
        assert "was not measured" in tight[3], "the clips are too small for it"
        assert "Thresholds missed" in (folder / "out" / "report.html").read_text()
    finally:
        path.write_text(before)


def test_report_is_self_contained_and_escaped(study):
    folder, _, result = study
    clips = {file.stem: file for file in (folder / "out" / "clips").glob("*.safetensors")}
    hostile = json.loads(json.dumps(result).replace("a blue 7 on black", "<script>alert(1)</script>"))
    page = render(hostile, clips)
    assert page.count("<script") == 1, "only the page's own"
    assert "alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Study &lt;b&gt;" in page
    assert "loose &amp; wide" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert page.count('<img alt="dense') == 8
    shown = [float(value) for value in re.findall(r"<br>\s*psnr ([\d.]+)", page)]
    assert len(shown) == 8
    assert shown == sorted(shown), "worst first"


def test_pareto_places_points_inside_the_plot():
    def row(speed, psnr, front):
        figures = {"psnr": {"mean": psnr, "interval": [psnr - 1, psnr + 1]}}
        return {"speedup": speed, "speedup_interval": [speed * 0.9, speed * 1.1], "figures": figures, "on_front": front}

    plot = pareto({"a": row(1.2, 30, True), "b": row(2.0, 22, True), "c": row(1.1, 20, False)})
    a, b, c = plot["points"]
    assert c["x"] < a["x"] < b["x"]
    assert a["y"] < b["y"] < c["y"], "y points down"
    for point in plot["points"]:
        assert plot["left"] <= min(point["across"]) < max(point["across"]) <= plot["width"] - plot["right"]
        assert plot["top"] <= min(point["along"]) < max(point["along"]) <= plot["height"] - plot["bottom"]
    assert plot["line"] == f"{a['x']},{a['y']} {b['x']},{b['y']}"
    alone = pareto({"a": {**row(1.0, 30, True), "speedup_interval": None}})
    assert alone["points"][0]["x"] >= plot["left"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"promts": ["x"]}, "unknown promts; allowed: prompts, plans"),
        ({"plans": None}, "plans"),
        ({"plans": {"dense": "radial"}}, "always run"),
        ({"seeds": [0, 0]}, "different whole numbers"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"prompts": ["a", "a"]}, "listed twice"),
        ({"prompts": "none.txt"}, r"none\.txt"),
        ({"thresholds": {"nice": 3}}, "NAME=NUMBER with a name of psnr, .*sound, .*speedup"),
        ({"thresholds": "psnr=3"}, "names with numbers"),
        ({"lpips": "best"}, "alex, vgg or off"),
    ],
)
def test_wrong_configurations(tmp_path, change, text):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**TEXT, **change}))
    with pytest.raises(ValueError, match=text):
        load_config(path)


def test_prompts_from_a_file_and_plans_as_a_list(tmp_path):
    (tmp_path / "p.txt").write_text("# comment\none\ntwo\n")
    (tmp_path / "near.yaml").write_text(NEAR % 0)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"prompts": "p.txt", "plans": ["radial", "near.yaml"], "seeds": 3}))
    config = load_config(path)
    assert (config.prompts, config.seeds) == (("one", "two"), (3,))
    assert config.plans == {"radial": "radial", "near": str(tmp_path / "near.yaml")}
    path.write_text("prompts: [unclosed")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(path)


def test_judge_and_cost_stand_beside_fidelity(study):
    folder, _, result = study
    for row in result["summary"].values():
        judged = row["figures"]["colour"]
        assert judged["n"] == 4
        assert 0 <= judged["reference"] <= 1
    assert result["summary"]["tight"]["figures"]["direction"]["n"] == 2, "one prompt of two names a direction"
    cost = result["efficiency"]
    assert list(cost) == ["dense", "loose & wide", "tight"]
    dense, tight = cost["dense"], cost["tight"]
    assert dense["flops"] == dense["dense_flops"] == tight["dense_flops"]
    assert dense["density"] == 1
    assert tight["flops"] == pytest.approx(dense["flops"] - (1 - tight["density"]) * dense["attention_flops"])
    # 3 latent frames of 6 x 6 cells, 6 layers, 8 heads of 32: two products of 2 N N D each.
    assert dense["attention_flops"] == 6 * 8 * 4 * 108**2 * 32
    assert 0 < dense["attention_share"] < 1
    assert dense["peak_bytes"] is None or dense["peak_bytes"] > 1e8
    assert dense["step_seconds"]["n"] == 0, "one step a clip, and the first is not timed"
    assert (folder / "out" / "efficiency.json").is_file()


def test_cost_is_of_every_step_but_the_first():
    from sparsereel.evaluate.efficiency import summarise_steps

    found = summarise_steps([{"step_seconds": [1.0, 2.0]}, {"step_seconds": [3.0]}, {}])
    assert found == {"n": 3, "median": 2.0, "quartiles": [1.5, 2.5]}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_report_sorts_and_plays(study, wait_for):
    sync = pytest.importorskip("playwright.sync_api")
    folder, _, result = study
    with sync.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            tab = browser.new_page(viewport={"width": 1200, "height": 1000})
            said: list[str] = []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda asked: said.append(asked.url) if asked.url.startswith("http") else None)
            tab.goto((folder / "out" / "report.html").as_uri())
            names = "[...document.querySelectorAll('#plans tbody tr')].map(row => row.cells[0].dataset.value)"
            column = 3 + list(result["summary"]["tight"]["figures"]).index("psnr")
            tab.click(f"#plans thead th:nth-child({column + 1}) button")
            best = sorted(result["summary"], key=lambda n: -result["summary"][n]["figures"]["psnr"]["mean"])
            assert tab.evaluate(names) == best
            tab.click(f"#plans thead th:nth-child({column + 1}) button")
            assert tab.evaluate(names) == best[::-1]
            assert tab.locator(".plot:visible").count() == 1
            tab.select_option("#figure", "ssim")
            assert tab.locator(".plot:visible").get_attribute("data-figure") == "ssim"
            tab.select_option("#worst", "ssim")
            order = tab.evaluate("[...document.querySelectorAll('.case')].map(c => Number(c.dataset.ssim))")
            assert order == sorted(order)
            assert tab.locator("video").count() == 8
            tab.evaluate("document.querySelector('video').play()")
            wait_for(tab, "document.querySelector('video').currentTime > 0.1")
            assert said == []
        finally:
            browser.close()


def without_times(value):
    """A result without what a clock or the machine's memory decides."""
    changing = ("seconds", "speedup", "efficiency", "environment", "warm", "on_front")
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(word in k for word in changing)}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def started(path, output, **variables):
    command = [sys.executable, "-m", "sparsereel", "eval", "run", str(path), "-o", str(output)]
    return subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.DEVNULL)


def test_killed_in_the_middle_and_resumed_gives_the_same(study, tmp_path):
    _, path, result = study
    process = started(path, tmp_path / "out")
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("clips/*.json"))) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    there = len(list((tmp_path / "out").glob("clips/*.json")))
    assert 4 <= there < 12, "killed in the middle"
    assert not (tmp_path / "out" / "result.json").exists()
    assert run(["eval", "run", str(path), "-o", str(tmp_path / "out")]) == 0
    again = json.loads((tmp_path / "out" / "result.json").read_text())
    assert without_times(again) == without_times(result)


@pytest.mark.slow
def test_two_processes_share_the_clips(study, tmp_path):
    _, path, result = study
    out = tmp_path / "out"
    both = [started(path, out, RANK=str(rank), WORLD_SIZE="2") for rank in (1, 0)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert without_times(json.loads((out / "result.json").read_text())) == without_times(result)


def test_shards():
    from sparsereel.evaluate.shards import Shard

    groups = list(range(7))
    shares = [Shard(index, 3).share(groups) for index in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert Shard().share(groups) == groups
    assert Shard(1, 2).device("cpu") == "cpu"


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "1")])
def test_contradicting_shards_are_refused(monkeypatch, rank, world):
    from sparsereel.evaluate.shards import this_shard

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match="RANK"):
        this_shard()
