"""The five stages, one function each: gather what the stage needs, train, leave a result the next one finds.

Each returns False when interrupted. Results in the output folder: `vae/`, `data/`, the pipeline folder `transformer/`,
and the transformer alone in `causal_small/` and `causal/`; checkpoints lie beside them as `<stage>.safetensors`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from rich.console import Console
from transformers import UMT5EncoderModel

from sparsereel.minireel.training import loop, recipe
from sparsereel.minireel.training.architecture import (
    build_text_encoder,
    build_transformer,
    build_vae,
    export,
    export_transformer,
)
from sparsereel.minireel.training.causal_stage import CausalTrainer
from sparsereel.minireel.training.checkpoint import replace_folder
from sparsereel.minireel.training.clip_sets import ClipSet, EncodedSet, encode_set
from sparsereel.minireel.training.transformer_stage import TransformerTrainer
from sparsereel.minireel.training.vae_stage import VaeTrainer, held_out_psnr, measure_latents, render_pool

if TYPE_CHECKING:
    from sparsereel.minireel.train import Options

console = Console()
# Between checkpoints of the stages whose held-out losses take half a minute.
HELD_OUT_SECONDS = 600


def vae(options: Options) -> bool:
    """Train the VAE; nothing to do where there is one already."""
    folder = options.output / "vae"
    if folder.exists() or options.start_from:
        return True
    torch.manual_seed(options.seed)
    model = build_vae()
    trainer = VaeTrainer(model, render_pool(_capped(recipe.VAE_POOL, options), options.seed), options.seed)
    if not _train(trainer, "vae", options, recipe.VAE_MINUTES):
        return False
    trainer.average.swap()
    model.eval()
    measure_latents(model, _capped(recipe.MEASURED_CLIPS, options), options.seed)
    console.print(f"VAE on unseen handwriting: {held_out_psnr(model, _capped(16, options)):.1f} dB")
    replace_folder(folder, model.save_pretrained)
    return True


def data(options: Options) -> bool:
    """Render and encode every set."""
    for stage in (recipe.TRANSFORMER, recipe.CAUSAL_SMALL, recipe.CAUSAL):
        _encode(stage, options)
    return True


def transformer(options: Options) -> bool:
    """Train transformer and text encoder at small sizes."""
    if options.start_from is not None:
        folder = options.start_from
        models = _load(WanTransformer3DModel, folder, "transformer"), _load(UMT5EncoderModel, folder, "text_encoder")
    else:
        torch.manual_seed(options.seed)
        models = build_transformer(), build_text_encoder()
    return _train_transformer(recipe.TRANSFORMER, models, options)


def causal_small(options: Options) -> bool:
    """Go on from the transformer stage, or from `start_from`, on small clips: chunks now see the past only."""
    return _train_causal(recipe.CAUSAL_SMALL, _trained(options), options)


def causal(options: Options) -> bool:
    """Go on from causal_small, at native size."""
    _, text_encoder = _trained(options)
    folder = options.output / recipe.CAUSAL_SMALL.name
    if not folder.exists():
        raise ValueError(f"There is no {folder} to go on from; run --stage causal_small first.")
    transformer = WanTransformer3DModel.from_pretrained(folder).float()
    return _train_causal(recipe.CAUSAL, (transformer, text_encoder), options)


def _train_causal(
    stage: recipe.Stage, models: tuple[WanTransformer3DModel, UMT5EncoderModel], options: Options
) -> bool:
    sets = _encode(stage, options)
    trainer = CausalTrainer(stage, sets, *models, seed=options.seed, compiled=options.compiled)

    def on_checkpoint() -> None:
        losses = trainer.held_out_losses(sets[stage.held_out.name])
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        console.print(f"step {trainer.steps}, held-out loss of noisy chunks: {shown}")
        with trainer.use_result():
            replace_folder(options.output / stage.name, lambda folder: export_transformer(folder, trainer.transformer))

    return _train(trainer, stage.name, options, stage.minutes, on_checkpoint, HELD_OUT_SECONDS)


def _trained(options: Options) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
    """Transformer and text encoder of the transformer stage, or those to start from."""
    folder = options.output / recipe.TRANSFORMER.name
    if not folder.exists():
        if options.start_from is None:
            raise ValueError(f"There is no {folder} to go on from; run --stage transformer or give --start-from.")
        folder = options.start_from
    return _load(WanTransformer3DModel, folder, "transformer"), _load(UMT5EncoderModel, folder, "text_encoder")


def _train_transformer(
    stage: recipe.Stage, models: tuple[WanTransformer3DModel, UMT5EncoderModel], options: Options
) -> bool:
    sets = _encode(stage, options)
    held_out = sets[stage.held_out.name]
    decoder = _load_vae(options)
    trainer = TransformerTrainer(stage, sets, *models, seed=options.seed, compiled=options.compiled)

    def on_checkpoint() -> None:
        losses = trainer.held_out_loss(held_out)
        shown = "  ".join(f"{level}: {loss:.4f}" for level, loss in losses.items())
        console.print(f"step {trainer.steps}, held-out loss at noise level {shown}")
        with trainer.use_result():
            replace_folder(options.output / stage.name, lambda folder: export(folder, *models, decoder))

    return _train(trainer, stage.name, options, stage.minutes, on_checkpoint)


def _train(
    trainer: loop.Trainer,
    name: str,
    options: Options,
    minutes: float,
    on_checkpoint: Callable[[], None] = lambda: None,
    checkpoint_seconds: float = loop.CHECKPOINT_SECONDS,
) -> bool:
    budget = (options.minutes or minutes) if options.steps is None else None
    path = options.output / f"{name}.safetensors"
    return loop.run(
        trainer,
        name,
        path,
        minutes=budget,
        steps=options.steps,
        on_checkpoint=on_checkpoint,
        checkpoint_seconds=checkpoint_seconds,
    )


def _encode(stage: recipe.Stage, options: Options) -> dict[str, EncodedSet]:
    """The stage's sets by name, from their caches where there are any."""
    decoder = _load_vae(options)
    return {spec.name: _encode_set(spec, decoder, options) for spec in stage.sets}


def _encode_set(spec: ClipSet, decoder: AutoencoderKLWan, options: Options) -> EncodedSet:
    capped = replace(spec, count=_capped(spec.count, options))
    with console.status("") as status:

        def on_clip(done: int) -> None:
            status.update(f"encoding {capped.name}: {done} of {capped.count} clips")

        return encode_set(capped, decoder, options.output / "data", on_clip)


def _capped(count: int, options: Options) -> int:
    return min(count, options.clips or count)


def _load_vae(options: Options) -> AutoencoderKLWan:
    folder = options.output if (options.output / "vae").exists() else options.start_from
    if folder is None:
        raise ValueError(f"There is no VAE in {options.output}; run --stage vae first, or give --start-from.")
    return _load(AutoencoderKLWan, folder, "vae").eval()


def _load(kind: Any, folder: Path, part: str) -> Any:
    """A part of a pipeline folder, fp32."""
    if not (folder / part).is_dir():
        raise ValueError(f"{folder} holds no {part}/, so it is no folder to start from.")
    return kind.from_pretrained(folder, subfolder=part).float()
