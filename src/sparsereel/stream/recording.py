"""A stream to a file, to a browser, or both: progressive output, checkpoints, and an orderly end whatever happens."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sparsereel.stream.fmp4 import GrowingMp4
from sparsereel.stream.live import LiveServer
from sparsereel.stream.session import Stream
from sparsereel.stream.vitals import Drift, memory, peak_memory


def checkpoint_of(video: Path) -> Path:
    """Where the checkpoint of a video in the making lies."""
    return video.with_suffix(".resume.safetensors")


class Recorder:
    """Runs a stream to its end.

    Args:
        video: the mp4 to write; None = none.
        live: where to show frames; None = nowhere.
        every: seconds of work between checkpoints. The first is written after the first chunk.

    Raises:
        ValueError: the stream goes on from a checkpoint whose video is not there any more.
    """

    def __init__(
        self, stream: Stream, video: Path | None, live: LiveServer | None = None, *, every: float = 30.0
    ) -> None:
        self.stream = stream
        self.live = live
        self.every = every
        self.drift = Drift(max(1, round(stream.fps)))
        self.mp4 = None if video is None else GrowingMp4(video, stream.fps, max(1, round(stream.fps)))
        self.checkpoint = None if video is None else checkpoint_of(video)
        self.last_drift: float | None = None
        self._saved: float | None = None
        self._began = stream.frames_made
        if stream.notes and self.mp4 is not None:
            pending = stream.extra.get("pending")
            self.mp4.load(stream.notes["mp4"], None if pending is None else pending.numpy())
            self.drift.load(stream.notes["drift"])

    def run(self, progress: Callable[[Recorder], None] | None = None) -> dict[str, Any]:
        """Write everything; returns what there is to report.

        Raises:
            ValueError: the prompts or the disk failed; everything made before is in the file.
            KeyboardInterrupt: likewise.
        """
        try:
            with _gentle_interrupt(self.stream):
                for frames in self.stream:
                    self._take(frames)
                    if progress is not None:
                        progress(self)
        except BaseException as error:
            self._break_off(error)
            raise
        if self.mp4 is not None:
            self.mp4.close()
        if self.live is not None:
            self.live.close()
        result = self.result()
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        return result

    def _take(self, frames: Any) -> None:
        found = self.drift.update(frames)
        self.last_drift = self.last_drift if found is None else found
        if self.mp4 is not None:
            self.mp4.append(frames)
        if self.live is not None:
            self.live.status = {"prompt": self.stream.prompt, "text": self.summary()}
            self.live.push(frames)
        if self._saved is None or time.monotonic() - self._saved >= self.every:
            self.save()

    def save(self) -> None:
        """Write the checkpoint now."""
        if self.mp4 is None or self.checkpoint is None:
            return
        numbers, pending = self.mp4.state()
        extra = {} if pending is None else {"pending": torch.from_numpy(pending)}
        self.stream.save(self.checkpoint, extra=extra, mp4=numbers, drift=self.drift.state())
        self._saved = time.monotonic()

    def _break_off(self, error: BaseException) -> None:
        """Keep what there is. The error that is under way matters more than one that this adds."""
        with suppress(Exception):
            # Stopped between two passes, by the user or by the source of prompts: a state that can be saved.
            if self.stream.stopping or "source of prompts" in str(error):
                self.save()
        with suppress(Exception):
            if self.mp4 is not None:
                self.mp4.close()
        with suppress(Exception):
            if self.live is not None:
                self.live.close(drain=False)

    # -------------------------------------------------------------- figures

    @property
    def frames_per_second(self) -> float:
        """Speed of this run, decoding included."""
        done = self.stream.frames_made - self._began
        return done / self.stream.seconds_here if self.stream.seconds_here else 0.0

    def summary(self) -> str:
        """One line for people."""
        stream = self.stream
        drift = "" if self.last_drift is None else f", drift {self.last_drift:.1f}/255"
        return (
            f"{stream.frames_made / stream.fps:.1f} s of video, {self.frames_per_second:.2f} frames/s{drift}, "
            f"memory {memory() / 2**20:.0f} MiB"
        )

    def result(self) -> dict[str, Any]:
        """Plain data about the run."""
        stream = self.stream
        return {
            "frames": stream.frames_made,
            "seconds_of_video": stream.frames_made / stream.fps,
            "seconds_of_work": stream.seconds,
            "frames_per_second": self.frames_per_second,
            "drift": self.last_drift,
            "cache_bytes": stream.engine.cache_bytes,
            "peak_memory_bytes": peak_memory(),
            "settings": stream.settings,
        }


@contextmanager
def _gentle_interrupt(stream: Stream) -> Iterator[None]:
    """The first Ctrl-C stops after the pass in progress, so that nothing is lost; the second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        if stream.stopping:
            raise KeyboardInterrupt
        stream.stopping = True

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
