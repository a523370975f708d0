"""Train U-Net and text encoder on cached latents: v-prediction, any prompt left out now and then.

Muon moves the matrices and kernels, AdamW the rest; what the stage ships is the moving average of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from sparsereel.minireel.training.checkpoint import copy_numbered, numbered, under_prefix, with_prefix
from sparsereel.minireel.training.optim import MovingAverage, Muon, adamw_state, load_adamw_state, warm_up_and_decay
from sparsereel.ministill.training import recipe
from sparsereel.ministill.training.architecture import build_scheduler, tokenise
from sparsereel.ministill.training.pictures import EncodedSet

HELD_OUT_LEVELS = (200, 500, 800, 950)


class UNetTrainer:
    """The stage's training state.

    Args:
        data: What to train on.
        unet, text_encoder: fp32 models; trained in place.
        seed: Of everything random in the stage.
        batch: Pictures a step.
    """

    def __init__(
        self,
        data: EncodedSet,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        seed: int = 0,
        batch: int = recipe.BATCH,
    ):
        self.data, self.batch = data, batch
        self.unet, self.text_encoder = unet.train(), text_encoder.train()
        self.parameters = [*unet.parameters(), *text_encoder.parameters()]
        inner = ("down_blocks", "mid_block", "up_blocks")
        matrices = [p for name, p in unet.named_parameters() if name.startswith(inner) and p.ndim >= 2]
        chosen = {id(p) for p in matrices}
        self.muon = Muon(matrices)
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.adamw = torch.optim.AdamW(rest, lr=recipe.ADAMW_RATE, betas=(0.9, 0.97), weight_decay=0.0)
        self.average = MovingAverage(self.parameters, decay=0.996)
        self.scheduler = build_scheduler()
        self.generator = torch.Generator().manual_seed(seed)
        self.no_prompt = tokenise([""])
        self.steps = 0
        self.losses: dict[str, float] = {}

    def step(self, progress: float) -> None:
        """One update; `progress` is the share of the stage that is done and sets the learning rate."""
        loss = self._loss()
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if torch.isfinite(norm):
            factor = warm_up_and_decay(self.steps, progress, recipe.HOLD)
            for group in self.adamw.param_groups:
                group["lr"] = recipe.ADAMW_RATE * factor
            self.adamw.step()
            self.muon.step(recipe.MUON_RATE * factor)
            self.average.update(self.steps + 1)
        self.steps += 1
        self.losses["loss"] = 0.98 * self.losses.get("loss", loss.item()) + 0.02 * loss.item()

    def _loss(self) -> torch.Tensor:
        data, batch, generator = self.data, self.batch, self.generator
        chosen = torch.randint(len(data.latents), (batch,), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < recipe.DROPPED_PROMPTS
        ids = torch.where(dropped, self.no_prompt, data.ids[chosen])
        # One level from each of `batch` equal parts of the schedule: less noise in the gradient than free draws.
        total = self.scheduler.config.num_train_timesteps
        level = (torch.arange(batch) + torch.rand(batch, generator=generator)) * (total / batch)
        clean = data.latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        return self._error(clean, noise, level.long().clamp(max=total - 1), ids).mean()

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

    @contextmanager
    def use_result(self) -> Iterator[None]:
        """While entered, the models hold what the stage ships: the moving average of their weights."""
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything a resumed run needs to go on exactly as this one would have."""
        tensors = {
            **with_prefix("weights", numbered(self.parameters)),
            **with_prefix("average", numbered(self.average.values)),
            **with_prefix("muon", self.muon.state()),
            **with_prefix("adamw", adamw_state(self.adamw)),
            "generator": self.generator.get_state(),
        }
        return tensors, {"steps": self.steps, "losses": self.losses}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        copy_numbered(self.parameters, under_prefix("weights", tensors))
        copy_numbered(self.average.values, under_prefix("average", tensors))
        self.muon.load(under_prefix("muon", tensors))
        load_adamw_state(self.adamw, under_prefix("adamw", tensors))
        self.generator.set_state(tensors["generator"])
        self.steps, self.losses = facts["steps"], dict(facts["losses"])
