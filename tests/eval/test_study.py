"""`sparsereel eval run`: a whole study on the model in the box, resumed, changed, and its report."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from sparsereel.cli.main import run
from sparsereel.evaluate.config import load_config
from sparsereel.evaluate.html import pareto, render

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
        assert "Thresholds missed" in (folder / "out" / "report.html").read_text()
    finally:
        path.write_text(before)


def test_report_is_self_contained_and_escaped(study):
    folder, _, result = study
    clips = {file.stem: file for file in (folder / "out" / "clips").glob("*.safetensors")}
    hostile = json.loads(json.dumps(result).replace("a blue 7 on black", "<script>alert(1)</script>"))
    page = render(hostile, clips)
    assert "<script" not in page
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
        ({"thresholds": {"nice": 3}}, "NAME=NUMBER"),
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
