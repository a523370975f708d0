"""The plain rollout of the causal minireel: chunk by chunk, each denoised against a cache of the clean ones before it.

This is the reference the streaming engine is held to, and what the model card's scores come from: no cache policy but a
fixed sink and a sliding window, no reuse of memory, one tensor a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention

CHUNK_FRAMES = 3
WINDOW_FRAMES = 9


class ChunkCache:
    """Keys (not rotated) and values of the clean frames in the window, for every self-attention layer.

    Args:
        model: The causal transformer; `attached` makes its self-attention use the cache.
        cells: Tokens of a latent frame, (height, width).
        window: Latent frames in the window, those of the current chunk included.
        sink: Of these, how many of the video's first frames stay for good; the others slide.
    """

    def __init__(self, model: WanTransformer3DModel, cells: tuple[int, int], window: int, sink: int):
        if not 0 <= sink <= window - CHUNK_FRAMES:
            raise ValueError(f"sink must lie in 0..{window - CHUNK_FRAMES} beside a window of {window}, got {sink}.")
        self.model, self.window, self.sink = model, window, sink
        self.per_frame = cells[0] * cells[1]
        self.rotary = model.rope(torch.empty(1, 1, window, *cells, device=model.device))
        self.layers = [_Layer(self) for _ in model.blocks]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While entered, the model's self-attention reads the cache; its own processors come back afterwards."""
        own = [block.attn1.processor for block in self.model.blocks]
        try:
            for block, layer in zip(self.model.blocks, self.layers, strict=True):
                block.attn1.set_processor(layer)
            yield
        finally:
            for block, processor in zip(self.model.blocks, own, strict=True):
                block.attn1.set_processor(processor)

    def keep(self) -> None:
        """Take the chunk of the last forward pass into the cache and drop what the next chunk leaves no room for."""
        for layer in self.layers:
            layer.keep()


class _Layer:
    """Attention processor of one layer; positions count from the first frame in the window."""

    def __init__(self, cache: ChunkCache):
        self.cache = cache
        self.past: tuple[torch.Tensor, torch.Tensor] | None = None
        self.current: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self,
        attention: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:
        q = attention.norm_q(attention.to_q(hidden_states)).unflatten(2, (attention.heads, -1))
        k = attention.norm_k(attention.to_k(hidden_states)).unflatten(2, (attention.heads, -1))
        v = attention.to_v(hidden_states).unflatten(2, (attention.heads, -1))
        self.current = k, v
        if self.past is not None:
            k, v = torch.cat([self.past[0], k], 1), torch.cat([self.past[1], v], 1)
        q, k = self._rotate(q, k.shape[1]), self._rotate(k, k.shape[1])
        seen = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attention.to_out[1](attention.to_out[0](seen.transpose(1, 2).flatten(2, 3)))

    def _rotate(self, x: torch.Tensor, stop: int) -> torch.Tensor:
        """(B, N, H, D) turned by the angles of the N positions before `stop`."""
        cosine, sine = (table[:, stop - x.shape[1] : stop] for table in self.cache.rotary)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cosine[..., 0::2], sine[..., 1::2]
        return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2).type_as(x)

    def keep(self) -> None:
        if self.current is None:
            raise ValueError("There is no forward pass to keep a chunk of.")
        past = [self.current] if self.past is None else [self.past, self.current]
        room = (self.cache.window - CHUNK_FRAMES) * self.cache.per_frame
        sink = self.cache.sink * self.cache.per_frame
        self.past = tuple(_slide(torch.cat(parts, 1), sink, room) for parts in zip(*past, strict=True))  # type: ignore[assignment]
        self.current = None


def _slide(tokens: torch.Tensor, sink: int, room: int) -> torch.Tensor:
    """The first `sink` tokens of (B, N, H, D) and the latest others, `room` together."""
    if tokens.shape[1] <= room:
        return tokens
    return torch.cat([tokens[:, :sink], tokens[:, tokens.shape[1] - (room - sink) :]], 1)


@torch.no_grad()
def roll_out(
    pipeline: Any,
    prompts: list[str],
    chunks: int,
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    window: int = WINDOW_FRAMES,
    sink: int = CHUNK_FRAMES,
    generators: list[torch.Generator] | None = None,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Latents (B, 16, 3 * chunks, height / 8, width / 8), fp32 and normalised as the transformer sees them.

    Args:
        pipeline: A pipeline with the causal transformer, see `sparsereel.minireel.load_causal`.
        prompts: One a video.
        chunks: Chunks of three latent frames to make.
        height, width: Pixels, multiples of 8.
        steps, guidance: Of every chunk.
        window, sink: Latent frames, see `ChunkCache`.
        generators: One a video, on the CPU, or None.
        on_chunk: Told how many chunks are done.
    """
    model, device = pipeline.transformer, pipeline.transformer.device
    cells = height // 8, width // 8
    text = torch.cat(pipeline.encode_prompt(prompts, "", True, max_sequence_length=16, device=device))
    text = text.to(model.dtype)
    cache = ChunkCache(model, cells, window, sink)
    shape = (16, CHUNK_FRAMES, *cells)
    generators = generators or [torch.Generator().manual_seed(torch.seed() % 2**63) for _ in prompts]
    done = []
    with cache.attached():
        for index in range(chunks):
            noise = [torch.randn(shape, generator=generator) for generator in generators]
            latents = torch.stack(noise).to(device)
            pipeline.scheduler.set_timesteps(steps, device=device)
            for timestep in pipeline.scheduler.timesteps:
                both = torch.cat([latents, latents]).to(model.dtype)
                at = timestep.expand(len(both))
                asked, free = model(both, at, text, return_dict=False)[0].float().chunk(2)
                velocity = free + guidance * (asked - free)
                latents = pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            done.append(latents)
            # The cache holds what the finished chunk looks like at noise level 0.
            model(torch.cat([latents, latents]).to(model.dtype), torch.zeros(2 * len(prompts), device=device), text)
            cache.keep()
            on_chunk(index + 1)
    return torch.cat(done, 2)
