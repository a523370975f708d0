"""`HeadPerturbationGuidance`: SoftPAG on chosen heads, as a guider of diffusers' modular pipelines."""

# diffusers' guiders carry no types.
# mypy: disable-error-code="misc,untyped-decorator"
from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import PerturbedAttentionGuidance
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg

from sparsereel.guidance.perturbation import HeadPerturbation, perturbed


class HeadPerturbationGuidance(PerturbedAttentionGuidance):
    """Classifier-free guidance plus guidance away from a prediction with perturbed heads.

        uncond + guidance_scale (cond - uncond) + perturbed_guidance_scale (cond - perturbed)

    and without classifier-free guidance cond + perturbed_guidance_scale (cond - perturbed). Unlike diffusers' own PAG
    it reaches attention on any kernel, works on sparsified models and with guidance scale 1, and perturbs single heads.
    At a step of `perturbed_guidance_start` .. `perturbed_guidance_stop` it costs one more forward pass.

    Args:
        heads: numbers of heads by self-attention layer (number in forward order, or module name).
        strength: u of SoftPAG, 0 to 1.
        rows: "image" or "all", see `HeadPerturbation`.
        guidance_scale: of classifier-free guidance; 1 = off (0 with `use_original_formulation`).
        perturbed_guidance_scale: 0 = off.
        perturbed_guidance_start, perturbed_guidance_stop: shares of the steps; the first step counts.
        guidance_rescale, use_original_formulation, start, stop, enabled: as in diffusers' guiders; start and stop bound
            classifier-free guidance.

    Raises:
        ValueError: what `HeadPerturbation` refuses, or a stretch of steps outside [0, 1].
    """

    @register_to_config
    def __init__(
        self,
        heads: dict[Any, list[int]],
        strength: float = 1.0,
        rows: str = "image",
        guidance_scale: float = 7.5,
        perturbed_guidance_scale: float = 2.8,
        perturbed_guidance_start: float = 0.0,
        perturbed_guidance_stop: float = 0.2,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        # The parent's constructor would want layers for its own hooks.
        BaseGuidance.__init__(self, start, stop, enabled)
        if not 0 <= perturbed_guidance_start <= perturbed_guidance_stop <= 1:
            raise ValueError(
                "perturbed_guidance_start and perturbed_guidance_stop must be shares of the steps, 0 <= start <= stop "
                f"<= 1, got {perturbed_guidance_start} and {perturbed_guidance_stop}"
            )
        self.perturbation = HeadPerturbation(heads, strength, rows)
        self.register_to_config(heads=self.perturbation.table())
        self.guidance_scale = guidance_scale
        self.skip_layer_guidance_scale = perturbed_guidance_scale
        self.skip_layer_guidance_start = perturbed_guidance_start
        self.skip_layer_guidance_stop = perturbed_guidance_stop
        self.guidance_rescale = guidance_rescale
        self.use_original_formulation = use_original_formulation
        self._pass = ExitStack()

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One batch of inputs for each pass of this step."""
        return [self._prepare_batch(data, index, name) for index, name in self._passes()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same, for what a block state holds."""
        passes = self._passes()
        return [self._prepare_batch_from_block_state(input_fields, data, index, name) for index, name in passes]

    def _passes(self) -> list[tuple[int, str]]:
        """(0 with the prompt, 1 without; name of the prediction)."""
        # Without CFG the parent's weak pass forgets the prompt.
        without = [(1, "pred_uncond")] if self._is_cfg_enabled() else []
        weak = [(0, "pred_cond_skip")] if self._is_slg_enabled() else []
        return [(0, "pred_cond"), *without, *weak]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Before each pass: perturb the heads in the last one of a step."""
        self._pass.close()
        self._count_prepared += 1
        if self._is_slg_enabled() and self._count_prepared == self.num_conditions:
            self._pass.enter_context(perturbed(denoiser, self.perturbation))

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """After each pass: the heads are as they were."""
        self._pass.close()

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_cond_skip: torch.Tensor | None = None,
    ) -> GuiderOutput:
        """The guided prediction."""
        pred = pred_cond
        if self._is_cfg_enabled():
            assert pred_uncond is not None
            pred = pred_cond if self.use_original_formulation else pred_uncond
            pred = pred + self.guidance_scale * (pred_cond - pred_uncond)
        if self._is_slg_enabled():
            assert pred_cond_skip is not None
            pred = pred + self.skip_layer_guidance_scale * (pred_cond - pred_cond_skip)
        if self.guidance_rescale > 0.0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the pass in preparation sees the prompt."""
        return not (self._is_cfg_enabled() and self._count_prepared == 2)

    def _is_slg_enabled(self) -> bool:
        # The parent leaves the first step out whatever `start` says.
        if not self._enabled or math.isclose(self.skip_layer_guidance_scale, 0.0):
            return False
        if not self.perturbation.count or not self.perturbation.strength:
            return False
        total = self._num_inference_steps
        if total is None:
            return True
        first, last = (int(share * total) for share in (self.skip_layer_guidance_start, self.skip_layer_guidance_stop))
        return bool(first <= self._step < last)
