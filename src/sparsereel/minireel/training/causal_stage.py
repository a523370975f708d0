"""Fine-tune the transformer for causal, chunk-wise generation; text encoder and VAE stay as they are."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5EncoderModel

from sparsereel.minireel.training.causal_flow import chunk_loss, use_chunks
from sparsereel.minireel.training.clip_sets import PROMPT_TOKENS, EncodedSet
from sparsereel.minireel.training.flow_matching import embed_text, sample_noise_levels
from sparsereel.minireel.training.layouts import CHUNK_FRAMES, Layout
from sparsereel.minireel.training.recipe import Portion, Stage
from sparsereel.minireel.training.transformer_stage import DROPPED_PROMPTS, TransformerTrainer

CONTEXT_NOISE = 0.12
NOISED_CONTEXTS = 0.5
# Of the first and the second noisy copy in every layout.
HELD_OUT_LEVELS = (0.5, 0.85)


class CausalTrainer(TransformerTrainer):
    """The causal stage's training state; arguments as `TransformerTrainer`'s, every portion with a layout."""

    def __init__(
        self,
        stage: Stage,
        sets: dict[str, EncodedSet],
        transformer: WanTransformer3DModel,
        text_encoder: UMT5EncoderModel,
        seed: int = 0,
        compiled: bool = False,
    ):
        super().__init__(stage, sets, transformer, text_encoder.requires_grad_(False), seed, compiled)
        use_chunks(self.worker)
        self.text_encoder.eval()
        if compiled:
            # A graph for each layout, with and without gradients; torch's own limit is 8.
            torch._dynamo.config.recompile_limit = 32

    def _loss(self, portion: Portion) -> torch.Tensor:
        data, generator, layout = self.sets[portion.clips.name], self.generator, self._layout(portion)
        chosen = torch.randint(len(data.latents), (portion.batch,), generator=generator).tolist()
        clean = torch.stack(
            [data.latents[index][:, layout.draw(data.latents.shape[2], generator)].float() for index in chosen]
        )
        dropped = torch.rand(portion.batch, 1, generator=generator) < DROPPED_PROMPTS
        with torch.no_grad():
            own = data.ids[chosen], data.mask[chosen]
            ids, mask = (torch.where(dropped, none, given) for none, given in zip(self.no_prompt, own, strict=True))
            text = embed_text(self.text_encoder, ids, mask, PROMPT_TOKENS)
        shape = portion.batch, layout.chunks
        levels = sample_noise_levels(shape[0] * shape[1], generator, portion.shift)
        # Drawn in rising order; shuffled, or a clip's later chunks would always be the noisier ones.
        levels = levels[torch.randperm(len(levels), generator=generator)].view(shape)
        noise = torch.randn(clean.shape, generator=generator)
        return chunk_loss(self.worker, clean, noise, levels, text, layout, self._context_levels(portion)).mean()

    def _context_levels(self, portion: Portion) -> torch.Tensor:
        shape = portion.batch, self._layout(portion).clean // CHUNK_FRAMES
        levels = CONTEXT_NOISE * torch.rand(shape, generator=self.generator)
        return torch.where(torch.rand(shape, generator=self.generator) < NOISED_CONTEXTS, levels, 0.0)

    @staticmethod
    def _layout(portion: Portion) -> Layout:
        if portion.layout is None:
            raise ValueError(f"A portion of the causal stage ({portion.clips.name}) has no layout.")
        return portion.layout

    @torch.no_grad()
    def held_out_losses(self, data: EncodedSet) -> dict[str, float]:
        """Loss of the stage's result on unseen clips for each layout, first and last noisy chunk apart.

        The same frames and noise every time; mean over two noise levels.
        """
        result: dict[str, float] = {}
        with self.use_result():
            text = embed_text(self.text_encoder, data.ids, data.mask, PROMPT_TOKENS)
            for layout in dict.fromkeys(self._layout(portion) for portion in self.stage.portions):
                generator = torch.Generator().manual_seed(7)
                clean = data.latents[:, :, layout.draw(data.latents.shape[2], generator)].float()
                noise = torch.randn(clean.shape, generator=generator)
                at = torch.tensor(HELD_OUT_LEVELS).repeat_interleave(layout.chunks // len(HELD_OUT_LEVELS))
                losses = chunk_loss(self.worker, clean, noise, at.expand(len(clean), -1), text, layout).mean(0)
                losses = losses.unflatten(0, (len(HELD_OUT_LEVELS), -1)).mean(0)
                result[f"{layout.name} first"], result[f"{layout.name} last"] = losses[0].item(), losses[-1].item()
        return result
