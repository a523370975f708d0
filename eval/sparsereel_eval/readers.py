"""Clips from files, one frame at a time: mp4, webm, mkv, mov, gif, folders of pictures, npy and safetensors.

    clip = open_clip("dense.mp4")
    clip.height, clip.width, clip.fps
    for frame in clip: ...            # (H, W, 3) uint8, or float32 in [0, 1] where the file holds floats

Memory does not grow with the clip's length. Every stored frame comes exactly once, also from files of variable frame
rate: nothing is dropped or repeated to keep a rhythm. Transparent pixels are laid on black, grey becomes three equal
channels. A file that is empty, cut off or damaged is refused by name, as a clip that ends early would pass for a
shorter one. Nothing is unpickled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
ARRAY_SUFFIXES = (".npy", ".safetensors")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".gif", *ARRAY_SUFFIXES)
# Generators, so that a reader that stops early can close the decoder.
FrameStream: TypeAlias = "Generator[np.ndarray, None, None]"
_LOSSY_PICTURES = (".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class ClipFile:
    """A clip that can be read any number of times.

    Attributes:
        path: The file or folder.
        height, width: Pixels.
        frames: Number of frames; None where only decoding to the end tells.
        fps: Frames a second; None where the format does not say, or the rate varies.
        lossy: The format loses detail; fidelity near its own error (mp4: about 38 dB) says nothing.
    """

    path: Path
    height: int
    width: int
    frames: int | None
    fps: float | None
    lossy: bool
    opener: Callable[[], FrameStream] = field(repr=False, compare=False)

    def __iter__(self) -> FrameStream:
        number = 0
        for number, frame in enumerate(self.opener(), start=1):
            if frame.shape != (self.height, self.width, 3):
                size = f"{frame.shape[1]} x {frame.shape[0]}"
                raise ValueError(f"{self.path}: frame {number} is {size}, the first is {self.width} x {self.height}")
            yield frame
        if self.frames is not None and number != self.frames:
            raise ValueError(f"{self.path}: announces {self.frames} frames but holds {number}")

    def read(self, limit: int | None = None) -> np.ndarray:
        """All frames, or the first `limit`, as one (F, H, W, 3) array."""
        kept = []
        with closing(iter(self)) as frames:
            for frame in frames:
                kept.append(frame)
                if limit is not None and len(kept) >= limit:
                    break
        return np.stack(kept)


def open_clip(path: str | Path) -> ClipFile:
    """Look at a clip: its size and rate, without reading it all.

    Raises:
        ValueError: the file is missing, empty, damaged, of an unknown kind, or holds no picture.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return _open_video(path)
    if suffix == ".gif":
        return _open_gif(path)
    if suffix == ".npy":
        return _open_npy(path)
    if suffix == ".safetensors":
        return _open_safetensors(path)
    if suffix in PICTURE_SUFFIXES:
        return _open_pictures(path, [path])
    known = ", ".join((*CLIP_SUFFIXES, *PICTURE_SUFFIXES))
    raise ValueError(f"{path} is of an unknown kind; readable are {known} and folders of pictures")


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key under which frame2 comes before frame10; equal keys fall back to the exact name."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part.casefold()) for part in parts), name


# Videos: ffmpeg writes a stream of PPM pictures, each of which states its own size.


def _open_video(path: Path) -> ClipFile:
    command = [_ffmpeg(), "-hide_banner", "-nostdin", *_input(path)]
    about = subprocess.run(command, capture_output=True, check=False).stderr.decode(errors="replace")
    stream = next((line for line in about.splitlines() if "Video:" in line), None)
    if stream is None:
        reason = "it holds sound only" if "Audio:" in about else _reason(about, path)
        raise ValueError(f"{path} cannot be read as a video: {reason}")
    rate = re.search(r"([\d.]+)(k?) fps", stream)
    fps = None if rate is None else float(rate[1]) * (1000 if rate[2] else 1)
    with closing(_decode(path)) as frames:
        first = next(frames)
    height, width = first.shape[:2]
    return ClipFile(path, height, width, None, fps, True, lambda: _decode(path))


def _input(path: Path) -> list[str]:
    # The protocol is spelled out, so that no file name or playlist makes ffmpeg open something else.
    return ["-protocol_whitelist", "file", "-i", f"file:{path.absolute()}"]


def _ffmpeg() -> str:
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


