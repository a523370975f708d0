"""Files, checkpoints and the live page: what is left after a kill, a full disk or a reader that sleeps."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import sparsereel
from sparsereel.stream.fmp4 import GrowingMp4
from sparsereel.stream.live import LiveServer
from sparsereel.stream.methods import METHODS
from sparsereel.stream.recording import Recorder, checkpoint_of
from sparsereel.stream.vitals import Drift, memory, peak_memory

pytestmark = pytest.mark.usefixtures("one_thread")


def clip(frames, seed=0, height=32, width=48):
    """Smooth moving colours, which a codec keeps."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x + 3 * t + seed) / 9 + c) + np.cos((y - t) / 7) for t in range(frames) for c in range(3)]
    found = np.stack(waves).reshape(frames, 3, height, width).transpose(0, 2, 3, 1)
    return (127 + 60 * found).astype(np.uint8)


def read(path) -> np.ndarray:
    return np.stack(list(imageio.imiter(path, plugin="FFMPEG")))


def make(streams, **arguments):
    arguments = {"causal": streams.CAUSAL, "steps": 2, "seed": 3, **streams.SIZE, **arguments}
    return sparsereel.stream(streams.pipe(), arguments.pop("prompt", streams.PROMPT), **arguments)


# ------------------------------------------------------------------ the file


def test_a_growing_file_is_a_video_after_every_segment(tmp_path):
    path = tmp_path / "v.mp4"
    # With a cut in every segment, where an encoder likes to begin anew.
    frames = np.concatenate([clip(11, seed) for seed in (0, 70, 140, 210)])
    mp4 = GrowingMp4(path, 16, segment=16)
    sizes = []
    for part in np.split(frames, [5, 17, 33]):
        mp4.append(part)
        sizes.append(len(read(path)) if path.exists() else 0)
    assert sizes == [0, 16, 32, 32]
    mp4.close()
    found = read(path)
    assert found.shape == frames.shape
    assert np.abs(found.astype(int) - frames).mean() < 4
    assert imageio.immeta(path, plugin="FFMPEG")["fps"] == 16


def test_a_torn_tail_still_plays(tmp_path):
    path = tmp_path / "v.mp4"
    mp4 = GrowingMp4(path, 16, segment=8)
    mp4.append(clip(32))
    path.write_bytes(path.read_bytes()[:-200])
    assert len(read(path)) >= 24


def test_goes_on_with_the_same_bytes(tmp_path):
    frames = clip(40)
    whole = GrowingMp4(tmp_path / "whole.mp4", 16, segment=8)
    whole.append(frames)
    whole.close()
    first = GrowingMp4(tmp_path / "parts.mp4", 16, segment=8)
    first.append(frames[:21])
    state = first.state()
    first.append(frames[21:30])  # lost: after the checkpoint
    with open(first.path, "ab") as file:
        file.write(b"half a box")
    second = GrowingMp4(tmp_path / "parts.mp4", 16, segment=8)
    second.load(*state)
    second.append(frames[21:])
    second.close()
    assert second.path.read_bytes() == whole.path.read_bytes()


def test_odd_sizes_and_rates(tmp_path):
    mp4 = GrowingMp4(tmp_path / "v.mp4", 23.976, segment=8)
    mp4.append(clip(16, height=31, width=47))
    assert read(mp4.path).shape == (16, 32, 48, 3)


def test_a_file_that_is_gone_is_not_resumed(tmp_path):
    mp4 = GrowingMp4(tmp_path / "v.mp4", 16, segment=8)
    mp4.append(clip(8))
    numbers, pending = mp4.state()
    mp4.path.unlink()
    with pytest.raises(ValueError, match="is missing: it cannot be resumed"):
        GrowingMp4(mp4.path, 16, segment=8).load(numbers, pending)


def test_killed_before_the_first_segment_it_goes_on_without_a_file(tmp_path):
    whole = GrowingMp4(tmp_path / "whole.mp4", 16, segment=8)
    whole.append(clip(20))
    whole.close()
    first = GrowingMp4(tmp_path / "v.mp4", 16, segment=8)
    first.append(clip(20)[:5])
    state = first.state()
    assert not first.path.exists()
    second = GrowingMp4(first.path, 16, segment=8)
    second.load(*state)
    second.append(clip(20)[5:])
    second.close()
    assert second.path.read_bytes() == whole.path.read_bytes()


