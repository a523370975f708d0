"""The command line: what it writes, its exit codes, and one sentence for every kind of wrong input."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sparsereel.cli.main import run

SMALL = ["--frames", "9", "--height", "48", "--width", "48", "--steps", "2"]
PROMPT = "a red 3 moving right on navy"


def said(capsys) -> str:
    """What went to stderr, as one line."""
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def everywhere(tmp_path):
    """A plan that is sparse on clips of any length."""
    path = tmp_path / "near.yaml"
    path.write_text("version: 1\ncomponents:\n  '*':\n    layers:\n      '*': {spatial: {frames: 0}}\n")
    return path


def test_generate_writes_video_sheet_and_sidecar(tmp_path, capsys, everywhere):
    video = tmp_path / "clip.mp4"
    assert run(["generate", PROMPT, "--plan", str(everywhere), "-o", str(video), *SMALL, "--seed", "3"]) == 0
    assert iio.imread(video, plugin="FFMPEG").shape == (9, 48, 48, 3)
    assert Image.open(tmp_path / "clip.png").size[0] > 48
    sidecar = json.loads((tmp_path / "clip.json").read_text())
    assert sidecar["prompt"] == PROMPT
    assert sidecar["identity"]["request"]["seed"] == 3
    assert sidecar["identity"]["request"]["steps"] == 2
    assert sidecar["identity"]["plan_contents"]["components"]
    assert sidecar["environment"]["torch"] == torch.__version__
    assert sidecar["runs"][0]["attention"] == "sparse"
    assert sidecar["report"]["replaced"] == 6
    assert sidecar["runs"][0]["seconds"] > 0
    assert f"wrote {video}" in said(capsys)
    assert {p.suffix for p in tmp_path.iterdir()} == {".mp4", ".png", ".json", ".yaml"}, "no temporary files stay"


def test_compare_measures_fidelity_and_puts_clips_side_by_side(tmp_path, capsys, everywhere):
    video = tmp_path / "both.mp4"
    code = run(["generate", PROMPT, "--plan", str(everywhere), "--compare", "-o", str(video), *SMALL, "--json", "-"])
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    dense, sparse = result["runs"]
    assert (dense["attention"], sparse["attention"]) == ("dense", "sparse")
    assert 5 < sparse["psnr"] < 80
    assert 0 < sparse["ssim"] < 1
    assert sparse["density"] <= 1
    assert iio.imread(video, plugin="FFMPEG").shape[2] == 2 * 48 + 4


def test_a_file_of_prompts_goes_on_where_it_stopped(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"# two\n{PROMPT}\n\na blue 7 on black\n", encoding="utf-8")
    folder = tmp_path / "clips"
    command = ["generate", "--prompts", str(prompts), "-o", str(folder), *SMALL]
    assert run(command) == 0
    first = (folder / "0000.mp4").stat().st_mtime_ns
    (folder / "0001.json").unlink()
    assert run(command) == 0
    assert "1 of 2 clips are there already" in said(capsys)
    assert (folder / "0000.mp4").stat().st_mtime_ns == first
    assert json.loads((folder / "0001.json").read_text())["prompt"] == "a blue 7 on black"
    assert run([*command, "--seed", "5"]) == 0
    assert (folder / "0000.mp4").stat().st_mtime_ns > first, "another seed is another clip"


BAD = {
    "unknown plan": (["generate", PROMPT, "--plan", "radail"], "neither a preset (minireel-large, minireel-length-2x,"),
    "no prompt": (["generate"], "give either a PROMPT or --prompts FILE"),
    "compare without a plan": (["generate", PROMPT, "--compare"], "--compare needs --plan"),
    "frames": (
        ["generate", PROMPT, "--frames", "8"],
        "num_frames must be 4k + 1 (1, 5, 9 ...), got 8; the nearest is 9",
    ),
    "height": (
        ["generate", PROMPT, "--height", "50"],
        "height must be a multiple of 8 pixels, got 50; the nearest is 48",
    ),
    "no such model": (["generate", PROMPT, "--model", "./nowhere"], "the model folder nowhere does not exist"),
    "dtype": (["generate", PROMPT, "--dtype", "int3"], "unknown dtype 'int3'; allowed: fp32, bf16, fp16"),
    "device": (["generate", PROMPT, "--device", "cuda:9"], "device 'cuda:9' cannot be used"),
    "size": (["generate", PROMPT, "--size", "huge"], "unknown size 'huge'; allowed: native, large"),
    "size of a model": (
        ["generate", PROMPT, "--model", "minireel-large", "--size", "native"],
        "--model minireel-large is minireel at --size large",
    ),
    "no such file of prompts": (["generate", "--prompts", "no.txt"], "cannot read the prompt file no.txt"),
    "steps": (["generate", PROMPT, "--steps", "0"], "--steps"),
    "unknown option": (["generate", PROMPT, "--stepz", "3"], "--stepz"),
    "unknown command": (["sparsify"], "sparsify"),
    "output suffix": (["generate", PROMPT, "-o", "clip.avi"], "-o must be a file that ends in .mp4, got clip.avi"),
    "grid": (["inspect", "radial", "--grid", "3x4"], "--grid must be FRAMESxHEIGHTxWIDTH"),
    "backend": (["generate", PROMPT, "--plan", "radial", "--backend", "magic", *SMALL], "unknown backend 'magic'"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_one_sentence_and_code_2(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = BAD[case]
    assert run(arguments) == 2
    text = said(capsys)
    assert expected in text
    assert "Traceback" not in text
    assert list(tmp_path.rglob("*")) == [], "nothing is left behind"


def test_prompt_files_must_hold_prompts_in_utf8(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("\n# nothing\n")
    assert run(["generate", "--prompts", str(file)]) == 2
    assert "holds no prompt" in said(capsys)
    file.write_bytes("ein grünes Haus".encode("latin-1"))
    assert run(["generate", "--prompts", str(file)]) == 2
    assert "is not UTF-8 text (byte 6)" in said(capsys)


def test_a_model_folder_must_hold_a_pipeline_in_safetensors(tmp_path, capsys):
    assert run(["generate", PROMPT, "--model", str(tmp_path)]) == 2
    assert "has no model_index.json" in said(capsys)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02")
    assert run(["generate", PROMPT, "--model", str(tmp_path)]) == 2
    assert "has no safetensors weights" in said(capsys)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert run(["generate", PROMPT, "--model", str(tmp_path)]) == 2
    assert "could not load the model" in said(capsys)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("'*': {radail: {}}", "radail"),
        ("'*': {radial: {decay: -1}}", "decay"),
        ("'*': {radial: {speed: 1}}", "speed"),
        ("'*': {neighborhood: {window: [-1, 3, 3]}}", "window"),
        ("'9': full", "transformer has 6 layers (0-5)"),
        ("'*': {default: full, heads: {'8': skip}}", "has 8 heads (0-7)"),
    ],
)
def test_a_wrong_plan_names_what_is_wrong(tmp_path, capsys, line, expected):
    path = tmp_path / "plan.yaml"
    path.write_text(f"version: 1\ncomponents:\n  transformer:\n    layers:\n      {line}\n")
    assert run(["generate", PROMPT, "--plan", str(path), *SMALL, "-o", str(tmp_path / "x.mp4")]) == 2
    assert expected in said(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize("model", ["{family: cogvideox}", "{layers: 30}", "{heads: 12}", "{class: FluxTransformer}"])
def test_a_plan_for_another_model_is_refused(tmp_path, capsys, model):
    path = tmp_path / "plan.yaml"
    path.write_text(f"version: 1\nmodel: {model}\ncomponents:\n  transformer:\n    layers:\n      '*': full\n")
    assert run(["generate", PROMPT, "--plan", str(path), *SMALL, "-o", str(tmp_path / "x.mp4")]) == 2
    assert "this plan is for" in said(capsys)


def test_an_output_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(["generate", PROMPT, "-o", str(tmp_path / "file" / "x.mp4"), *SMALL]) == 2
    assert "cannot write to the folder" in said(capsys)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("imageio.v2.get_writer", full)
    assert run(["generate", PROMPT, "-o", str(tmp_path / "x.mp4"), *SMALL]) == 2
    assert "No space left on device" in said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_density_and_writes_a_picture(tmp_path, capsys):
    picture = tmp_path / "plan.png"
    command = ["inspect", "sliding-tile", "--grid", "12x16x16", "--steps", "10", "--plot", str(picture), "--json", "-"]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 12 * 16 * 16
    assert found["tile"] == [4, 8, 8]
    # One dense step of ten, then windows of one tile of three, one of two, one of two, and the tiles of the sink.
    sparse = found["groups"][0]["density"]
    assert 0.1 < sparse < 0.7
    assert found["density"] == pytest.approx(sparse)
    assert found["flops"] == pytest.approx(found["dense_flops"] * found["density"])
    assert Image.open(picture).size > (300, 200)


def test_inspect_says_that_short_clips_stay_dense(capsys):
    assert run(["inspect", "radial", "--grid", "2x8x8"]) == 0
    assert "all dense: 128 tokens are fewer than the plan's min_tokens 1024" in said(capsys)


def test_doctor_lists_backends_and_succeeds_here(capsys):
    assert run(["doctor", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    topics = {finding["topic"]: finding for finding in found["findings"]}
    assert found["healthy"]
    assert topics["backend torch"]["ok"]
    assert topics["backend triton"]["ok"] is None or torch.cuda.is_available()
    assert torch.__version__.startswith(topics["torch"]["text"])


def test_doctor_fails_where_diffusers_has_changed(capsys, monkeypatch):
    def moved():
        raise ValueError("diffusers 9.9 does not have what sparsereel relies on")

    monkeypatch.setattr("sparsereel.families.diffusers_seam.check_versions", moved)
    assert run(["doctor"]) == 1
    assert "MISSING" in said(capsys)


def test_models_lists_the_registry(capsys):
    assert run(["models", "--json", "-"]) == 0
    rows = {row["family"]: row for row in json.loads(capsys.readouterr().out)}
    assert "WanTransformer3DModel" in rows["wan"]["classes"]


def test_help_is_quick_and_version_is_printed(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sparsereel ")
    code = "import sys; from sparsereel.cli.main import run; run(['--help']); sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_ctrl_c_ends_with_130_and_keeps_what_is_finished(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n" * 40)
    folder = tmp_path / "clips"
    code = "import sys; from sparsereel.cli.main import main; sys.argv[0] = 'sparsereel'; main()"
    command = [sys.executable, "-c", code, "generate", "--prompts", str(prompts), "-o", str(folder), *SMALL]
    # A shell's background jobs, of which the tests may be one, ignore Ctrl-C, and so would what they start.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not (folder / "0001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; finished files are kept" in text
    assert "Traceback" not in text
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "no half-written file stays"
    assert json.loads((folder / "0001.json").read_text())["prompt"] == PROMPT
