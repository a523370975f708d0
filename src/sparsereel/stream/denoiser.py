"""One forward pass of a pipeline's transformer over frames at different noise levels, with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sparsereel.families import unwrap
from sparsereel.families.call_defaults import call_default
from sparsereel.stream.attending import cached_attention
from sparsereel.stream.cache import KVCache


class Denoiser:
    """A pipeline's transformer and text encoder.

    Args:
        guidance: classifier-free guidance scale; at most 1 = none, which halves the work.
        prompt_tokens: length that prompts are padded to; None = as the pipeline's call does.
    """

    def __init__(
        self, pipe: Any, guidance: float, negative_prompt: str | None, prompt_tokens: int | None = None
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.pipe = pipe
        self.model = unwrap(pipe.transformer)
        self.guidance = guidance
        self.negative_prompt = negative_prompt
        self.texts: list[Tensor] = []
        #: one cache a guidance branch; empty for models that see their window anew in every pass
        self.caches: list[KVCache] = []
        self.per_frame = type(self.model).__name__.startswith("SkyReelsV2")
        self.always_by_token = bool(getattr(pipe.config, "expand_timesteps", False))

    @property
    def branches(self) -> int:
        """Forward passes per prediction."""
        return 2 if self.guidance > 1 else 1

    def set_prompt(self, prompt: str) -> None:
        """Encode the prompt that all passes from now on follow."""
        # A pipeline's call and its encode_prompt may pad to different lengths; the call's is what the model knows.
        length = self.prompt_tokens or call_default(self.pipe, "max_sequence_length", 512)
        with torch.no_grad():
            found = self.pipe.encode_prompt(
                prompt,
                self.negative_prompt,
                do_classifier_free_guidance=self.branches == 2,
                max_sequence_length=length,
            )
        dtype = self.model.dtype
        self.texts = [text.to(dtype) for text in found[: self.branches]]

    def velocity(self, latents: Tensor, timesteps: Sequence[float], start: int) -> Tensor:
        """The guided prediction, float32, for latents (C, F, h, w) whose frame i is told timesteps[i]."""
        found = [self._pass(branch, latents, timesteps, start).float() for branch in range(self.branches)]
        if len(found) == 1:
            return found[0]
        return found[1] + self.guidance * (found[0] - found[1])

    def commit(self, latents: Tensor, timestep: float, start: int) -> None:
        """One pass over clean frames, for the sake of their keys and values, which become context."""
        for branch in range(self.branches):
            self._pass(branch, latents, [timestep] * latents.shape[1], start)
            self.caches[branch].commit(latents.shape[1])

    def _pass(self, branch: int, latents: Tensor, timesteps: Sequence[float], start: int) -> Tensor:
        cache = self.caches[branch] if self.caches else None
        if cache is not None:
            cache.start = start
        x = latents.unsqueeze(0).to(self.model.dtype)
        named = {"hidden_states": x, "encoder_hidden_states": self.texts[branch], "return_dict": False}
        context = nullcontext() if cache is None else cached_attention(self.model, cache)
        announced = getattr(self.model, "cache_context", None)
        # The names by which diffusers' own hooks, and plans, tell the guidance branches apart.
        label = nullcontext() if announced is None else announced(("cond", "uncond")[branch])
        with torch.no_grad(), context, label:
            return self.pipe.transformer(**named, **self._timestep(x, timesteps))[0][0]

    def _timestep(self, x: Tensor, timesteps: Sequence[float]) -> dict[str, Any]:
        given = torch.tensor(timesteps, dtype=torch.float32, device=x.device)
        uniform = len(set(timesteps)) == 1
        if self.per_frame:
            # Index 0 of the learned frame rates: the 16 a second that the models were trained on most.
            rate = {"fps": [0]} if getattr(self.model.config, "inject_sample_info", False) else {}
            if uniform:
                return {"timestep": given[:1], **rate}
            return {"timestep": given.unsqueeze(0), "enable_diffusion_forcing": True, **rate}
        if uniform and not self.always_by_token:
            return {"timestep": given[:1]}
        _, rows, columns = self.model.config.patch_size
        tokens = (x.shape[3] // rows) * (x.shape[4] // columns)
        return {"timestep": given.repeat_interleave(tokens).unsqueeze(0)}
