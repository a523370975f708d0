"""`Stream`: the iterator that `sparsereel.stream` returns."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from sparsereel.media import Frames
from sparsereel.stream.checkpoint import check_same, read_checkpoint, write_checkpoint
from sparsereel.stream.decode import Decoder
from sparsereel.stream.engine import Engine
from sparsereel.stream.prompts import Prompts

Output = Literal["frames", "latents"]
OUTPUTS: tuple[Output, ...] = ("frames", "latents")


class Stream(Iterator[Any]):
    """Chunks of an endless video. Work is done only when the next chunk is asked for, so to pause is not to ask.

    Iterating gives uint8 frames (F, H, W, 3), or float32 latents (C, F, h, w) with output="latents".

    Args:
        frames: frames to make; None = no end.
        ratio: frames a latent frame stands for, after the first.

    Attributes:
        settings: everything that decides the result.
        frames_made: frames (latent frames with output="latents") given out so far.
        seconds: spent so far in making them; `seconds_here` without those before a checkpoint.
    """

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        prompts: Prompts,
        settings: dict[str, Any],
        *,
        frames: int | None,
        ratio: int,
        fps: float,
        output: Output,
    ) -> None:
        self.engine = engine
        self.decoder = decoder
        self.prompts = prompts
        self.settings = settings
        self.frames = frames
        self.ratio = ratio
        self.fps = fps
        self.output = output
        #: what was saved along with the checkpoint that this stream went on from
        self.notes: dict[str, Any] = {}
        self.extra: dict[str, Tensor] = {}
        self.prompt: str | None = None
        self.frames_made = 0
        self.seconds = self.seconds_here = 0.0
        self._ended = False
        #: set it (from a signal handler) to be interrupted after the pass in progress, in a state that can be saved
        self.stopping = False

    def __next__(self) -> Any:
        begun = time.perf_counter()
        try:
            return self._next()
        finally:
            spent = time.perf_counter() - begun
            self.seconds += spent
            self.seconds_here += spent

    def _next(self) -> Any:
        while not self._ended:
            if self.stopping:
                raise KeyboardInterrupt
            row = self.engine.next_row()
            if row is None:
                break
            self._follow_prompt(row.start + row.update.index(True))
            clean = self.engine.run(row)
            made = None if clean is None else self._made(clean)
            if made is not None and len(made):
                return made
        if not self._ended:
            self._ended = True
            left = self.decoder.flush()
            if left is not None and self.output == "frames" and len(made := self._cut(left)):
                return made
        raise StopIteration

    def _follow_prompt(self, frame: int) -> None:
        prompt = self.prompts.at(self._time(max(0, frame)))
        if prompt != self.prompt:
            self.prompt = prompt
            self.engine.set_prompt(prompt)

    def _time(self, latent_frame: int) -> float:
        """When a latent frame begins, in seconds of the video."""
        return (1 + self.ratio * (latent_frame - 1) if latent_frame else 0) / self.fps

    def _made(self, clean: Tensor) -> Any:
        if self.output == "latents":
            self.frames_made += clean.shape[1]
            return clean
        return self._cut(self.decoder.decode(clean))

    def _cut(self, frames: Tensor) -> Frames:
        """uint8 frames, none beyond the length asked for."""
        if self.frames is not None:
            frames = frames[: self.frames - self.frames_made]
        self.frames_made += frames.shape[0]
        # As diffusers' VideoProcessor computes it.
        exact = (frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return (exact * 255).round().astype(np.uint8)

    # -------------------------------------------------------------- checkpoints

    def save(self, path: str | Path, *, extra: dict[str, Tensor] | None = None, **notes: Any) -> None:
        """Write a checkpoint that `sparsereel.stream(..., resume=path)` goes on from, bit for bit.

        Args:
            extra, notes: tensors and plain data to keep with it; see `Stream.extra` and `Stream.notes`.

        Raises:
            ValueError: the file cannot be written.
        """
        tensors, numbers = self.engine.state()
        features, decoder = self.decoder.state()
        tensors |= {f"decoder.{name}": x for name, x in features.items()}
        tensors |= {f"extra.{name}": x for name, x in (extra or {}).items()}
        write_checkpoint(
            Path(path),
            tensors,
            {
                "settings": self.settings,
                "engine": numbers,
                "decoder": decoder,
                "prompt": self.prompt,
                "prompts_taken": self.prompts.taken,
                "frames_made": self.frames_made,
                "seconds": self.seconds,
                "notes": notes,
            },
        )

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the checkpoint is missing, damaged, or was made with other settings.
        """
        tensors, numbers = read_checkpoint(path)
        check_same(numbers["settings"], self.settings, path)
        self.prompt = numbers["prompt"]
        self.prompts.replay(numbers["prompts_taken"], self.prompt)
        if self.prompt is not None:
            self.engine.denoiser.set_prompt(self.prompt)
        self.decoder.load(_under("decoder.", tensors), numbers["decoder"])
        self.engine.load(tensors, numbers["engine"])
        self.frames_made, self.seconds = numbers["frames_made"], numbers["seconds"]
        self.notes, self.extra = numbers["notes"], _under("extra.", tensors)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def fingerprint(model: Any) -> str:
    """Tells models apart: configuration, dtype, and a sample of every weight."""
    # Names with an underscore say how the configuration came about, and in no fixed order.
    config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, default=str, sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 16)][:16].float().cpu().numpy()
        digest.update(name.encode() + str(weight.dtype).encode() + sample.tobytes())
    return digest.hexdigest()[:16]
