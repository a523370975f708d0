"""The three stages, one function each: gather what the stage needs, train, leave a result the next one finds.

Each returns False when interrupted. Results in the output folder: `vae/`, `data/`, the pipeline folder `pipeline/`;
checkpoints lie beside them as `<stage>.safetensors`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from rich.console import Console

from sparsereel.minireel.training import loop
from sparsereel.minireel.training.checkpoint import replace_folder
from sparsereel.ministill.training import recipe
from sparsereel.ministill.training.architecture import build_text_encoder, build_unet, build_vae, export
from sparsereel.ministill.training.pictures import EncodedSet, encode_set
from sparsereel.ministill.training.unet_stage import UNetTrainer
from sparsereel.ministill.training.vae_stage import VaeTrainer, held_out_psnr, render_pool, standardise_latents

if TYPE_CHECKING:
    from sparsereel.ministill.train import Options

console = Console()


def vae(options: Options) -> bool:
    """Train the VAE; nothing to do where there is one already."""
    folder = options.output / "vae"
    if folder.exists():
        return True
    torch.manual_seed(options.seed)
    model = build_vae()
    trainer = VaeTrainer(model, render_pool(_capped(recipe.VAE_POOL, options), options.seed), options.seed)
    if not _train(trainer, "vae", options, recipe.VAE_STEPS):
        return False
    trainer.average.swap()
    model.eval()
    standardise_latents(model, _capped(recipe.MEASURED, options), options.seed)
    console.print(f"VAE on unseen handwriting: {held_out_psnr(model, _capped(64, options)):.1f} dB")
    replace_folder(folder, model.save_pretrained)
    return True


def data(options: Options) -> bool:
    """Render and encode every set."""
    for spec in (recipe.TRAINING, recipe.CLOSE_UPS, recipe.HELD_OUT):
        _encode(spec, options)
    return True


def unet(options: Options) -> bool:
    """Train U-Net and text encoder."""
    torch.manual_seed(options.seed)
    models = build_unet(), build_text_encoder()
    own, close_ups = _encode(recipe.TRAINING, options), _encode(recipe.CLOSE_UPS, options)
    trainer = UNetTrainer(own, *models, seed=options.seed, close_ups=close_ups)
    held_out, decoder = _encode(recipe.HELD_OUT, options), _load_vae(options)

    def on_checkpoint() -> None:
        shown = "  ".join(f"{level}: {loss:.4f}" for level, loss in trainer.held_out_loss(held_out).items())
        console.print(f"step {trainer.steps}, held-out loss at noise level {shown}")
        with trainer.use_result():
            replace_folder(options.output / "pipeline", lambda folder: export(folder, *models, decoder))

    return _train(trainer, "unet", options, recipe.UNET_STEPS, on_checkpoint)


def _train(
    trainer: loop.Trainer,
    name: str,
    options: Options,
    steps: int,
    on_checkpoint: Callable[[], None] = lambda: None,
) -> bool:
    path = options.output / f"{name}.safetensors"
    if options.minutes is not None:
        return loop.run(trainer, name, path, minutes=options.minutes, on_checkpoint=on_checkpoint)
    return loop.run(trainer, name, path, steps=options.steps or steps, on_checkpoint=on_checkpoint)


def _encode(spec: recipe.PictureSet, options: Options) -> EncodedSet:
    spec = replace(spec, count=_capped(spec.count, options))
    with console.status(f"Encoding {spec.name}") as status:
        return encode_set(
            spec,
            _load_vae(options),
            options.output / "data",
            lambda done: status.update(f"Encoding {spec.name}: {done} of {spec.count}"),
        )


def _load_vae(options: Options) -> AutoencoderKL:
    folder = options.output / "vae"
    if not folder.exists():
        raise ValueError(f"There is no {folder} to go on from; run --stage vae first.")
    return AutoencoderKL.from_pretrained(folder).eval()


def _capped(count: int, options: Options) -> int:
    return count if options.pictures is None else min(count, options.pictures)