def test_a_full_disk_is_one_sentence_and_keeps_what_is_written(tmp_path):
    path = tmp_path / "v.mp4"
    mp4 = GrowingMp4(path, 16, segment=8)
    mp4.append(clip(16))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(ValueError, match=r"could not write .*v\.mp4: .*; its first 16 frames are kept"):
            mp4.append(clip(8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert len(read(path)) == 16


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_resumes_bit_for_bit(streams, tmp_path, method):
    arguments = {"method": method, "frames": 37, "window": 6, "output": "latents"}
    if method == "fifo":
        arguments["steps"] = 6
    whole = list(make(streams, **arguments))
    stream = make(streams, **arguments)
    got = [next(stream) for _ in range(2 if len(whole) > 2 else 1)]
    stream.save(tmp_path / "c.safetensors", note=5)
    again = make(streams, **arguments, resume=tmp_path / "c.safetensors")
    assert again.notes == {"note": 5}
    got += list(again)
    assert torch.equal(torch.cat(got, 1), torch.cat(whole, 1))


def test_resumes_between_any_two_passes(streams, tmp_path):
    """An interrupt may come in the middle of a chunk, and of a compression's life."""
    arguments = {"method": "deep-forcing", "window": 8, "frames": 69, "output": "latents", "storage": "int8"}
    whole = torch.cat(list(make(streams, **arguments)), 1)
    for rows in (1, 5, 8, 9, 10, 13):
        stream, got = make(streams, **arguments), []
        for _ in range(rows):
            row = stream.engine.next_row()
            stream._follow_prompt(row.start)
            clean = stream.engine.run(row)
            got += [] if clean is None else [clean]
        stream.save(tmp_path / "c.safetensors")
        got += list(make(streams, **arguments, resume=tmp_path / "c.safetensors"))
        assert torch.equal(torch.cat(got, 1), whole)


def test_a_prompt_switch_is_resumed(streams, tmp_path):
    arguments = {"method": "longlive", "frames": 45, "prompt": [(0, streams.PROMPT), (1, streams.OTHER)]}
    whole = np.concatenate(list(make(streams, **arguments)))
    for count in (1, 4):
        stream = make(streams, **arguments)
        got = [next(stream) for _ in range(count)]
        stream.save(tmp_path / "c.safetensors")
        got += list(make(streams, **arguments, resume=tmp_path / "c.safetensors"))
        assert np.array_equal(np.concatenate(got), whole)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"steps": 3}, {"window": 8}, {"prompt": "a blue 2 on black"}])
def test_other_settings_are_refused(streams, tmp_path, changed):
    stream = make(streams, method="longlive", frames=20)
    next(stream)
    stream.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="resume with the same settings"):
        make(streams, **{"method": "longlive", "frames": 20, **changed}, resume=tmp_path / "c.safetensors")


@pytest.mark.parametrize("damage", ["missing", "garbage", "other"])
def test_damaged_checkpoints_are_refused(streams, tmp_path, damage):
    path = tmp_path / "c.safetensors"
    if damage == "garbage":
        path.write_bytes(b"garbage" * 9)
    if damage == "other":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"no checkpoint|cannot be read|not a checkpoint"):
        make(streams, method="longlive", frames=20, resume=path)


# ------------------------------------------------------------------ recorder


def test_a_recording_is_complete_and_leaves_no_checkpoint(streams, tmp_path):
    video = tmp_path / "v.mp4"
    result = Recorder(make(streams, method="longlive", frames=40), video, every=0).run()
    assert len(read(video)) == 40 == result["frames"]
    assert not checkpoint_of(video).exists()
    assert result["cache_bytes"] > 0
    assert result["frames_per_second"] > 0


def test_a_failing_source_of_prompts_leaves_everything_made(streams, tmp_path):
    def source():
        yield streams.PROMPT
        yield None
        yield streams.OTHER
        raise RuntimeError("gone")

    video = tmp_path / "v.mp4"
    with pytest.raises(ValueError, match="source of prompts failed"):
        Recorder(make(streams, method="longlive", prompt=source()), video).run()
    assert len(read(video)) == 5 + 8 + 8
    assert checkpoint_of(video).exists()


_SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
import tiny_streams as streams, sparsereel
from pathlib import Path
from sparsereel.stream.recording import Recorder, checkpoint_of

def record(video, every):
    there = checkpoint_of(video).is_file()
    stream = sparsereel.stream(
        streams.pipe(), streams.PROMPT, causal=streams.CAUSAL, steps=2, frames=69, method="deep-forcing", window=8,
        seed=3, guidance=1.0, resume=checkpoint_of(video) if there else None, **streams.SIZE
    )
    print("resumed" if there else "new", os.getpid(), flush=True)
    Recorder(stream, video, every=every).run(lambda recorder: print("chunk", flush=True))

streams.pipe()
for line in sys.stdin:
    every, video = line.rstrip().split(" ", 1)
    if (child := os.fork()) == 0:
        code = 1
        try:
            record(Path(video), float(every))
            code = 0
        finally:
            os._exit(code)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Recordings:
    """Recordings in processes of their own, forked from one that has imported everything."""

    def __init__(self):
        script = textwrap.dedent(_SCRIPT).format(folder=str(Path(__file__).parent))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)

    def begin(self, video, every=0.0) -> tuple[str, int]:
        """Whether it is new or resumed, and its process."""
        self.process.stdin.write(f"{every} {video}\n")
        self.process.stdin.flush()
        how, pid = self.process.stdout.readline().split()
        return how, int(pid)

    def wait_for(self, chunks):
        for _ in range(chunks):
            assert self.process.stdout.readline() == "chunk\n"

    def end(self) -> int:
        """The exit code."""
        while not (line := self.process.stdout.readline()).startswith("ended"):
            assert line == "chunk\n"
        return int(line.split()[1])


