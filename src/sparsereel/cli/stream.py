"""`sparsereel stream`: video of any length, written and shown while it is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsereel.cli import console

if TYPE_CHECKING:
    from sparsereel.stream.recording import Recorder

#: made for streaming, unlike minireel itself
DEFAULT_MODEL = "minireel-causal"

_TERMINAL_REFRESH, _LOG_REFRESH = 0.5, 10.0  # seconds between lines of progress


def stream(
    prompt: Annotated[str | None, typer.Argument(help="What to generate.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="0:TEXT;10:TEXT switches at seconds; or a YAML file; or - to type prompts on the way."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Length; without --seconds or --frames until Ctrl-C.")] = None,
    frames: Annotated[int | None, typer.Option(help="Length in frames.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The mp4 to write; default out.mp4, none with --live.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a video that was interrupted.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Show it in a browser on this machine.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --live; 0 = any free one.")] = 0,
    method: Annotated[
        str, typer.Option(help="auto, streaming-llm, longlive, deep-forcing, windows, fifo ...")
    ] = "auto",
    chunk: Annotated[int | None, typer.Option(help="Latent frames made at once.")] = None,
    window: Annotated[int | None, typer.Option(help="Latent frames in reach.")] = None,
    sink: Annotated[int | None, typer.Option(help="First latent frames kept for ever.")] = None,
    storage: Annotated[str, typer.Option(help="Cached keys and values: full, int8 or fp8.")] = "full",
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Deep Forcing: every head chooses its own tokens.")
    ] = False,
    roles: Annotated[
        Path | None, typer.Option(help="YAML file of heads that need only sink and recent frames.")
    ] = None,
    measure_roles: Annotated[
        Path | None, typer.Option(help="Make no video: measure the heads' roles on PROMPT and write this YAML file.")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(help="Of --measure-roles: latent frames that streaming heads will see.")
    ] = None,
    keep_heads: Annotated[float, typer.Option(help="Of --measure-roles: share of heads that keep everything.")] = 0.25,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    fps: Annotated[float, typer.Option(help="Frames a second of the video.")] = 16,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds of work between checkpoints.")] = 30,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a pipeline; default minireel-causal.")] = None,
    causal: Annotated[
        str | None, typer.Option(help="CHUNK:WINDOW in latent frames: treat --model as a causal checkpoint.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    json: Annotated[str | None, typer.Option("--json", help="Write the result as JSON here, or - for stdout.")] = None,
) -> None:
    """Video of any length in constant memory. A run that is killed leaves a playable file and can be resumed."""
    from sparsereel.batch import check_writable
    from sparsereel.files import write_json
    from sparsereel.generation import environment
    from sparsereel.stream import stream as start
    from sparsereel.stream.live import LiveServer
    from sparsereel.stream.recording import Recorder, checkpoint_of

    given = _prompts(prompt, prompts)
    sizes: dict[str, Any] = {
        "chunk": chunk,
        "window": window,
        "sink": sink,
        "steps": steps,
        "height": height,
        "width": width,
    }
    if measure_roles is not None:
        texts = [text for _, text in given] if isinstance(given, list) else given
        sampling = {"guidance": guidance, "negative_prompt": negative_prompt, "method": method}
        wanted = {"recent": recent, "keep": keep_heads}
        _measure_roles(measure_roles, texts, _load(model, causal, dtype, device), wanted, {**sizes, **sampling})
        return
    video = output if output is not None or live else Path("out.mp4")
    going_on = False
    if video is not None:
        if video.suffix != ".mp4" or video.is_dir():
            raise ValueError(f"-o must be a file that ends in .mp4, got {video}")
        going_on = _goes_on(video, checkpoint_of(video), resume)
        check_writable(video.parent)
    elif resume:
        raise ValueError("--resume needs the video that is to go on: -o FILE.mp4")
    pipe, traits = _load(model, causal, dtype, device)
    made = start(
        pipe,
        given,
        frames=frames,
        seconds=seconds,
        method=method,
        causal=traits,
        storage=storage,  # type: ignore[arg-type]  # checked there
        head_roles=roles,
        per_head=per_head or None,
        guidance=guidance,
        seed=seed,
        negative_prompt=negative_prompt,
        fps=fps,
        resume=checkpoint_of(video) if video is not None and going_on else None,
        **sizes,
    )
    server = LiveServer(fps, port, wait_for_viewers=video is None) if live else None
    recorder = Recorder(made, video, server, every=checkpoint_every)
    if video is not None and not going_on:
        # A sidecar says that the video beside it is complete; from now on it is not.
        video.with_suffix(".json").unlink(missing_ok=True)
    if server is not None:
        console.say(f"watch it at {server.url}")
    result = recorder.run(_progress())
    result |= {
        "output": None if video is None else str(video),
        "model": model or DEFAULT_MODEL,
        "environment": environment(),
    }
    if video is not None:
        write_json(video.with_suffix(".json"), result)
    console.say(f"{result['settings']['method']}: {recorder.summary()}")
    if video is not None:
        console.say(f"wrote {video}, {result['frames']} frames")
    console.emit_json(json, result)


def _measure_roles(
    path: Path, prompts: Any, loaded: tuple[Any, Any], wanted: dict[str, Any], arguments: dict[str, Any]
) -> None:
    from sparsereel.batch import check_writable
    from sparsereel.stream.role_meter import measure_roles

    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--measure-roles must name a .yaml file, got {path}")
    if not isinstance(prompts, str | list):
        raise ValueError("--measure-roles needs a PROMPT, or --prompts with texts or a YAML file")
    check_writable(path.parent)
    pipe, traits = loaded
    found = measure_roles(
        pipe, [prompts] if isinstance(prompts, str) else prompts, causal=traits, **wanted, **arguments
    )
    found.save(path)
    console.say(
        f"mean attention on frames out of a streaming head's reach ({found.roles.recent} recent ones are seen):"
    )
    for layer, row in enumerate(found.scores["mass"].tolist()):
        short = found.roles.streaming.get(layer, ())
        cells = (f"{score:.3f}{' ' if head in short else '*'}" for head, score in enumerate(row))
        console.say(f"layer {layer:2d}  {'  '.join(cells)}")
    console.say(f"* keeps everything; wrote {path}")


def _prompts(prompt: str | None, prompts: str | None) -> Any:
    from sparsereel.stream.prompt_text import parse_switches, typed_prompts

    if prompts == "-":
        if prompt is None:
            raise ValueError("--prompts - needs a PROMPT to begin with")
        return typed_prompts(prompt)
    if (prompt is None) == (prompts is None):
        raise ValueError("give either a PROMPT or --prompts")
    return prompt if prompts is None else parse_switches(prompts)


def _goes_on(video: Path, checkpoint: Path, resume: bool) -> bool:
    """Whether there is something to go on with.

    Raises:
        ValueError: an unfinished video is there and nobody said what to do with it; or it is complete.
    """
    if checkpoint.is_file():
        if not resume:
            raise ValueError(
                f"{video} was interrupted: add --resume to go on with it, or delete {checkpoint} to begin anew"
            )
        return True
    if resume and video.with_suffix(".json").is_file():
        raise ValueError(f"{video} is complete; there is nothing to resume")
    if resume:
        console.say(f"there is no checkpoint of {video} yet: beginning anew")
    return False


def _load(model: str | None, causal: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """The pipeline, and what is known about it as a causal model."""
    from sparsereel.generation import load_pipeline
    from sparsereel.stream.methods import CausalModel

    traits = None
    if causal is not None:
        chunk, colon, window = causal.partition(":")
        if not (colon and chunk.isdigit() and window.isdigit()):
            raise ValueError(f"--causal is written CHUNK:WINDOW in latent frames, such as 3:21, got {causal!r}")
        traits = CausalModel(int(chunk), int(window))
    return load_pipeline(model or DEFAULT_MODEL, dtype, device), traits


def _progress() -> Callable[[Recorder], None]:
    """Prints how it goes: over and over on one line of a terminal, now and then elsewhere."""
    last = 0.0

    def show(recorder: Recorder) -> None:
        nonlocal last
        terminal = console.people.is_terminal
        if time.monotonic() - last < (_TERMINAL_REFRESH if terminal else _LOG_REFRESH):
            return
        last = time.monotonic()
        whole = recorder.stream.frames
        share = "" if whole is None else f" of {whole / recorder.stream.fps:g} s"
        text = recorder.summary().replace(" s of video", f" s{share}", 1)
        console.people.print(text, end="\r" if terminal else "\n", markup=False, soft_wrap=True)

    return show
