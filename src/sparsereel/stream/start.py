"""From the arguments of `sparsereel.stream` to a `Stream`: everything is checked before anything is computed."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsereel.families import find, unwrap
from sparsereel.families.call_defaults import call_default
from sparsereel.stream import levels as levels_of
from sparsereel.stream.decode import decoder_for
from sparsereel.stream.denoiser import Denoiser
from sparsereel.stream.engine import Engine, latent_frames
from sparsereel.stream.methods import CausalModel, Method, find_method, settle
from sparsereel.stream.noise import NoiseSource
from sparsereel.stream.prompts import Prompts
from sparsereel.stream.roles import HeadRoles, load_roles
from sparsereel.stream.session import OUTPUTS, Output, Stream, fingerprint
from sparsereel.stream.storage import KINDS, Kind

#: transformers that take one timestep a token or a frame, and so can be streamed
MODELS = ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel")
CACHED_MODELS = ("WanTransformer3DModel",)
#: why models that were trained to go on for ever, but not with a cache like ours, are refused
OWN_MEMORY = {
    "AnyFlowFARTransformer3DModel": "it goes on from a cache of its own, whose older chunks are stored at a coarser "
    "patch size, and takes two timesteps a frame",
    "HeliosTransformer3DModel": "it is shown its history anew at three patch sizes instead of keeping a cache",
}


def start(
    pipe: Any,
    prompt: Any,
    *,
    frames: int | None,
    seconds: float | None,
    method: str,
    causal: CausalModel | None,
    height: int | None,
    width: int | None,
    steps: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    seed: int,
    fps: float,
    output: Output,
    storage: Kind,
    refresh_sink: bool,
    head_roles: HeadRoles | str | Path | None,
    prompt_tokens: int | None,
    resume: str | Path | None,
    sizes: dict[str, Any],
) -> Stream:
    """See `sparsereel.stream`."""
    causal = causal or _known_causal(pipe)
    chosen = find_method(method, causal)
    model = _model(pipe, chosen)
    if output not in OUTPUTS:
        raise ValueError(f"unknown output {output!r}; allowed: {', '.join(OUTPUTS)}")
    if storage not in KINDS:
        raise ValueError(f"unknown cache storage {storage!r}; allowed: {', '.join(KINDS)}")
    if not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"fps must be a positive number, got {fps}")
    roles = _roles(head_roles, model, chosen)
    total = _length(frames, seconds, fps)
    size = _size(pipe, model, height, width)
    ratio = int(pipe.vae_scale_factor_temporal)
    latents = None if total is None else latent_frames(total, ratio)
    trained = latent_frames(call_default(pipe, "num_frames", 81), ratio)
    overrides = {name: value for name, value in sizes.items() if value is not None}
    levels = _levels(pipe, chosen, causal, steps, overrides.get("window", trained))
    plan = settle(chosen, trained, causal, levels.steps, latents, **overrides)
    scale = _guidance(pipe, causal, guidance)
    denoiser = Denoiser(pipe, scale, negative_prompt, prompt_tokens)
    prompts = Prompts(prompt, None if total is None else total / fps)
    noise = NoiseSource(seed, (model.config.in_channels, *size), chosen.correlation, plan.chunk)
    engine = Engine(
        denoiser,
        levels,
        plan,
        noise,
        latents,
        trained,
        storage=storage,
        refresh_sink=refresh_sink,
        roles=roles,
    )
    settings = {
        "model": fingerprint(model),
        "prompt": prompt if isinstance(prompt, str | list) else "generated",
        "frames": total,
        "fps": fps,
        "size": [pixels * int(pipe.vae_scale_factor_spatial) for pixels in size],
        "method": chosen.name,
        "plan": {name: value for name, value in asdict(plan).items() if name != "method"},
        "sigmas": [round(float(sigma), 6) for sigma in levels.sigmas],
        "sampler": levels.sampler,
        "guidance": scale,
        "negative_prompt": negative_prompt,
        "prompt_tokens": prompt_tokens,
        "seed": seed,
        "output": output,
        "storage": storage,
        "refresh_sink": refresh_sink,
        "head_roles": None if roles is None else [sorted(roles.streaming.items()), roles.recent],
    }
    stream = Stream(engine, decoder_for(pipe.vae), prompts, settings, frames=total, ratio=ratio, fps=fps, output=output)
    if resume is not None:
        stream.load(Path(resume))
    return stream


def _known_causal(pipe: Any) -> CausalModel | None:
    """What a pipeline says about itself: a `causal` attribute, or the causal minireel's own two."""
    if hasattr(pipe, "chunk_frames") and hasattr(pipe, "window_frames"):
        return CausalModel(int(pipe.chunk_frames), int(pipe.window_frames))
    found = getattr(pipe, "causal", None)
    return found if isinstance(found, CausalModel) else None


