"""`sparsereel tune`: a LoRA for a size or a plan, from a folder of videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsereel.cli import console
from sparsereel.cli.extend import parse_sizes


def tune(
    folder: Annotated[Path, typer.Argument(help="Videos with captions.jsonl, or a .txt beside each.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the weights and the state.")],
    frames: Annotated[str | None, typer.Option(help="2x: twice the trained length; 65: so many frames.")] = None,
    height: Annotated[str | None, typer.Option(help="1.5x of the trained height, or pixels.")] = None,
    width: Annotated[str | None, typer.Option(help="1.5x of the trained width, or pixels.")] = None,
    method: Annotated[str, typer.Option(help="As of `extend`: plain, ultravico, yarn ...")] = "plain",
    plan: Annotated[str | None, typer.Option(help="Preset name or plan file; dense without it.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Clips a step.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA matrices.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    held_out: Annotated[float, typer.Option(help="Share of the clips, the last, that are only measured.")] = 0.1,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between states on disk.")] = 50,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory.")] = False,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a pipeline; default minireel.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    json: Annotated[str | None, typer.Option("--json", help="Write the result as JSON here, or - for stdout.")] = None,
) -> None:
    """Train a LoRA through the sparse kernels; the same command goes on where it was interrupted."""
    from rich.progress import Progress

    from sparsereel.generation import load_pipeline
    from sparsereel.tune import tune as run
    from sparsereel.tune.loop import Settings

    settings = Settings(
        steps=steps,
        batch=batch,
        rank=rank,
        learning_rate=learning_rate,
        held_out=held_out,
        checkpoint_every=checkpoint_every,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    size = parse_sizes(frames=frames, height=height, width=width)
    pipe = load_pipeline(model, dtype, device)
    with Progress(console=console.people, transient=True) as progress:
        task = progress.add_task("tuning", total=steps)

        def on_step(done: int, loss: float) -> None:
            progress.update(task, completed=done, description=f"tuning, loss {loss:.4f}")

        result = run(pipe, folder, output, **size, method=method, plan=plan, settings=settings, on_step=on_step)
    if result.before is not None and result.after is not None:
        console.say(f"held-out loss {result.before:.4f} before, {result.after:.4f} after {result.steps} steps")
    console.say(f"wrote {result.weights}; load it with pipe.load_lora_weights({str(output)!r})")
    data = {"weights": str(result.weights), "steps": result.steps}
    data |= {"held_out_before": result.before, "held_out_after": result.after, "losses": list(result.losses)}
    console.emit_json(json, data)
