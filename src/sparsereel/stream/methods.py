"""The streaming methods as data, and how their sizes follow from a model's.

Sizes are given for the window that a method was published with (21 latent frames for most) and scaled to the model's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Schedule = Literal["staircase", "lockstep", "diagonal"]


@dataclass(frozen=True)
class CausalModel:
    """What a causal checkpoint was trained with.

    Attributes:
        chunk: latent frames generated at once.
        window: latent frames in reach of one attention call, the chunk included.
        timesteps: those of a model distilled to few steps, out of 1000; None = a model that integrates the flow.
        shift: of the distilled timesteps.
        guidance: default guidance scale; 1 where guidance is distilled in.
        steps: default number of steps of an undistilled model; None = the pipeline's.
    """

    chunk: int = 3
    window: int = 21
    timesteps: tuple[float, ...] | None = None
    shift: float = 5.0
    guidance: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.chunk <= self.window:
            raise ValueError(f"a causal model needs 1 <= chunk <= window, got chunk={self.chunk}, window={self.window}")


@dataclass(frozen=True)
class Method:
    """One method. Sizes are latent frames at `published` frames of window, or chunks where it says so.

    Attributes:
        name, source: as people know it.
        cached: keys and values of clean frames are kept (causal checkpoints); otherwise every pass sees its whole
            window anew (ordinary checkpoints).
        schedule: see schedules.py.
        published: the window that the sizes below belong to.
        sink: frames kept for ever.
        window: frames in reach; None = the model's own.
        budget, recent: of participation; None = first in, first out.
        positions: policy by name.
        lag: passes between chunks; None = all steps of a chunk.
        rolls: as many chunks as the window holds, besides sink and one finished chunk, are denoised jointly; the lag
            follows (1 for the published five steps in a window of 21).
        chunk: frames a chunk where the model does not say.
        overlap: share of the window that a next window repeats.
        prefix: the repeated frames are shown "clean" at timestep 0, or "noised" to the level of the rest.
        interpolates: slow temporal frequencies are stretched to the window (FLEX).
        correlation: of the noise of neighbouring frames.
        recache: on a prompt switch the window's keys and values are computed anew.
    """

    name: str
    source: str
    cached: bool
    schedule: Schedule
    published: int = 21
    sink: int = 0
    window: int | None = None
    budget: int | None = None
    recent: int | None = None
    positions: str = "absolute"
    lag: int | None = None
    rolls: bool = False
    chunk: int = 3
    overlap: float = 0.5
    prefix: Literal["clean", "noised"] = "clean"
    interpolates: bool = False
    correlation: float = 0.0
    recache: bool = True


_CACHED: dict[str, Any] = {"cached": True, "schedule": "staircase"}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("self-forcing", "Self-Forcing (arXiv 2506.08009), rolling window", **_CACHED),
        Method("streaming-llm", "StreamingLLM (arXiv 2309.17453)", sink=3, positions="index", **_CACHED),
        Method("longlive", "LongLive (arXiv 2509.22622)", published=12, sink=3, **_CACHED),
        Method("longlive-infinite", "LongLive 2, infinite mode", published=12, sink=3, positions="index", **_CACHED),
        Method(
            "deep-forcing",
            "Deep Forcing (arXiv 2512.05081)",
            sink=10,
            budget=16,
            recent=4,
            positions="sink-realigned",
            **_CACHED,
        ),
        Method(
            "rolling-forcing",
            "Rolling Forcing (arXiv 2509.25161)",
            sink=3,
            positions="sink-before-window",
            rolls=True,
            **_CACHED,
        ),
        Method(
            "flex",
            "FLEX (arXiv 2602.14027) at inference, after its abstract",
            sink=3,
            positions="index",
            interpolates=True,
            correlation=-0.7,
            **_CACHED,
        ),
        Method("windows", "sliding windows, the overlap kept", cached=False, schedule="lockstep"),
        Method(
            "diffusion-forcing",
            "Diffusion Forcing (arXiv 2407.01392), SkyReels-V2 (arXiv 2504.13074)",
            cached=False,
            schedule="staircase",
        ),
        Method("fifo", "FIFO-Diffusion (arXiv 2405.11473)", cached=False, schedule="diagonal"),
    )
}


def find_method(name: str, causal: CausalModel | None) -> Method:
    """A method by name; hyphens and underscores are alike.

    Raises:
        ValueError: unknown, or one that needs a causal model where there is none.
    """
    wanted = name.replace("_", "-").lower()
    if wanted == "auto":
        wanted = "windows" if causal is None else "streaming-llm"
    if wanted not in METHODS:
        raise ValueError(f"unknown streaming method {name!r}; allowed: auto, {', '.join(METHODS)}")
    method = METHODS[wanted]
    if method.cached and causal is None:
        others = ", ".join(found.name for found in METHODS.values() if not found.cached)
        raise ValueError(
            f"method {method.name!r} keeps a cache, which only a causal model can use, and this one is not known to be "
            f"one; allowed: {others}; for a causal checkpoint give causal=CausalModel(chunk=..., window=...)"
        )
    return method


@dataclass(frozen=True)
class Plan:
    """A method with all sizes settled, in latent frames."""

    method: Method
    chunk: int
    window: int
    sink: int
    overlap: int
    lag: int | None
    budget: int | None = None
    recent: int | None = None
    max_reuse: int = 7
    per_head: bool = False
    lookahead: bool = True
    #: cached models: chunks that are denoised at once
    unfinished: int = 1

    @property
    def draft(self) -> int:
        """Most frames that a pass denoises."""
        return self.chunk * self.unfinished


def settle(
    method: Method, trained: int, causal: CausalModel | None, steps: int, frames: int | None, **given: Any
) -> Plan:
    """Sizes of a method on a model that was trained on `trained` latent frames.

    Args:
        given: chunk, window, sink, overlap, lag, budget, recent, max_reuse, per_head, lookahead; None = the method's.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    named = {name: value for name, value in given.items() if value is not None}
    for name in ("chunk", "window", "sink", "overlap", "lag", "budget", "recent"):
        if name in named and (isinstance(named[name], bool) or not isinstance(named[name], int) or named[name] < 0):
            raise ValueError(f"{name} must be a whole number of latent frames, got {named[name]!r}")
    if named.get("per_head") and method.budget is None:
        choosing = ", ".join(found.name for found in METHODS.values() if found.budget is not None)
        raise ValueError(f"method {method.name!r} evicts by age, so heads have nothing to choose; allowed: {choosing}")
    window = named.get("window", trained if causal is None else causal.window)
    chunk = named.get("chunk", method.chunk if causal is None else causal.chunk)
    if window < 1 or not 1 <= chunk <= window:
        raise ValueError(f"streaming needs 1 <= chunk <= window latent frames, got chunk={chunk}, window={window}")
    lag = named.get("lag", method.lag)
    if not method.cached and method.schedule == "staircase" and lag is None:
        lag = -(-steps // max(1, window // chunk))
    ratio = window / method.published
    sink = named.get("sink", _whole_chunks(method.sink * ratio, chunk) if method.budget is None else None)
    if method.rolls and lag is None:
        lag = -(-steps // _rolling_chunks(window - (sink or 0), chunk))
    unfinished = -(-steps // lag) if method.cached and lag else 1
    plan = Plan(
        method,
        chunk,
        window,
        sink=round(method.sink * ratio) if sink is None else sink,
        overlap=named.get("overlap", max(1, round(method.overlap * window))),
        lag=lag,
        unfinished=unfinished,
        max_reuse=named.get("max_reuse", 7),
        per_head=named.get("per_head", False),
        lookahead=named.get("lookahead", True),
    )
    if method.budget is None:
        return plan
    assert method.recent is not None
    recent = named.get("recent", max(chunk + 1, round(method.recent * ratio)))
    budget = named.get("budget", max(plan.sink + recent + 1, round(method.budget * ratio)))
    return replace(plan, budget=min(budget, window), recent=recent)


def _rolling_chunks(room: int, chunk: int) -> int:
    """Chunks that are denoised jointly in so many frames: one finished chunk is kept before them if two remain."""
    chunks = room // chunk
    return max(1, chunks - 1 if chunks > 2 else chunks)


def _whole_chunks(frames: float, chunk: int) -> int:
    """A sink of whole chunks, at least one where there is a sink at all."""
    return chunk * max(1, round(frames / chunk)) if frames else 0