@pytest.fixture(scope="module")
def recordings():
    found = Recordings()
    yield found
    found.process.stdin.close()
    found.process.wait()
    found.process.stdout.close()


def test_sigkill_leaves_a_playable_file_and_resume_gives_the_same(recordings, tmp_path):
    whole, video = tmp_path / "whole.mp4", tmp_path / "killed.mp4"
    recordings.begin(whole)
    assert recordings.end() == 0
    shown = 0
    for number, (chunks, moment) in enumerate([(3, 0.0), (1, 0.02), (2, 0.005)]):
        how, pid = recordings.begin(video)
        assert how == ("resumed" if number else "new")
        recordings.wait_for(chunks)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        assert recordings.end() == -signal.SIGKILL
        assert len(read(video)) >= max(16, shown)
        shown = len(read(video))
    assert recordings.begin(video)[0] == "resumed"
    assert recordings.end() == 0
    assert video.read_bytes() == whole.read_bytes()


def test_ctrl_c_saves_and_says_so(recordings, tmp_path):
    video = tmp_path / "v.mp4"
    _, pid = recordings.begin(video, every=1e9)
    recordings.wait_for(4)
    os.kill(pid, signal.SIGINT)
    assert recordings.end() not in (0, -signal.SIGINT)
    shown = len(read(video))
    assert 5 + 8 * 3 <= shown < 69
    saved = checkpoint_of(video).read_bytes()
    count = int(re.search(rb'\\"frames_made\\": (\d+)', saved).group(1))
    assert count == shown


# ------------------------------------------------------------------ live


def fetch(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read()


def test_the_page_and_its_stream():
    live = LiveServer(fps=60)
    try:
        assert live.url.startswith("http://127.0.0.1:")
        assert b"/stream.mjpg" in fetch(live.url)
        live.status = {"prompt": "<b>", "text": "fine"}
        assert json.loads(fetch(live.url + "status")) == live.status
        live.push(clip(20))
        with urllib.request.urlopen(live.url + "stream.mjpg", timeout=5) as answer:
            assert "multipart/x-mixed-replace" in answer.headers["Content-Type"]
            data = answer.read(6000)
        assert data.startswith(b"--sparsereel\r\nContent-Type: image/jpeg")
        assert b"\xff\xd8" in data
    finally:
        live.close(drain=False)


def test_without_viewers_generation_waits_or_drops():
    live = LiveServer(fps=10, seconds=1, wait_for_viewers=False)
    live.push(clip(35))  # returns although nobody watches
    assert len(live._buffer) == 10
    live.close()
    import threading

    waiting = LiveServer(fps=10, seconds=1)
    thread = threading.Thread(target=waiting.push, args=(clip(12),), daemon=True)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    assert len(waiting._buffer) == 10
    waiting.close(drain=False)
    thread.join(5)
    assert not thread.is_alive()


def test_a_reader_that_stops_reading_is_dropped():
    live = LiveServer(fps=400, seconds=1, patience=0.3)
    host, port = live.url.removeprefix("http://").rstrip("/").split(":")
    sleeper = socket.socket()
    sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sleeper.connect((host, int(port)))
    sleeper.sendall(b"GET /stream.mjpg HTTP/1.1\r\nHost: x\r\n\r\n")
    noise = np.random.default_rng(0).integers(0, 255, (100, 400, 400, 3), dtype=np.uint8)
    deadline = time.monotonic() + 20
    while not live.viewers and time.monotonic() < deadline:
        time.sleep(0.01)
    live.push(noise[:60])
    while live.viewers and time.monotonic() < deadline:
        time.sleep(0.05)
    assert live.viewers == 0
    sleeper.close()
    live.close(drain=False)


def test_a_port_that_is_taken_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="cannot serve on 127.0.0.1"):
            LiveServer(16, taken.getsockname()[1])


# ------------------------------------------------------------------ vital signs


def test_drift_is_the_change_of_means_and_deviations():
    drift = Drift(4)
    still = np.full((4, 2, 2, 3), 100, np.uint8)
    assert drift.update(still[:3]) is None
    assert drift.update(still[3:]) == 0
    assert drift.update(still[:1] + 12) == pytest.approx(6)  # three means moved by 12, three deviations by none
    again = Drift(4)
    again.load(drift.state())
    assert again.update(still[:1] + 12) == pytest.approx(6)


def test_memory_is_a_plausible_number():
    assert 50e6 < memory() <= peak_memory() * 1.01
