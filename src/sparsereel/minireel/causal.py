"""The causal minireel: the same pipeline parts around a transformer that was fine-tuned to go on from a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

from sparsereel.minireel.loading import load_folder
from sparsereel.minireel.pipeline import MiniReelPipeline
from sparsereel.minireel.rollout import CHUNK_FRAMES, WINDOW_FRAMES, roll_out
from sparsereel.minireel.sizes import NATIVE, TEMPORAL_COMPRESSION, check_size


class CausalMiniReelPipeline(MiniReelPipeline):
    """minireel that makes a video chunk by chunk, of any length.

    `chunk_frames` latent frames are made at a time and see `window_frames` with themselves; the clean chunks before
    them come from a cache of keys and values, with positions that count from the first frame in the window. A call
    makes a whole video by the plain rollout in `sparsereel.minireel.rollout`.
    """

    chunk_frames = CHUNK_FRAMES
    window_frames = WINDOW_FRAMES

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str],
        height: int = NATIVE.height,
        width: int = NATIVE.width,
        num_frames: int = NATIVE.frames,
        num_inference_steps: int = NATIVE.steps,
        guidance_scale: float = NATIVE.guidance,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sink_frames: int = CHUNK_FRAMES,
        output_type: str = "np",
    ) -> Any:
        """Make videos of `num_frames` frames (4k + 1): as many chunks as hold them, cut to length.

        Args:
            prompt: One or several.
            height, width: Pixels, multiples of 8.
            num_frames: Frames of each video.
            num_inference_steps, guidance_scale: Of every chunk.
            generator: One for all videos or one for each; draws on the CPU.
            sink_frames: Latent frames of the start that stay in the window.
            output_type: "np" or "pt" frames, or "latent".

        Raises:
            ValueError: a size, sink or output type that is not allowed.
        """
        check_size(num_frames, height, width)
        if output_type not in ("np", "pt", "latent"):
            raise ValueError(f"output_type must be np, pt or latent, got {output_type!r}.")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._warn_of_unknown_words(prompts)
        if generator is not None and not isinstance(generator, list):
            generator = [generator] * len(prompts)
        if generator is not None and len(generator) != len(prompts):
            raise ValueError(f"Give one generator or one a prompt; got {len(generator)} for {len(prompts)} prompts.")
        frames = (num_frames - 1) // TEMPORAL_COMPRESSION + 1
        chunks = -(-frames // CHUNK_FRAMES)
        with self.progress_bar(total=chunks) as bar:
            latents = roll_out(
                self,
                prompts,
                chunks,
                height=height,
                width=width,
                steps=num_inference_steps,
                guidance=guidance_scale,
                sink=sink_frames,
                generators=generator,
                on_chunk=lambda done: bar.update(),
            )[:, :, :frames]
        if output_type == "latent":
            return WanPipelineOutput(frames=latents)
        return WanPipelineOutput(frames=self.decode(latents, output_type))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "np") -> Any:
        """Frames of normalised latents (B, 16, F, H, W): (B, 4F - 3, 8H, 8W, 3) floats in [0, 1] as "np"."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        pixels = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
        return self.video_processor.postprocess_video(pixels, output_type=output_type)


def load_causal_folder(
    folder: Path, transformer: Path, dtype: torch.dtype, device: str | torch.device
) -> CausalMiniReelPipeline:
    """The causal transformer of one folder with the other parts of a minireel folder.

    Raises:
        ValueError: either folder lacks its files, or the dtype is not allowed.
    """
    if not (transformer / "config.json").is_file():
        raise ValueError(f"{transformer} holds no transformer: it has no config.json.")
    parts = load_folder(folder, dtype, "cpu").components
    parts["transformer"] = WanTransformer3DModel.from_pretrained(transformer, torch_dtype=dtype)
    return CausalMiniReelPipeline(**parts).to(device)
