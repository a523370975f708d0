"""Every format read back, odd inputs, and files that must be refused by name."""

from __future__ import annotations

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sparsereel_eval.folders import list_clips, pair_clips
from sparsereel_eval.readers import natural_key, open_clip


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Seven smooth frames of odd size (26 x 35), uint8."""
    y, x, t = np.mgrid[0:26, 0:35, 0:7].astype(float)
    channels = [np.sin((x + t * 2) / 9 + c) + np.cos(y / 7 + c) for c in range(3)]
    return np.rint((np.stack(channels, -1) + 2) * 63).astype(np.uint8).transpose(2, 0, 1, 3).copy()


def encode(path, frames, *arguments, fps=10):
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", size, "-r", str(fps), "-i", "pipe:0", *arguments, str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)


LOSSLESS = ("-c:v", "libx264rgb", "-crf", "0", "-pix_fmt", "rgb24")


def test_lossless_mp4_is_read_to_the_last_bit(tmp_path, frames):
    path = tmp_path / "a b é %03d.mp4"
    encode(path, frames, *LOSSLESS)
    clip = open_clip(path)
    np.testing.assert_array_equal(clip.read(), frames)
    assert (clip.height, clip.width, clip.fps, clip.lossy) == (26, 35, 10, True)
    np.testing.assert_array_equal(clip.read(2), frames[:2])


def test_webm_is_close(tmp_path, frames):
    encode(tmp_path / "c.webm", frames[:, :, :34], "-c:v", "libvpx-vp9", "-b:v", "2M")
    got = open_clip(tmp_path / "c.webm").read()
    assert np.abs(got.astype(int) - frames[:, :, :34]).mean() < 6


def test_variable_rate_gives_every_frame_once(tmp_path, frames):
    # Frame 3 lasts much longer than the others: a reader at a constant rate would repeat it.
    slow = ("-vf", "setpts='if(gt(N,3),N+20,N)/10/TB'", "-fps_mode", "vfr")
    encode(tmp_path / "v.mp4", frames, *slow, *LOSSLESS)
    np.testing.assert_array_equal(open_clip(tmp_path / "v.mp4").read(), frames)


def test_gif_with_transparency_and_rate(tmp_path):
    pictures = [Image.new("RGBA", (12, 10), (255, 0, 0, 255)) for _ in range(3)]
    pictures[0].save(tmp_path / "g.gif", save_all=True, append_images=[Image.new("RGBA", (12, 10))], duration=50)
    clip = open_clip(tmp_path / "g.gif")
    assert (clip.frames, clip.fps) == (2, 20)
    got = clip.read()
    assert got[0, 0, 0].tolist() == [255, 0, 0]


def test_folder_of_pictures_in_natural_order(tmp_path):
    for i in (10, 2, 1):
        Image.new("L", (9, 8), i).save(tmp_path / f"f{i}.png")
    Image.fromarray(np.full((8, 9, 4), (200, 100, 0, 128), np.uint8)).save(tmp_path / "f11.png")
    got = open_clip(tmp_path).read()
    assert got.shape == (4, 8, 9, 3)
    assert got[:3, 0, 0, 1].tolist() == [1, 2, 10]
    assert got[3, 0, 0].tolist() == pytest.approx([100, 50, 0], abs=1), "transparency lies on black"


def test_16_bit_grey_keeps_its_precision(tmp_path):
    Image.fromarray(np.array([[0, 1, 65535]], np.uint16)).save(tmp_path / "f.png")
    got = open_clip(tmp_path / "f.png").read()
    np.testing.assert_allclose(got[0, 0, :, 0], [0, 1 / 65535, 1], atol=1e-7)


@pytest.mark.parametrize("layout", ["last", "first", "grey", "alpha", "bf16"])
def test_arrays(tmp_path, frames, layout):
    unit = torch.tensor(frames) / 255
    shaped = {
        "last": unit,
        "first": unit.movedim(-1, 1).contiguous(),
        "grey": unit[..., 0].contiguous(),
        "alpha": torch.cat([unit, torch.ones_like(unit[..., :1])], -1),
        "bf16": unit.bfloat16(),
    }[layout]
    want = unit[..., :1].expand_as(unit) if layout == "grey" else unit
    save_file({"clip": shaped}, tmp_path / "c.safetensors")
    np.testing.assert_allclose(open_clip(tmp_path / "c.safetensors").read(), want, atol=4e-3 if layout == "bf16" else 0)
    if layout != "bf16":
        np.save(tmp_path / "c.npy", shaped.numpy())
        np.testing.assert_array_equal(open_clip(tmp_path / "c.npy").read(), want.numpy())
    assert not open_clip(tmp_path / "c.safetensors").lossy


def test_one_frame(tmp_path, frames):
    encode(tmp_path / "one.mp4", frames[:1], *LOSSLESS)
    assert open_clip(tmp_path / "one.mp4").read().shape == (1, 26, 35, 3)


def test_damaged_files_are_refused_by_name(tmp_path, frames):
    noisy = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    encode(tmp_path / "whole.mkv", noisy, *LOSSLESS)
    encode(tmp_path / "moov.mp4", noisy, *LOSSLESS, "-movflags", "faststart")
    Image.new("RGB", (64, 64)).save(tmp_path / "g.gif", save_all=True, append_images=[Image.effect_noise((64, 64), 90)])
    np.save(tmp_path / "n.npy", noisy)
    save_file({"x": torch.tensor(noisy)}, tmp_path / "s.safetensors")
    Image.fromarray(noisy[0]).save(tmp_path / "p.png")
    for name in ("whole.mkv", "moov.mp4", "g.gif", "n.npy", "s.safetensors", "p.png"):
        whole = (tmp_path / name).read_bytes()
        assert open_clip(tmp_path / name).read().shape[1:] == (64, 64, 3)
        for kept, text in ((len(whole) * 2 // 3, ""), (0, "empty")):
            (tmp_path / name).write_bytes(whole[:kept])
            with pytest.raises(ValueError, match=rf"{name}.*{text}"):
                open_clip(tmp_path / name).read()
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(ValueError, match=r"text\.mp4 cannot be read"):
        open_clip(tmp_path / "text.mp4")


def test_pickles_are_not_opened(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"evil\.npy .*it holds Python objects"):
        open_clip(tmp_path / "evil.npy")
    (tmp_path / "renamed.npy").write_bytes(b"\0\0\0\x18ftypisom")
    with pytest.raises(ValueError, match=r"renamed\.npy .*it is another file"):
        open_clip(tmp_path / "renamed.npy")


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((2, 8, 8, 3), np.int64), "uint8 or float, got int64"),
        (np.full((2, 8, 8, 3), -0.5, np.float32), r"\[0, 1\], got values from -0.5"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), "got values from nan"),
        (np.zeros((2, 8, 8, 5)), r"got \(2, 8, 8, 5\)"),
        (np.zeros((0, 8, 8, 3)), r"got \(0, 8, 8, 3\)"),
    ],
)
def test_wrong_arrays(tmp_path, array, text):
    np.save(tmp_path / "c.npy", array)
    with pytest.raises(ValueError, match=text):
        open_clip(tmp_path / "c.npy").read()


def test_unknown_and_absent(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    for path, text in (("x.txt", "unknown kind"), ("no.mp4", "does not exist"), (".", "no pictures")):
        with pytest.raises(ValueError, match=text):
            open_clip(tmp_path / path)


def test_a_picture_of_another_size(tmp_path):
    Image.new("L", (9, 8)).save(tmp_path / "1.png")
    Image.new("L", (8, 8)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match="frame 2 is 8 x 8, the first is 9 x 8"):
        open_clip(tmp_path).read()


def test_natural_order():
    names = ["b", "a10", "a2", "A1", "a02"]
    assert sorted(names, key=natural_key) == ["A1", "a02", "a2", "a10", "b"]


def test_sets_and_pairs(tmp_path):
    for folder, names in (("a", ["10.npy", "2.npy"]), ("b", ["2.mp4", "10.npy"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(b"x")
    Image.new("L", (8, 8)).save(tmp_path / "a" / "2.png")
    assert [path.name for path in list_clips(tmp_path / "a")] == ["2.npy", "10.npy"], "contact sheets are no clips"
    pairs, left_out = pair_clips(tmp_path / "a", tmp_path / "b")
    assert [(x.name, y.name) for x, y in pairs] == [("2.npy", "2.mp4"), ("10.npy", "10.npy")]
    assert left_out == []
    (tmp_path / "a" / "3.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no partner .*3\.npy"):
        pair_clips(tmp_path / "a", tmp_path / "b")
    assert [p.name for p in pair_clips(tmp_path / "a", tmp_path / "b", skip=True)[1]] == ["3.npy"]
    (tmp_path / "a" / "3.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match="same name"):
        pair_clips(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="both be clips or both be folders"):
        pair_clips(tmp_path / "a" / "2.npy", tmp_path / "b")


def test_a_rotated_video_stands_upright(tmp_path, frames):
    encode(tmp_path / "flat.mp4", frames[:, :, :34], "-c:v", "libx264", "-pix_fmt", "yuv444p")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i"]
    subprocess.run([*command, str(tmp_path / "flat.mp4"), "-c", "copy", str(tmp_path / "turned.mp4")], check=True)
    flat, turned = open_clip(tmp_path / "flat.mp4"), open_clip(tmp_path / "turned.mp4")
    assert (turned.height, turned.width) == (34, 26)
    np.testing.assert_array_equal(turned.read(), np.rot90(flat.read(), 1, (1, 2)))


@pytest.mark.parametrize("ending", ["png", "gif", "npy", "safetensors"])
def test_a_video_with_a_wrong_ending_is_named(tmp_path, frames, ending):
    encode(tmp_path / "video.mp4", frames, *LOSSLESS)
    wrong = (tmp_path / "video.mp4").rename(tmp_path / f"wrong.{ending}")
    with pytest.raises(ValueError, match=rf"wrong\.{ending} cannot be read as"):
        open_clip(wrong)


def test_sound_alone_is_no_video(tmp_path):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "anullsrc", "-t", "0.2"]
    subprocess.run([*command, str(tmp_path / "sound.mp4")], check=True)
    with pytest.raises(ValueError, match=r"sound\.mp4 .* sound only"):
        open_clip(tmp_path / "sound.mp4")


def test_ten_thousand_files_in_a_folder(tmp_path):
    (tmp_path / "many").mkdir()
    for index in range(10_000):
        (tmp_path / "many" / f"clip {index} \u732b.npy").touch()
    clips = list_clips(tmp_path / "many")
    assert [clip.name for clip in clips] == [f"clip {index} \u732b.npy" for index in range(10_000)]
    pairs, lonely = pair_clips(tmp_path / "many", tmp_path / "many")
    assert (len(pairs), lonely) == (10_000, [])
