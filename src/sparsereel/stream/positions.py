"""Where in time the cached keys are said to stand: one small frozen class a policy.

Rotary attention sees differences of positions only. A policy names the positions of the cached frames; the frames being
denoised keep their true numbers, except under `IndexInCache`. Nothing evicted: all policies agree up to a shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Section:
    """What a cache holds when positions are asked for. Tokens lie as sink | rest, oldest first.

    Attributes:
        frame_ids: (n,) int64, the true latent frame of each cached token.
        sink: tokens of the sink at the beginning.
        frame_tokens: tokens a frame.
        start: first frame being denoised.
        realigned: start of the sink's positions as of the last eviction; None before there was one.
    """

    frame_ids: Tensor
    sink: int
    frame_tokens: int
    start: int
    realigned: int | None = None


@dataclass(frozen=True)
class PositionPolicy:
    """Absolute: every key keeps its true frame number (Self-Forcing; LongLive as released)."""

    name: ClassVar[str] = "absolute"

    def keys(self, section: Section) -> Tensor:
        """(n,) positions of the cached tokens."""
        return section.frame_ids

    def queries(self, section: Section) -> int:
        """Position of the first frame being denoised; the others follow one by one."""
        return section.start


@dataclass(frozen=True)
class IndexInCache(PositionPolicy):
    """Position = index in the cache, in frames: no distance ever exceeds the window.

    StreamingLLM (arXiv 2309.17453); LongLive's infinite mode. Sink, survivors and recent frames form one line.
    """

    name: ClassVar[str] = "index"

    def keys(self, section: Section) -> Tensor:
        count = section.frame_ids.shape[0]
        return torch.arange(count, device=section.frame_ids.device) // section.frame_tokens

    def queries(self, section: Section) -> int:
        return -(-section.frame_ids.shape[0] // section.frame_tokens)


@dataclass(frozen=True)
class SinkBeforeWindow(PositionPolicy):
    """The sink stands directly before the oldest other cached frame; the rest is absolute (Rolling Forcing)."""

    name: ClassVar[str] = "sink-before-window"

    def keys(self, section: Section) -> Tensor:
        ids, sink = section.frame_ids, section.sink
        oldest = ids[sink] if sink < ids.shape[0] else torch.tensor(section.start, device=ids.device)
        return _place_sink(section, oldest - _frames(sink, section.frame_tokens))


@dataclass(frozen=True)
class SinkRealigned(PositionPolicy):
    """The sink follows the window in steps: at each eviction it moves to `chunk start - budget` (Deep Forcing).

    The temporal rotation of the sink's keys by exp(i theta Delta), written as positions. What survives between sink and
    recent frames keeps its true position, as in the released code; the paper's one contiguous line is `IndexInCache`.
    """

    name: ClassVar[str] = "sink-realigned"

    def keys(self, section: Section) -> Tensor:
        if section.realigned is None:
            return section.frame_ids
        return _place_sink(section, torch.tensor(section.realigned, device=section.frame_ids.device))


def _place_sink(section: Section, first: Tensor) -> Tensor:
    """Positions with the sink's frames one by one from `first` on."""
    ids, sink = section.frame_ids, section.sink
    line = torch.arange(sink, device=ids.device) // section.frame_tokens
    return torch.cat([first + line, ids[sink:]])


def _frames(tokens: int, frame_tokens: int) -> int:
    return -(-tokens // frame_tokens)


POLICIES: dict[str, PositionPolicy] = {
    policy.name: policy for policy in (PositionPolicy(), IndexInCache(), SinkBeforeWindow(), SinkRealigned())
}


def position_policy(name: str) -> PositionPolicy:
    """A policy by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown position policy {name!r}; allowed: {', '.join(POLICIES)}")
    return POLICIES[name]
