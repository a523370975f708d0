"""What a causal training step shows the model: clean chunks as in a cache, noisy ones to learn from, who sees whom.

A sequence holds clean copies of some chunks of a clip, then noisy copies of the chunks that follow each of them
(teacher forcing). A group of frames attends to earlier *clean* frames and to
itself, and every group counts positions from the first frame it sees: what a rolling cache with index-in-cache
positions shows at that moment of a stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

CHUNK_FRAMES = 3
WINDOW_FRAMES = 9

Span = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """One kind of sequence; all numbers are latent frames.

    Attributes:
        name: Shown beside its losses.
        sink: Frames of the clip's start that stand first in the sequence.
        run: Frames in a row that follow them, clean.
        noisy: How many of the run's last frames have noisy copies, which stand at the end of the sequence.
        copies: How often these stand there, each time with other noise: more to learn from the same clean chunks.
        views: For each group of frames in sequence order, the spans of the sequence it sees; the last is the group.
        starts_at: First frame of the clip where the run may start; None when it is the clip's start.
    """

    name: str
    sink: int
    run: int
    noisy: int
    views: tuple[tuple[Span, ...], ...]
    starts_at: int | None
    copies: int = 1

    def __post_init__(self) -> None:
        covered = [span[-1] for span in self.views]
        ends = [0, *(stop for _, stop in covered)]
        if any(start != end for (start, _), end in zip(covered, ends, strict=False)) or ends[-1] != self.frames:
            raise ValueError(f"The groups of layout {self.name} must cover its {self.frames} frames in order.")
        if max(sum(stop - start for start, stop in spans) for spans in self.views) > WINDOW_FRAMES:
            raise ValueError(f"A group of layout {self.name} sees more than {WINDOW_FRAMES} frames.")

    @property
    def clean(self) -> int:
        """Clean frames: sink and run, without the chunk nobody sees a clean copy of."""
        return self.sink + self.run - CHUNK_FRAMES

    @property
    def frames(self) -> int:
        """Length of the sequence."""
        return self.clean + self.copies * self.noisy

    @property
    def chunks(self) -> int:
        """Noisy chunks in the sequence."""
        return self.copies * self.noisy // CHUNK_FRAMES

    def repeated(self, copies: int) -> Layout:
        """The layout with `copies` copies of its noisy frames instead of one."""
        if self.copies != 1 or copies < 1:
            raise ValueError(f"Copies of a layout with one copy only, and 1 or more; got {self.copies}, {copies}.")
        views = list(self.views)
        for copy in range(1, copies):
            for *seen, (start, stop) in self.views:
                if start >= self.clean:
                    views.append((*seen, (start + copy * self.noisy, stop + copy * self.noisy)))
        return replace(self, views=tuple(views), copies=copies)

    def draw(self, length: int, generator: torch.Generator) -> torch.Tensor:
        """Frames of a clip of `length` that make up the sequence: (frames,) int64.

        Raises:
            ValueError: the clip is too short.
        """
        last = length - self.run
        first = 0 if self.starts_at is None else self.starts_at
        if last < first:
            raise ValueError(f"Layout {self.name} needs clips of {first + self.run} latent frames, got {length}.")
        start = 0
        if self.starts_at is not None:
            start = int(torch.randint(first, last + 1, (1,), generator=generator))
        run = torch.arange(start, start + self.run)
        return torch.cat(
            [torch.arange(self.sink), run[:-CHUNK_FRAMES], run[self.run - self.noisy :].repeat(self.copies)]
        )


def _start() -> Layout:
    """A clip's first nine frames: the first chunk from nothing, the next from what was before."""
    c0, c1, n0, n1, n2 = _chunks(5)
    views = ((c0,), (c0, c1), (n0,), (c0, n1), (c0, c1, n2))
    return Layout("start", 0, 9, 9, views, None)


def _sliding() -> Layout:
    """Somewhere inside a clip, the window slides and the first latent (a still image to the VAE) is gone."""
    c0, c1, c2, n1, n2, n3 = _chunks(6)
    views = ((c0,), (c0, c1), (c0, c1, c2), (c0, n1), (c0, c1, n2), (c1, c2, n3))
    return Layout("sliding", 0, 12, 9, views, 1)


def _sink(frames: int) -> Layout:
    """The clip's first `frames` stay in the window, later ones slide; time between them has passed unseen."""
    sink, r0, r1, r2, n1, n2, n3 = _chunks(7)
    kept = (0, frames)
    recent = WINDOW_FRAMES - CHUNK_FRAMES - frames
    # Of two chunks in a row, the frames that fit beside the sink.
    before_1, before_2, before_3 = ((stop - min(recent, stop - r0[0]), stop) for _, stop in (r0, r1, r2))
    views = (
        (sink,),
        (kept, r0),
        (kept, before_1, r1),
        (kept, before_2, r2),
        (kept, before_1, n1),
        (kept, before_2, n2),
        (kept, before_3, n3),
    )
    return Layout(f"sink{frames}", CHUNK_FRAMES, 12, 9, views, CHUNK_FRAMES)


def _chunks(count: int) -> list[Span]:
    return [(start, start + CHUNK_FRAMES) for start in range(0, count * CHUNK_FRAMES, CHUNK_FRAMES)]


START, SLIDING, SINK_1, SINK_3 = (one.repeated(2) for one in (_start(), _sliding(), _sink(1), _sink(3)))