def _model(pipe: Any, method: Method) -> Any:
    """The transformer to stream with.

    Raises:
        ValueError: no pipeline, a model that cannot be streamed, or one in a state that does not go with the method.
    """
    model = unwrap(getattr(pipe, "transformer", None))
    name = type(model).__name__
    if model is None or not hasattr(pipe, "encode_prompt") or not hasattr(pipe, "vae"):
        raise ValueError(f"stream needs a diffusers text-to-video pipeline, got {type(pipe).__name__}")
    if name in OWN_MEMORY:
        raise ValueError(
            f"{type(pipe).__name__} cannot be streamed: {OWN_MEMORY[name]}; call the pipeline itself for long videos"
        )
    if getattr(model.config, "num_frame_per_block", 1) > 1:
        raise ValueError(
            f"{name} has num_frame_per_block={model.config.num_frame_per_block}, for which diffusion-forcing masks "
            "whole blocks inside the model; set it to 1 (diffusers' default) to stream"
        )
    allowed = CACHED_MODELS if method.cached else MODELS
    if name not in allowed:
        raise ValueError(
            f"{type(pipe).__name__} cannot be streamed with {method.name!r}: its {name} is not of the kind that takes "
            f"one timestep a frame{' and whose keys can be cached' if method.cached else ''}; allowed: "
            f"{', '.join(allowed)}"
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError("pipelines with two transformers, one for high and one for low noise, cannot be streamed")
    if model.config.in_channels != model.config.out_channels:
        raise ValueError("models that are conditioned on an image through extra channels cannot be streamed")
    if method.cached and hasattr(model, "_sparsereel_injection"):
        raise ValueError(
            f"method {method.name!r} puts its cache where this pipeline's sparse attention is; call "
            "sparsereel.restore(pipe) first"
        )
    if find(model) is None:
        raise ValueError(f"{name} is of no known family")
    return model


def _roles(given: HeadRoles | str | Path | None, model: Any, method: Method) -> HeadRoles | None:
    if given is not None and not method.cached:
        raise ValueError(f"method {method.name!r} keeps no cache, so heads have no roles in it")
    if given is None or isinstance(given, HeadRoles):
        return given
    return load_roles(given, model.config.num_layers, model.config.num_attention_heads)


def _length(frames: int | None, seconds: float | None, fps: float) -> int | None:
    """Frames to make; None = no end."""
    if frames is not None and seconds is not None:
        raise ValueError("give frames or seconds, not both")
    if frames is not None:
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ValueError(f"frames must be a whole number of at least 1, got {frames!r}")
        return frames
    if seconds is None:
        return None
    if not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"seconds must be a positive number, got {seconds}")
    return max(1, round(seconds * fps))


def _size(pipe: Any, model: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Latent height and width."""
    patch = tuple(model.config.patch_size)
    if patch[0] != 1:
        raise ValueError(f"streaming needs a model with one latent frame a token, this one has {patch[0]}")
    found = []
    for name, given, across in (("height", height, patch[1]), ("width", width, patch[2])):
        pixels = call_default(pipe, name, None) if given is None else given
        unit = int(pipe.vae_scale_factor_spatial) * across
        if pixels is None or isinstance(pixels, bool) or pixels < unit or pixels % unit:
            raise ValueError(f"{name} must be a positive multiple of {unit} pixels, got {pixels}")
        found.append(pixels // int(pipe.vae_scale_factor_spatial))
    return found[0], found[1]


def _guidance(pipe: Any, causal: CausalModel | None, given: float | None) -> float:
    if given is not None:
        if not math.isfinite(given):
            raise ValueError(f"guidance must be a number, got {given}")
        return given
    if causal is not None and causal.guidance is not None:
        return causal.guidance
    return float(call_default(pipe, "guidance_scale", 5.0))


def _levels(pipe: Any, method: Method, causal: CausalModel | None, steps: int | None, window: int) -> levels_of.Levels:
    """The noise levels of this stream."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if causal is not None and causal.timesteps is not None:
        if steps is not None and steps != len(causal.timesteps):
            raise ValueError(
                f"this model was distilled to {len(causal.timesteps)} steps at {causal.timesteps}; leave steps out"
            )
        return levels_of.distilled_levels(causal.timesteps, causal.shift)
    count = steps or (causal.steps if causal is not None else None) or call_default(pipe, "num_inference_steps", 50)
    if method.schedule == "diagonal" and steps is None:
        count = window * max(1, round(count / window))
    return levels_of.scheduler_levels(pipe.scheduler, int(count))
