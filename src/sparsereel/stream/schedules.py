"""Which frames a forward pass denoises, from which noise level, and what is finished after it: one table a method.

A `Row` is one pass. Tables are generated row by row, so that a stream may have no end. Frames are latent frames; a
frame's state is the number of its steps that are done, 0 (pure noise) to `steps` (clean).

* `staircase`: chunks of frames, each `lag` passes behind the one before. lag = steps finishes a chunk before the next
  begins (Self-Forcing, LongLive, Deep Forcing); lag = 1 is Rolling Forcing (arXiv 2509.25161); any other is the
  asynchronous diffusion forcing of SkyReels-V2 (arXiv 2504.13074), here without losing a tail that is no whole chunk.
* `lockstep`: windows one after another, all new frames of a window at one noise level, the overlap clean.
* `diagonal`: FIFO-Diffusion (arXiv 2405.11473), a queue whose frames each are one step behind the next older one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class Row:
    """One forward pass.

    Attributes:
        start: first frame that the model sees, besides cached ones.
        done: steps done before the pass, a frame; its length is the number of frames seen.
        update: whether a frame takes a step in this pass.
        final: frames (first, one past the last) that are clean from here on and may be shown; None = none.
    """

    start: int
    done: tuple[int, ...]
    update: tuple[bool, ...]
    final: tuple[int, int] | None = None

    @property
    def stop(self) -> int:
        """One past the last frame seen."""
        return self.start + len(self.done)


def staircase(steps: int, chunk: int, lag: int, *, frames: int | None, window: int | None = None) -> Iterator[Row]:
    """Chunk c has done clamp(p - c * lag, 0, steps) steps before pass p.

    Args:
        steps: denoising steps.
        chunk: frames a chunk; the last one of a video may be shorter.
        lag: passes by which a chunk follows the one before, 1 .. steps.
        frames: length of the video; None = no end.
        window: frames the model sees at once, clean ones before the unfinished included; None = only the unfinished.

    Raises:
        ValueError: lag outside 1 .. steps, or more unfinished frames than the window holds.
    """
    if not 1 <= lag <= steps:
        raise ValueError(f"lag must be 1 to {steps} (the number of steps), got {lag}")
    unfinished = -(-steps // lag)
    if window is not None and unfinished * chunk > window:
        raise ValueError(
            f"with {steps} steps and a lag of {lag}, {unfinished} chunks of {chunk} latent frames are unfinished at a "
            f"time, more than the window of {window}; the lag must be at least {-(-steps // max(1, window // chunk))}"
        )
    chunks = None if frames is None else -(-frames // chunk)
    for p in count():
        first = max(0, (p - steps) // lag + 1)
        last = p // lag if chunks is None else min(p // lag, chunks - 1)
        if first > last:
            return
        stop = (last + 1) * chunk if frames is None else min((last + 1) * chunk, frames)
        start = first * chunk if window is None else max(0, min(first * chunk, stop - window))
        done = tuple(min(steps, p - (frame // chunk) * lag) for frame in range(start, stop))
        ends = p - first * lag == steps - 1
        final = (first * chunk, min((first + 1) * chunk, stop)) if ends else None
        yield Row(start, done, tuple(number < steps for number in done), final)


def lockstep(steps: int, window: int, overlap: int, *, frames: int | None) -> Iterator[Row]:
    """Windows of `window` frames that begin with `overlap` clean ones, the last of the window before.

    The last window reaches back further, so that the model always sees its whole window.

    Raises:
        ValueError: overlap outside 0 .. window - 1.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap must be 0 to {window - 1} latent frames (less than the window), got {overlap}")
    clean = 0
    while frames is None or clean < frames:
        start = max(0, clean - overlap)
        stop = start + window
        if frames is not None and stop > frames:
            start, stop = max(0, frames - window), frames
        update = tuple(frame >= clean for frame in range(start, stop))
        for step in range(steps):
            done = tuple(step if new else steps for new in update)
            yield Row(start, done, update, (clean, stop) if step == steps - 1 else None)
        clean = stop


def queue_length(steps: int, window: int) -> int:
    """Frames in a FIFO queue: one a step.

    Raises:
        ValueError: steps is no multiple of the window.
    """
    if steps % window or steps < window:
        nearest = window * max(1, round(steps / window))
        raise ValueError(
            f"FIFO needs a number of steps that is a multiple of the window of {window} latent frames, got {steps}; "
            f"the nearest is {nearest}"
        )
    return steps


def diagonal(steps: int, window: int, *, lookahead: bool = True, frames: int | None) -> Iterator[Row]:
    """A queue of `steps` frames, each one step behind its predecessor; one frame leaves clean per round of passes.

    Frame g of the video stands at place g + steps - window at the beginning; the first steps - window frames of the
    queue (negative numbers) only warm it up. A round passes over parts of the queue, the noisiest first, that together
    update every place once. With lookahead, each part updates the later half (rounded up) of the frames it sees, so
    that these follow cleaner ones; frames seen before the queue's head have left it and are clean.

    Args:
        steps: denoising steps, a multiple of `window`.
        window: frames that the model sees.
    """
    places = queue_length(steps, window)
    new = -(-window // 2) if lookahead else window
    head = window - steps  # the frame at place 0
    while frames is None or head < frames:
        parts = [(begin, min(begin + new, places)) for begin in range(0, places, new)]
        for begin, end in reversed(parts):
            seen = range(end - window, end)
            done = tuple(min(steps, steps - 1 - place) for place in seen)
            final = (head, head + 1) if begin == 0 and head >= 0 else None
            yield Row(head + end - window, done, tuple(place >= begin for place in seen), final)
        head += 1
