"""The run of `tune`: what is trained, on what, and how it resumes.

Rectified flow: x_s = (1 - s) x_0 + s noise, loss = mean (model(x_s, 1000 s) - (noise - x_0))^2, with noise levels s
from a logit-normal shifted towards 1. Only LoRA matrices of attention projections are trained, in float32.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsereel.extend import extend
from sparsereel.families import find, models_of
from sparsereel.files import write_json
from sparsereel.inject import injection_of, restore
from sparsereel.step import StepInfo
from sparsereel.tune.clips import Clips, encode, find_clips
from sparsereel.tune.state import load_facts, load_state, save_state, save_weights

if TYPE_CHECKING:
    from sparsereel.inject import PlanLike

ADAPTER = "sparsereel"
TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
#: noise levels at which held-out clips are measured
LEVELS = (0.2, 0.4, 0.6, 0.8, 0.95)


@dataclass(frozen=True)
class Settings:
    """Of a run.

    Args:
        steps: optimizer steps.
        batch: clips a step.
        rank: of the LoRA matrices; alpha is the same, so the scale is 1.
        learning_rate: of AdamW, after 5% of the steps of warm-up.
        held_out: share of the clips, the last ones, that are only measured.
        drop_caption: share of clips that are trained with the empty prompt, for guidance.
        shift: of the noise levels; None = the scheduler's.
        checkpoint_every: steps between states on disk.
        gradient_checkpointing: less memory, a third more time.
        seed: of everything that is drawn.

    Raises:
        ValueError: a number that makes no sense.
    """

    steps: int = 500
    batch: int = 1
    rank: int = 16
    learning_rate: float = 1e-4
    held_out: float = 0.1
    drop_caption: float = 0.1
    shift: float | None = None
    checkpoint_every: int = 50
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("held_out", "drop_caption"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share from 0 to 1, got {getattr(self, name)}")
        if self.learning_rate <= 0 or (self.shift is not None and self.shift <= 0):
            raise ValueError("learning_rate and shift must be positive")


@dataclass(frozen=True)
class TuneResult:
    """What came out.

    Attributes:
        weights: for `load_lora_weights`.
        before, after: loss on the held-out clips without and with the LoRA; None where none were held out.
        losses: of the training steps of this process.
        steps: done in all.
    """

    weights: Path
    before: float | None
    after: float | None
    losses: tuple[float, ...]
    steps: int


def run_tune(
    pipe: Any,
    folder: Path,
    output: Path,
    size: dict[str, Any],
    method: str,
    plan: PlanLike | None,
    settings: Settings,
    on_step: Callable[[int, float], None] | None,
) -> TuneResult:
    """See `sparsereel.tune`."""
    import peft  # noqa: F401  # missing: said before anything is done

    model = _transformer(pipe)
    entries = find_clips(folder)
    held = min(len(entries) - 1, round(len(entries) * settings.held_out))
    if all(value is None for value in size.values()):
        size = {"frames": 1.0}
    was_training, wanted_gradients = model.training, [p for p in model.parameters() if p.requires_grad]
    report = extend(pipe, **size, method=method, plan=plan)
    try:
        target = report.sizes.target  # type: ignore[attr-defined]
        facts = {"settings": asdict(settings), "size": list(target), "method": report.recipe.describe()}  # type: ignore[attr-defined]
        facts |= {"plan": report.plan, "clips": [path.name for path, _ in entries]}
        earlier = load_facts(output)
        _check_same(earlier, facts, output)
        output.mkdir(parents=True, exist_ok=True)
        clips = encode(pipe, entries, target, output / "latents.safetensors")
        model.requires_grad_(False)
        return _Run(pipe, model, clips, held, output, settings, facts, earlier).go(on_step)
    finally:
        restore(pipe)
        if getattr(model, "peft_config", None):
            model.unload_lora()
        model.train(was_training)
        for parameter in wanted_gradients:
            parameter.requires_grad_(True)


def _transformer(pipe: Any) -> Any:
    models = models_of(pipe)
    names = {family.name for model in models.values() if (family := find(model)) is not None}
    if names != {"wan"} or len(models) != 1:
        raise ValueError(f"tune trains pipelines with one Wan transformer; this one holds {', '.join(sorted(names))}")
    model = next(iter(models.values()))
    if hasattr(model, "_sparsereel_injection"):
        raise ValueError("the pipeline is sparsified or extended; restore it, and give tune the plan and size instead")
    if getattr(model, "peft_config", None):
        raise ValueError("the transformer carries LoRA weights already; fuse or unload them first")
    return model


def _check_same(earlier: dict[str, Any] | None, facts: dict[str, Any], output: Path) -> None:
    if earlier is None:
        return
    different = [name for name, value in facts.items() if name != "settings" and earlier.get(name) != value]
    settings, old = facts["settings"], earlier.get("settings", {})
    # More steps, and other times to save, are no other run.
    free = ("steps", "checkpoint_every", "gradient_checkpointing")
    different += [name for name, value in settings.items() if name not in free and old.get(name) != value]
    if different:
        raise ValueError(f"{output} holds a run with another {' and '.join(different)}; choose another folder")


class _Run:
    """One process of one run."""

    def __init__(
        self,
        pipe: Any,
        model: Any,
        clips: Clips,
        held: int,
        output: Path,
        settings: Settings,
        facts: dict[str, Any],
        earlier: dict[str, Any] | None,
    ) -> None:
        from accelerate import Accelerator
        from peft import LoraConfig

        self.pipe, self.model, self.output, self.settings, self.facts = pipe, model, output, settings, facts
        self.accelerator = Accelerator(cpu=model.device.type == "cpu")
        count = len(clips.latents)
        self.clips, self.training, self.held = clips, count - held, range(count - held, count)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=list(TARGETS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model.add_adapter(config, adapter_name=ADAPTER)
        self.trained: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                self.trained[name] = parameter
        if settings.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        self.optimizer = torch.optim.AdamW(list(self.trained.values()), lr=settings.learning_rate, weight_decay=0.01)
        self.step, self.before = 0, None
        if earlier is not None:
            load_state(output, self.trained, self.optimizer)
            self.step, self.before = int(earlier["step"]), earlier.get("before")
        self.sigmas = _sigmas(pipe)

    def go(self, on_step: Callable[[int, float], None] | None) -> TuneResult:
        """Train until the last step; on Ctrl-C the state is saved first."""
        if self.before is None and len(self.held):
            self.before = self._held_out_loss()
        losses: list[float] = []
        try:
            while self.step < self.settings.steps:
                losses.append(self._train())
                self.step += 1
                if self.step % self.settings.checkpoint_every == 0:
                    self._save()
                if on_step is not None:
                    on_step(self.step, sum(losses[-20:]) / len(losses[-20:]))
        finally:
            self._save()
        after = self._held_out_loss() if len(self.held) else None
        weights = save_weights(self.pipe, self.model, self.output, ADAPTER)
        data = {**self.facts, "steps": self.step, "held_out_before": self.before, "held_out_after": after}
        write_json(self.output / "tune.json", data)
        return TuneResult(weights, self.before, after, tuple(losses), self.step)

    def _save(self) -> None:
        save_state(self.output, self.trained, self.optimizer, {**self.facts, "step": self.step, "before": self.before})

    def _train(self) -> float:
        settings = self.settings
        # Everything of a step follows from its number: a resumed run draws what it would have drawn.
        g = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step + 1)
        numbers = torch.randint(self.training, (settings.batch,), generator=g)
        level = self._draw_level(g)
        noise = torch.randn(settings.batch, *self.clips.latents.shape[1:], generator=g)
        dropped = torch.rand(settings.batch, generator=g) < settings.drop_caption
        texts = torch.where(dropped[:, None, None], self.clips.empty, self.clips.texts[numbers])
        warm = max(1, round(0.05 * settings.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (self.step + 1) / warm)
        loss = self._loss(self.clips.latents[numbers], texts, noise, level)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(list(self.trained.values()), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def _draw_level(self, g: torch.Generator) -> float:
        shift = self.settings.shift
        if shift is None:
            config = self.pipe.scheduler.config
            shift = float(config.get("flow_shift") or config.get("shift") or 1.0)
        level = float(torch.sigmoid(torch.randn((), generator=g)))
        return shift * level / (1 + (shift - 1) * level)

    def _loss(self, clean: Tensor, texts: Tensor, noise: Tensor, level: float) -> Tensor:
        """Of one noise level; the plan's schedule sees the sampling step that is nearest to it."""
        device, dtype = self.model.device, self.model.patch_embedding.weight.dtype
        noisy = ((1 - level) * clean + level * noise).to(device, dtype)
        times = torch.full((len(clean),), 1000 * level, device=device)
        with _at_step(self.model, self.sigmas, level):
            out = self.model(
                hidden_states=noisy, timestep=times, encoder_hidden_states=texts.to(device, dtype), return_dict=False
            )[0]
        return (out.float() - (noise - clean).to(device)).square().mean()

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        self.model.eval()
        total = 0.0
        for number in self.held:
            clean, texts = self.clips.latents[number : number + 1], self.clips.texts[number : number + 1]
            for place, level in enumerate(LEVELS):
                g = torch.Generator().manual_seed(77_000 + 100 * number + place)
                noise = torch.randn(clean.shape, generator=g)
                total += float(self._loss(clean, texts, noise, level))
        self.model.train()
        return total / (len(self.held) * len(LEVELS))


def _sigmas(pipe: Any) -> Tensor:
    """Noise levels of the pipeline's own sampling steps."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default)
    return scheduler.sigmas[:-1].clone()


@contextmanager
def _at_step(model: nn.Module, sigmas: Tensor, level: float) -> Iterator[None]:
    steps = injection_of(model).runtime.steps
    steps.told = StepInfo(int((sigmas - level).abs().argmin()), len(sigmas))
    try:
        yield
    finally:
        steps.told = None
