"""Train U-Net and text encoder on cached latents: v-prediction, any prompt left out now and then.

Muon moves the matrices and kernels, AdamW the rest; what the stage ships is the moving average of the weights.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from sparsereel.ministill.training import recipe
from sparsereel.ministill.training.architecture import build_scheduler, tokenise
from sparsereel.ministill.training.pictures import EncodedSet
from sparsereel.ministill.training.trainer import MuonTrainer

HELD_OUT_LEVELS = (200, 500, 800, 950)


class UNetTrainer(MuonTrainer):
    """The stage's training state.

    Args:
        data: What to train on.
        close_ups: What joins it later, see `recipe.CLOSE_AFTER`; None = nothing.
        unet, text_encoder: fp32 models; trained in place.
        seed: Of everything random in the stage.
        batch: Pictures a step.
        close_after: The first step with close-ups.
    """

    def __init__(
        self,
        data: EncodedSet,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        seed: int = 0,
        batch: int = recipe.BATCH,
        close_ups: EncodedSet | None = None,
        close_after: int = recipe.CLOSE_AFTER,
    ):
        self.data, self.batch = data, batch
        self.close_ups, self.close_after = close_ups, close_after
        self.unet, self.text_encoder = unet.train(), text_encoder.train()
        inner = ("down_blocks", "mid_block", "up_blocks")
        super().__init__(
            [*unet.parameters(), *text_encoder.parameters()],
            [p for name, p in unet.named_parameters() if name.startswith(inner) and p.ndim >= 2],
            (recipe.MUON_RATE, recipe.ADAMW_RATE),
            hold=recipe.HOLD,
            decay=0.996,
            betas=(0.9, 0.97),
            weight_decay=0.01,
            seed=seed,
        )
        self.scheduler = build_scheduler()
        self.no_prompt = tokenise([""])

    def step(self, progress: float) -> None:
        """One update; `progress` is the share of the stage that is done and sets the learning rate."""
        loss = self._loss()
        self.update(loss, progress)
        self.note("loss", loss.item())

    def _loss(self) -> torch.Tensor:
        data, batch, generator = self.data, self.batch, self.generator
        chosen = torch.randint(len(data.latents), (batch,), generator=generator)
        clean, ids = data.latents[chosen].float(), data.ids[chosen]
        dropped = torch.rand(batch, 1, generator=generator) < recipe.DROPPED_PROMPTS
        # One level from each of `batch` equal parts of the schedule: less noise in the gradient than free draws.
        total = self.scheduler.config.num_train_timesteps
        level = (torch.arange(batch) + torch.rand(batch, generator=generator)) * (total / batch)
        level = level.long().clamp(max=total - 1)
        noise = torch.randn(clean.shape, generator=generator)
        if self.close_ups is not None and self.steps >= self.close_after:
            clean, ids = self._bring_close(clean, ids, level)
        return self._error(clean, noise, level, torch.where(dropped, self.no_prompt, ids)).mean()

    def _bring_close(
        self, clean: torch.Tensor, ids: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and prompts with close-ups in some of the places with little noise."""
        assert self.close_ups is not None
        chosen = torch.randint(len(self.close_ups.latents), (len(level),), generator=self.generator)
        close = torch.rand(len(level), generator=self.generator) < recipe.CLOSE_SHARE
        close &= level < recipe.CLOSE_BELOW
        latents = torch.where(close.view(-1, 1, 1, 1), self.close_ups.latents[chosen].float(), clean)
        return latents, torch.where(close.view(-1, 1), self.close_ups.ids[chosen], ids)

    def _error(self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Squared error of the predicted velocity, (B,)."""
        text = self.text_encoder(ids).last_hidden_state
        noisy = self.scheduler.add_noise(clean, noise, level)
        wanted = self.scheduler.get_velocity(clean, noise, level)
        return (self.unet(noisy, level, text).sample - wanted).square().mean((1, 2, 3))

    @torch.no_grad()
    def held_out_loss(self, data: EncodedSet) -> dict[int, float]:
        """Loss of the stage's result on unseen pictures, at four noise levels; the same noise every time."""
        generator = torch.Generator().manual_seed(7)
        result = {}
        with self.use_result():
            for level in HELD_OUT_LEVELS:
                clean = data.latents.float()
                noise = torch.randn(clean.shape, generator=generator)
                error = self._error(clean, noise, torch.full((len(clean),), level), data.ids)
                result[level] = error.mean().item()
        return result
