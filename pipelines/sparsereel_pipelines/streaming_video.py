"""A Wan pipeline that makes video of any length, chunk by chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

import sparsereel
from sparsereel_pipelines.built_on import class_on_top


class StreamingVideoPipeline(WanPipeline):  # type: ignore[misc]  # diffusers is untyped
    """`WanPipeline` whose calls stream: a call collects, `stream` gives chunks as they come.

    Attributes:
        causal: a `sparsereel.stream.methods.CausalModel` where the transformer was trained causally; None = ordinary.
    """

    causal: Any = None

    def stream(self, prompt: Any, **arguments: Any) -> Any:
        """An iterator of uint8 frames (F, H, W, 3); arguments as `sparsereel.stream`."""
        return sparsereel.stream(self, prompt, **arguments)

    def __call__(
        self,
        prompt: Any,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        max_sequence_length: int | None = None,
        **options: Any,
    ) -> Any:
        """Stream a clip and return it whole, as `WanPipeline` does.

        Args:
            prompt: one prompt, or switches as for `sparsereel.stream`.
            num_frames: any number; None = the trained length.
            generator: its seed is the stream's seed.
            output_type: "np" (floats in [0, 1]), "pt" (likewise, (F, 3, H, W)), "pil" or "latent".
            options: further arguments of `sparsereel.stream`, such as method or window.

        Raises:
            ValueError: what `sparsereel.stream` refuses, or an unknown output type.
        """
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"output_type must be np, pt, pil or latent, got {output_type!r}")
        from sparsereel.families.call_defaults import call_default

        chunks = self.stream(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            frames=num_frames or call_default(self, "num_frames", 81),
            steps=num_inference_steps,
            guidance=guidance_scale,
            seed=0 if generator is None else generator.initial_seed(),
            prompt_tokens=max_sequence_length,
            output="latents" if output_type == "latent" else "frames",
            **options,
        )
        frames = self._joined(list(self.progress_bar(chunks)), output_type)
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    @staticmethod
    def _joined(chunks: list[Any], output_type: str) -> Any:
        if output_type == "latent":
            return torch.cat(chunks, dim=1).unsqueeze(0)
        frames = np.concatenate(chunks)
        if output_type == "pil":
            from PIL import Image

            return [[Image.fromarray(frame) for frame in frames]]
        floats = (frames.astype(np.float32) / 255)[None]
        return floats if output_type == "np" else torch.from_numpy(floats).permute(0, 1, 4, 2, 3)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """The parts of a loaded Wan pipeline, shared with it; see diffusers' `DiffusionPipeline.from_pipe`.

        Raises:
            ValueError: not a Wan pipeline.
        """
        found = class_on_top(cls, pipeline)
        made = super(StreamingVideoPipeline, found).from_pipe(pipeline, **kwargs)
        made.causal = getattr(pipeline, "causal", None)
        return made
