"""MiniReelPipeline: diffusers' `WanPipeline` with the defaults and the checks of the model in the box."""

from __future__ import annotations

import re
import warnings
from typing import Any

from diffusers import WanPipeline

from sparsereel.minireel.sizes import NATIVE, check_size

# The text encoder was trained on prompts padded to this length; longer padding dilutes the words.
PROMPT_TOKENS = 16


class MiniReelPipeline(WanPipeline):  # type: ignore[misc]  # diffusers is untyped
    """`WanPipeline` whose call defaults are minireel's native size, frames, steps and guidance.

    Every argument of `WanPipeline.__call__` works unchanged; only the defaults differ. Sizes may be multiples of 8
    (stock `WanPipeline` asks for 16), since this model's patch is a single latent cell.

    Raises:
        ValueError: num_frames is not 4k + 1, or height or width no multiple of 8; the nearest valid value is named.
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = NATIVE.height,
        width: int = NATIVE.width,
        num_frames: int = NATIVE.frames,
        num_inference_steps: int = NATIVE.steps,
        guidance_scale: float = NATIVE.guidance,
        *args: Any,
        max_sequence_length: int = PROMPT_TOKENS,
        **kwargs: Any,
    ) -> Any:
        check_size(num_frames, height, width)
        self._warn_of_unknown_words(prompt)
        return super().__call__(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            guidance_scale,
            *args,
            max_sequence_length=max_sequence_length,
            **kwargs,
        )

    def check_inputs(self, prompt: Any, negative_prompt: Any, height: int, width: int, *args: Any, **kw: Any) -> None:
        """Stock checks, except that the size was already checked here (stock insists on multiples of 16)."""
        super().check_inputs(prompt, negative_prompt, 16, 16, *args, **kw)

    def _warn_of_unknown_words(self, prompt: str | list[str] | None) -> None:
        prompts = [prompt] if isinstance(prompt, str) else prompt or []
        words = {word for text in prompts if isinstance(text, str) for word in re.findall(r"\w+", text.lower())}
        unknown = sorted(word for word in words if self.tokenizer.unk_token_id in self.tokenizer(word).input_ids)
        if unknown:
            vocabulary = ", ".join(word for word in sorted(self.tokenizer.get_vocab()) if word.isalnum())
            warnings.warn(f"minireel does not know: {', '.join(unknown)}. It knows: {vocabulary}.", stacklevel=3)
