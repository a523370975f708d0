"""`sparsereel stream`: files, exit codes and sentences."""

from __future__ import annotations

import json

import imageio.v3 as imageio
import pytest

from sparsereel.cli.main import run

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--height", "16", "--width", "16", "--steps", "1", "--guidance", "1"]
PROMPT = "a red 3 moving right on navy"


def test_writes_a_video_with_prompt_switches(tmp_path):
    video, figures = tmp_path / "v.mp4", tmp_path / "f.json"
    switches = f"0:{PROMPT};0.5:a green 7 on black"
    assert (
        run(["stream", "--prompts", switches, "--frames", "30", "-o", str(video), "--json", str(figures), *SMALL]) == 0
    )
    assert len(list(imageio.imiter(video, plugin="FFMPEG"))) == 30
    found = json.loads(figures.read_text())
    assert found["frames"] == 30
    assert found["settings"]["method"] == "streaming-llm"
    assert json.loads(video.with_suffix(".json").read_text())["output"] == str(video)
    assert not list(tmp_path.glob("*.safetensors"))
    assert run(["stream", PROMPT, "--frames", "30", "-o", str(video), "--resume", *SMALL]) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either a PROMPT or --prompts"),
        ([PROMPT, "--frames", "5", "--seconds", "1"], "frames or seconds, not both"),
        ([PROMPT, "--seconds", "-1"], "seconds must be a positive number"),
        (["--prompts", "0:a red 3;9:a red 4", "--seconds", "2"], "9 s lies past the end of the video"),
        (["--prompts", "nonsense", "--seconds", "2"], "SECONDS:TEXT"),
        ([PROMPT, "--seconds", "1", "--method", "nothing"], "unknown streaming method 'nothing'"),
        ([PROMPT, "--seconds", "1", "--window", "3", "--sink", "3"], "must be at least 6"),
        ([PROMPT, "--seconds", "1", "--storage", "int4"], "unknown cache storage"),
        ([PROMPT, "--seconds", "1", "--causal", "3"], "CHUNK:WINDOW"),
        ([PROMPT, "--live", "--resume"], "--resume needs the video"),
        ([PROMPT, "--seconds", "1", "--model", "minireel", "--method", "longlive"], "allowed: windows"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["stream", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_an_unfinished_video_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "v.resume.safetensors").write_bytes(b"x")
    assert run(["stream", PROMPT, "--frames", "9", "-o", str(tmp_path / "v.mp4"), *SMALL]) == 2
    assert "add --resume to go on" in capsys.readouterr().err
    assert not (tmp_path / "v.mp4").exists()
