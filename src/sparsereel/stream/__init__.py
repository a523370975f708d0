"""Video without end in the memory of one window.

    for frames in sparsereel.stream(pipe, "a cat surfing", seconds=60):    # uint8 (F, H, W, 3)
        writer.append(frames)

A method is a row of `methods.METHODS`: a table of passes (schedules.py) and, for causal models, a rolling cache with a
sink, an eviction, a position and a write policy (cache.py). This file imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sparsereel.stream.methods import CausalModel
    from sparsereel.stream.roles import HeadRoles
    from sparsereel.stream.session import Stream


def stream(
    pipe: Any,
    prompt: Any,
    *,
    frames: int | None = None,
    seconds: float | None = None,
    method: str = "auto",
    causal: CausalModel | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    fps: float = 16,
    output: Literal["frames", "latents"] = "frames",
    storage: Literal["full", "int8", "fp8"] = "full",
    refresh_sink: bool = False,
    head_roles: HeadRoles | str | Path | None = None,
    prompt_tokens: int | None = None,
    resume: str | Path | None = None,
    chunk: int | None = None,
    window: int | None = None,
    sink: int | None = None,
    overlap: int | None = None,
    lag: int | None = None,
    budget: int | None = None,
    recent: int | None = None,
    max_reuse: int | None = None,
    per_head: bool | None = None,
    lookahead: bool | None = None,
) -> Stream:
    """Generate video chunk by chunk, of any length, in constant memory.

    Args:
        pipe: a diffusers text-to-video pipeline of a Wan transformer (SkyReels-V2 for methods without a cache). It is
            left as it is: between chunks it can be called as before.
        prompt: a text; a list of (seconds, text) that take over one after another; or an iterable of such pairs or of
            texts, asked on the way. A switch takes effect with the first chunk that begins at or after its time.
        frames, seconds: length; neither = no end.
        method: "auto", one for causal models ("self-forcing", "streaming-llm", "longlive", "longlive-infinite",
            "deep-forcing", "rolling-forcing", "flex") or one for ordinary ones ("windows", "diffusion-forcing",
            "fifo"). docs/streaming.md says what each does.
        causal: what a causal checkpoint was trained with; None = as the pipeline says (`pipe.causal`).
        height, width, steps, guidance: None = the pipeline's own.
        seed: of all noise, which depends on it, the frame and the step only.
        output: "latents" gives float32 latents (C, F, h, w), not scaled for the VAE.
        storage: of cached keys and values.
        refresh_sink: a prompt switch also renews the sink; otherwise the old scene stays an anchor.
        head_roles: heads that need only sink and recent frames, or the path of a YAML file that says which; see
            `sparsereel.stream.roles` and, to measure them, `sparsereel.stream.role_meter.measure_roles`.
        prompt_tokens: length that prompts are padded to; None = as the pipeline's call does.
        resume: a checkpoint that `Stream.save` wrote; the other arguments must be as they were.
        chunk, window, sink, overlap, lag, budget, recent: sizes in latent frames instead of the method's.
        max_reuse: Deep Forcing's cap on how often a token survives; 0 = none, as in the paper.
        per_head: Deep Forcing: every head keeps middle tokens of its own choice, instead of the layer's.
        lookahead: FIFO: each frame is denoised behind cleaner ones, at twice the cost.

    Returns:
        An iterator; `.save(path)` writes a checkpoint at any time between two chunks.

    Raises:
        ValueError: what cannot work, in one sentence that says what is allowed. While iterating: the source of prompts
            failed; everything before was given out.
    """
    from sparsereel.stream.start import start

    sizes = {"chunk": chunk, "window": window, "sink": sink, "overlap": overlap, "lag": lag, "budget": budget}
    return start(
        pipe,
        prompt,
        frames=frames,
        seconds=seconds,
        method=method,
        causal=causal,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        seed=seed,
        fps=fps,
        output=output,
        storage=storage,
        refresh_sink=refresh_sink,
        head_roles=head_roles,
        prompt_tokens=prompt_tokens,
        resume=resume,
        sizes={**sizes, "recent": recent, "max_reuse": max_reuse, "per_head": per_head, "lookahead": lookahead},
    )
