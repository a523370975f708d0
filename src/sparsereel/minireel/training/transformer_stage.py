"""Train the transformer and its text encoder on cached latents.

Arithmetic runs in a copy, bf16 where the CPU can; the fp32 master weights take the updates (a bf16 weight would swallow
small ones).
Muon moves the blocks' matrices, AdamW the rest; what a stage ships comes from their moving average.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5EncoderModel

from sparsereel.arithmetic import arithmetic
from sparsereel.minireel.training.attention import use_kernels
from sparsereel.minireel.training.clip_sets import PROMPT_TOKENS, EncodedSet, tokenise
from sparsereel.minireel.training.flow_matching import embed_text, flow_loss, sample_noise_levels
from sparsereel.minireel.training.optim import MovingAverage, Muon, warm_up_and_decay
from sparsereel.minireel.training.recipe import Portion, Stage
from sparsereel.minireel.training.resumable import Resumable

LONG_TEXT = 512
DROPPED_PROMPTS = 0.1
HELD_OUT_LEVELS = (0.3, 0.6, 0.85, 0.95)


class TransformerTrainer(Resumable):
    """One stage's training state.

    Args:
        stage: What to train on, and the rates.
        sets: The encoded sets of the stage's portions, by name.
        transformer, text_encoder: fp32 models; trained in place.
        seed: Of everything random in the stage.
        compiled: Compile the blocks and use this project's attention kernels; needs a C++ compiler, much faster.
    """

    def __init__(
        self,
        stage: Stage,
        sets: dict[str, EncodedSet],
        transformer: WanTransformer3DModel,
        text_encoder: UMT5EncoderModel,
        seed: int = 0,
        compiled: bool = False,
    ):
        self.stage, self.sets = stage, sets
        self.transformer, self.text_encoder = transformer.train(), text_encoder.train()
        self.worker = copy.deepcopy(transformer).to(arithmetic()).train()
        if compiled:
            use_kernels(self.worker)
            self.worker.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self.masters = list(transformer.parameters())
        self.parameters = self.masters + [p for p in text_encoder.parameters() if p.requires_grad]
        matrices = [p for name, p in transformer.named_parameters() if name.startswith("blocks") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        self.muon = Muon(matrices)
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.adamw = torch.optim.AdamW(rest, lr=stage.adamw_rate, betas=(0.9, 0.97), weight_decay=0.0)
        self.average = MovingAverage(self.parameters)
        self.generator = torch.Generator().manual_seed(seed)
        self.no_prompt = tokenise([""])
        self.steps = 0
        self.losses: dict[str, float] = {}

    def step(self, progress: float) -> None:
        """One update; `progress` is the share of the stage that is done and sets the learning rate."""
        portion = self._draw_portion()
        loss = self._loss(portion)
        for module in (self.worker, self.text_encoder):
            module.zero_grad(set_to_none=True)
        loss.backward()
        self._collect_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if torch.isfinite(norm):
            self._update(warm_up_and_decay(self.steps, progress, self.stage.hold, self.stage.warm_up))
        self.steps += 1
        name, value = portion.clips.name, loss.item()
        self.losses[name] = 0.97 * self.losses.get(name, value) + 0.03 * value

    def _collect_gradients(self) -> None:
        for master, working in zip(self.masters, self.worker.parameters(), strict=True):
            master.grad = None if working.grad is None else working.grad.float()

    def _draw_portion(self) -> Portion:
        shares = torch.tensor([portion.share for portion in self.stage.portions])
        return self.stage.portions[int(torch.multinomial(shares, 1, generator=self.generator))]

    def _loss(self, portion: Portion) -> torch.Tensor:
        data, generator = self.sets[portion.clips.name], self.generator
        chosen = torch.randint(len(data.latents), (portion.batch,), generator=generator)
        clean, ids, mask = data.latents[chosen].float(), data.ids[chosen], data.mask[chosen]
        # Without a prompt now and then: classifier-free guidance needs the unconditional prediction.
        dropped = torch.rand(portion.batch, 1, generator=generator) < DROPPED_PROMPTS
        ids, mask = (torch.where(dropped, none, own) for none, own in zip(self.no_prompt, (ids, mask), strict=True))
        is_long = torch.rand(1, generator=generator).item() < portion.long_text
        text = embed_text(self.text_encoder, ids, mask, LONG_TEXT if is_long else PROMPT_TOKENS)
        levels = sample_noise_levels(portion.batch, generator, portion.shift)
        noise = torch.randn(clean.shape, generator=generator)
        return flow_loss(self.worker, clean, noise, levels, text).mean()

    def _update(self, factor: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = self.stage.adamw_rate * factor
        self.adamw.step()
        self.muon.step(self.stage.muon_rate * factor)
        self.average.update(self.steps + 1)
        self._refresh_worker()

    @torch.no_grad()
    def _refresh_worker(self) -> None:
        torch._foreach_copy_(list(self.worker.parameters()), self.masters)

    @torch.no_grad()
    def held_out_loss(self, data: EncodedSet) -> dict[float, float]:
        """Loss of the stage's result on unseen clips, at four noise levels; the same noise every time."""
        generator = torch.Generator().manual_seed(7)
        result = {}
        with self.use_result():
            text = embed_text(self.text_encoder, data.ids, data.mask, PROMPT_TOKENS)
            for level in HELD_OUT_LEVELS:
                losses = []
                for index, latents in enumerate(data.latents.float()):
                    noise = torch.randn(latents.shape, generator=generator)
                    at = torch.tensor([level])
                    losses.append(flow_loss(self.worker, latents[None], noise[None], at, text[index : index + 1]))
                result[level] = torch.cat(losses).mean().item()
        return result

    @contextmanager
    def use_result(self) -> Iterator[None]:
        """While entered, the models hold what the stage ships: the moving average of their weights."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average.values)
        self._refresh_worker()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, own)
            self._refresh_worker()

    def load(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        super().load(tensors, facts)
        self._refresh_worker()
