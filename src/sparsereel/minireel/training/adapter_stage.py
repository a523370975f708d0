"""Train a LoRA (Hu et al., 2021) of the transformer's blocks for clips of another size; all else stays as it is.

The trained weights are full and merged: W + up @ down, refreshed after every step. Gradients of the two factors follow
from that of their product, so the model runs as fast as without an adapter, compiled or not.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from sparsereel.minireel.training.clip_sets import EncodedSet
from sparsereel.minireel.training.optim import MovingAverage, Muon
from sparsereel.minireel.training.recipe import Stage
from sparsereel.minireel.training.transformer_stage import TransformerTrainer


class AdapterTrainer(TransformerTrainer):
    """The state of a stage with a `rank`; arguments as `TransformerTrainer`'s.

    Every matrix in the blocks, (out, in), has a `down` of (rank, in), drawn as `torch.nn.Linear` draws its weights, and
    an `up` of (out, rank), zero at first. AdamW moves both.
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
        if stage.rank is None:
            raise ValueError(f"Stage {stage.name} has no rank, so it trains no adapter.")
        super().__init__(stage, sets, transformer, text_encoder.requires_grad_(False), seed, compiled)
        self.text_encoder.eval()
        named = [
            (name, parameter)
            for name, parameter in transformer.named_parameters()
            if name.startswith("blocks") and parameter.ndim == 2
        ]
        self.names = [name.removesuffix(".weight") for name, _ in named]
        self.adapted = [parameter for _, parameter in named]
        self.untouched = [parameter.detach().clone() for parameter in self.adapted]
        positions = {id(parameter): index for index, parameter in enumerate(self.masters)}
        self.positions = [positions[id(parameter)] for parameter in self.adapted]
        bounds = [1 / math.sqrt(parameter.shape[1]) for parameter in self.adapted]
        self.down = [
            ((2 * torch.rand(stage.rank, parameter.shape[1], generator=self.generator) - 1) * bound).requires_grad_()
            for parameter, bound in zip(self.adapted, bounds, strict=True)
        ]
        self.up = [torch.zeros(len(parameter), stage.rank).requires_grad_() for parameter in self.adapted]
        self.parameters = [*self.down, *self.up]
        self.muon = Muon([])
        self.adamw = torch.optim.AdamW(self.parameters, lr=stage.adamw_rate, betas=(0.9, 0.97), weight_decay=0.0)
        self.average = MovingAverage(self.parameters)
        self.started_from = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        working = list(self.worker.parameters())
        for down, up, position in zip(self.down, self.up, self.positions, strict=True):
            gradient = working[position].grad
            if gradient is None:
                raise RuntimeError("a matrix of the blocks took no part in the loss")
            down.grad, up.grad = up.mT @ gradient.float(), gradient.float() @ down.mT

    @torch.no_grad()
    def _refresh_worker(self) -> None:
        for merged, base, down, up in zip(self.adapted, self.untouched, self.down, self.up, strict=True):
            torch.addmm(base, up, down, out=merged)
        super()._refresh_worker()

    def save(self, folder: Path) -> None:
        """Write the factors as they are now as fp16 `pytorch_lora_weights.safetensors` for `load_lora_weights`."""
        layers: dict[str, torch.Tensor] = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            layers[f"{name}.lora_A.weight"] = down.detach().half().contiguous()
            layers[f"{name}.lora_B.weight"] = up.detach().half().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
