"""An mp4 that grows: H.264 in fragments, complete and playable after every one of them.

Each segment of frames is encoded by itself and appended as `moof` + `mdat`; the header (`ftyp` + `moov`) comes first
and says nothing about the length. A segment's bytes depend on its frames and its place only, so a run that was killed
and resumed writes the very file that an uninterrupted one writes.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsereel.media import Frames

_CRF = 14  # visually lossless; a stream's errors should be the model's


class GrowingMp4:
    """Writes frames to `path` as they come.

    Args:
        segment: frames encoded together; also what a crash can cost.
    """

    def __init__(self, path: Path, fps: float, segment: int = 16) -> None:
        self.path = path
        self.fps = fps
        self.segment = segment
        self.bytes = 0  # of whole segments
        self.written = 0  # frames in them
        self.segments = 0
        self.pending: list[Frames] = []

    # -------------------------------------------------------------- frames

    def append(self, frames: Frames) -> None:
        """Take frames (F, H, W, 3); whole segments go to the file at once.

        Raises:
            ValueError: the disk is full or the file cannot be written; what was written before stays playable.
        """
        self.pending.extend(frames)
        while len(self.pending) >= self.segment:
            self._write(self.pending[: self.segment])
            del self.pending[: self.segment]

    def close(self) -> None:
        """Write what is left of a segment."""
        if self.pending:
            self._write(self.pending)
            self.pending = []

    def _write(self, frames: list[Frames]) -> None:
        head, body = split_boxes(self._encoded(np.stack(frames)))
        body = place(body, self.segments + 1, self.written * _TICKS)
        data = body if self.segments else head + body
        if self.segments and self._head() != head:
            raise ValueError(f"{self.path} was begun by another ffmpeg, whose stream this one cannot go on with")
        self._store(data)
        self.bytes += len(data)
        self.written += len(frames)
        self.segments += 1

    def _store(self, data: bytes) -> None:
        try:
            with open(self.path, "r+b" if self.bytes else "wb") as file:
                # A run that was killed may have left half a segment behind.
                file.truncate(self.bytes)
                file.seek(self.bytes)
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), self.bytes)
                    raise
        except OSError as error:
            kept = f"; its first {self.written} frames are kept" if self.written else ""
            raise ValueError(f"could not write {self.path}: {error.strerror or error}{kept}") from error

    def _head(self) -> bytes:
        with open(self.path, "rb") as file:
            start = file.read(1 << 16)
        return start[: sum(size for _, _, size in boxes(start, limit=2))]

    def _encoded(self, frames: Frames) -> bytes:
        import imageio_ffmpeg

        # yuv420 needs even sizes: one row or column is repeated.
        even = ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0))
        frames = np.pad(frames, even, mode="edge")
        height, width = frames.shape[1:3]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{width}x{height}", "-r", str(self.fps), "-i", "-", "-an", "-c:v", "libx264"]
        command += ["-pix_fmt", "yuv420p", "-crf", str(_CRF), "-bf", "0", "-g", str(self.segment), "-threads", "1"]
        command += ["-video_track_timescale", str(round(self.fps * _TICKS)), "-fflags", "+bitexact"]
        command += ["-flags:v", "+bitexact", "-movflags", "+empty_moov+default_base_moof+frag_custom"]
        command += ["-f", "mp4", "pipe:1"]
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True, check=False)
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise ValueError(f"ffmpeg could not encode frames of {width} x {height}: {words[-1]}")
        return done.stdout

    # -------------------------------------------------------------- checkpoints

    def state(self) -> tuple[dict[str, Any], Frames | None]:
        """Plain numbers, and the frames that are not in the file yet."""
        numbers = {"bytes": self.bytes, "written": self.written, "segments": self.segments, "segment": self.segment}
        return numbers, np.stack(self.pending) if self.pending else None

    def load(self, numbers: dict[str, Any], pending: Frames | None) -> None:
        """Undo `state`; what the file holds beyond is cut off with the next segment.

        Raises:
            ValueError: the file is missing or shorter than it was.
        """
        # Without a segment yet there was no file to leave behind.
        size = self.path.stat().st_size if self.path.is_file() else -1 if numbers["bytes"] else 0
        if size < numbers["bytes"]:
            found = "is missing" if size < 0 else f"has {size} bytes instead of at least {numbers['bytes']}"
            raise ValueError(f"{self.path} {found}: it cannot be resumed")
        for name, value in numbers.items():
            setattr(self, name, value)
        self.pending = [] if pending is None else list(pending)


# ------------------------------------------------------------------ boxes

#: ticks of the time scale a frame
_TICKS = 1000


def boxes(
    data: bytes, start: int = 0, stop: int | None = None, limit: int | None = None
) -> Iterator[tuple[str, int, int]]:
    """(type, offset, size) of the boxes that follow each other from `start` on."""
    stop = len(data) if stop is None else stop
    while start + 8 <= stop and limit != 0:
        size, kind = struct.unpack_from(">I4s", data, start)
        if size < 8:
            return
        yield kind.decode("latin-1"), start, size
        start += size
        limit = None if limit is None else limit - 1


def split_boxes(data: bytes) -> tuple[bytes, bytes]:
    """The header (`ftyp`, `moov`) and the fragments (`moof`, `mdat`) of a fragmented mp4.

    Raises:
        ValueError: one of them is missing.
    """
    found = {"head": b"", "body": b""}
    for kind, offset, size in boxes(data):
        part = {"ftyp": "head", "moov": "head", "moof": "body", "mdat": "body"}.get(kind)
        if part:
            found[part] += data[offset : offset + size]
    if not found["head"] or not found["body"]:
        raise ValueError("ffmpeg gave no fragmented mp4")
    return found["head"], found["body"]


def place(body: bytes, number: int, time: int) -> bytes:
    """A segment's fragments, numbered from `number` on and moved to later by `time` ticks."""
    out = bytearray(body)
    for kind, offset, size in boxes(body):
        if kind != "moof":
            continue
        for inner, at, length in boxes(body, offset + 8, offset + size):
            if inner == "mfhd":
                struct.pack_into(">I", out, at + 12, number)
                number += 1
            for deep, where, _ in boxes(body, at + 8, at + length) if inner == "traf" else ():
                if deep == "tfdt":
                    form = ">Q" if body[where + 8] == 1 else ">I"
                    struct.pack_into(form, out, where + 12, struct.unpack_from(form, body, where + 12)[0] + time)
    return bytes(out)