def _decode(path: Path) -> FrameStream:
    command = [_ffmpeg(), "-v", "error", "-nostdin", *_input(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"]
    count = 0
    # Messages go to a file: a full pipe that nobody empties would stop ffmpeg.
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages)
        assert process.stdout is not None
        try:
            while (frame := _read_ppm(process.stdout)) is not None:
                count += 1
                yield frame
            code = process.wait()
            messages.seek(0)
            said = messages.read().decode(errors="replace").strip()
            if code or said or not count:
                where = f"damaged or cut off after {count} frames" if count else "not a readable video"
                raise ValueError(f"{path} is {where}: {_reason(said, path)}")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def _read_ppm(stream: IO[bytes]) -> np.ndarray | None:
    """The next picture of a PPM stream; None at its end, also when the last picture is cut."""
    header = [stream.readline() for _ in range(3)]
    if header[0] != b"P6\n" or header[2] != b"255\n":
        return None
    width, height = map(int, header[1].split())
    data = stream.read(width * height * 3)
    if len(data) < width * height * 3:
        return None
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _reason(text: str, path: Path) -> str:
    """ffmpeg's last message, without addresses in memory and without the path."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "must be specified" not in line]
    last = lines[-1] if lines else "no video stream"
    last = re.sub(r"^(\[[^\]]*\] ?)+", "", last).replace(f"file:{path.absolute()}", "the file")
    return last.strip().rstrip(".:")


# Pictures


def _open_gif(path: Path) -> ClipFile:
    from PIL import Image

    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 64), 2)
        ending = file.read().rstrip(b"\0")
    try:
        with Image.open(path) as image:
            frames, (width, height) = getattr(image, "n_frames", 1), image.size
            durations = []
            for index in range(frames):
                image.seek(index)
                durations.append(image.info.get("duration", 0))
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a gif: {error}") from error
    # PIL takes a cut gif for a shorter one; a whole one ends with the trailer byte.
    if not ending.endswith(b";"):
        raise ValueError(f"{path} is damaged or cut off: the gif has no end mark")
    steady = frames > 1 and len(set(durations)) == 1 and durations[0] > 0
    fps = 1000 / durations[0] if steady else None
    return ClipFile(path, height, width, frames, fps, lossy=True, opener=lambda: _gif_frames(path, frames))


def _gif_frames(path: Path, frames: int) -> FrameStream:
    from PIL import Image

    with Image.open(path) as image:
        for index in range(frames):
            try:
                image.seek(index)
                yield _pixels(image)
            except (OSError, SyntaxError, EOFError) as error:
                raise ValueError(f"{path} is damaged at frame {index + 1}: {error}") from error


def _open_folder(folder: Path) -> ClipFile:
    pictures = [file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()]
    pictures = [file for file in pictures if not file.name.startswith(".")]
    if not pictures:
        raise ValueError(f"the folder {folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return _open_pictures(folder, sorted(pictures, key=lambda file: natural_key(file.name)))


def _open_pictures(path: Path, pictures: list[Path]) -> ClipFile:
    height, width = _picture(pictures[0]).shape[:2]
    lossy = any(picture.suffix.lower() in _LOSSY_PICTURES for picture in pictures)
    return ClipFile(path, height, width, len(pictures), None, lossy, lambda: (_picture(file) for file in pictures))


def _picture(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _pixels(image)
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _pixels(image: Any) -> np.ndarray:
    """A PIL picture as (H, W, 3): transparency on black, 16-bit grey as floats."""
    from PIL import Image

    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / 65535
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
    return np.asarray(image.convert("RGB"))


# Arrays


def _open_npy(path: Path) -> ClipFile:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError) as error:
        known = (("mmap length", "is cut off"), ("Python", "holds Python objects"), ("magic", "is another file"))
        reason = next((f"it {text}" for part, text in known if part in str(error)), str(error).splitlines()[0])
        raise ValueError(f"{path} cannot be read as an npy array of numbers: {reason}") from error
    layout = _array_layout(path, array.shape, str(array.dtype))
    frames, (height, width) = array.shape[0], _height_width(array.shape, layout)
    opener = lambda: (_array_frame(path, np.asarray(array[i]), layout) for i in range(frames))  # noqa: E731
    return ClipFile(path, height, width, frames, None, False, opener)


def _open_safetensors(path: Path) -> ClipFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            name = names[0] if len(names) == 1 else next((n for n in ("video", "frames") if n in names), None)
            if name is None:
                raise ValueError(f"{path} holds the tensors {names}; the clip must be the only one or named video")
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    named = {"U8": "uint8", "F16": "float16", "BF16": "float16", "F32": "float32", "F64": "float64"}
    layout = _array_layout(path, shape, named.get(dtype, dtype))

    def frames() -> FrameStream:
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(name)
            for i in range(shape[0]):
                frame = part[i : i + 1][0]
                yield _array_frame(path, (frame.float() if frame.is_floating_point() else frame).numpy(), layout)

    height, width = _height_width(shape, layout)
    return ClipFile(path, height, width, shape[0], None, False, frames)


def _array_layout(path: Path, shape: tuple[int, ...], dtype: str) -> str:
    """Where the channels are: "last", "first" or "none"."""
    if dtype not in ("uint8", "float16", "float32", "float64"):
        raise ValueError(f"{path}: a clip must be uint8 or float, got {dtype}")
    if 0 not in shape:
        if len(shape) == 3:
            return "none"
        if len(shape) == 4 and shape[-1] in (1, 3, 4):
            return "last"
        if len(shape) == 4 and shape[1] in (1, 3, 4):
            return "first"
    raise ValueError(f"{path}: a clip must have the shape (frames, height, width, 1, 3 or 4), got {shape}")


def _height_width(shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    return (shape[2], shape[3]) if layout == "first" else (shape[1], shape[2])


def _array_frame(path: Path, frame: np.ndarray, layout: str) -> np.ndarray:
    if layout == "first":
        frame = frame.transpose(1, 2, 0)
    elif layout == "none":
        frame = frame[..., None]
    if frame.dtype != np.uint8:
        frame = frame.astype(np.float32)
        low, high = float(frame.min()), float(frame.max())
        # Written so that NaN fails too.
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(f"{path}: float frames must lie in [0, 1], got values from {low:.3g} to {high:.3g}")
        frame = frame.clip(0, 1)
    if frame.shape[-1] == 4:
        opaque = 255 if frame.dtype == np.uint8 else 1
        laid = frame[..., :3].astype(np.float32) * (frame[..., 3:].astype(np.float32) / opaque)
        frame = np.rint(laid).astype(np.uint8) if opaque == 255 else laid
    return np.repeat(frame, 3, axis=2) if frame.shape[-1] == 1 else np.ascontiguousarray(frame)
