"""`sparsereel inspect --sinks`: run a model densely and say which key columns soak up attention."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sparsereel.cli import console

if TYPE_CHECKING:
    from sparsereel.generation import Request
    from sparsereel.sinks import LayerSinks

#: what minireel is probed with where no prompts are given
PROMPTS = ("a red 3 moving right on navy", "a yellow 7 moving up on black")


def probe_sinks(
    plan: str,
    size: str | None,
    grid: str | None,
    steps: int,
    model: str | None,
    prompts: Path | None,
    ratio: float,
    output: Path | None,
    json: str | None,
) -> None:
    """Generate from a few prompts, print a table of sinks, and write the plan with them."""
    from sparsereel.batch import read_prompts
    from sparsereel.generation import SIZED, generate, load_pipeline
    from sparsereel.presets import resolve_plan
    from sparsereel.sinks import find_sinks, with_sinks

    boxed = model in SIZED
    if boxed:
        size = size or ("large" if model == "minireel-large" else "native")
        model = "minireel-large" if size == "large" else "minireel"
    if grid is not None or (size is not None and not boxed):
        raise ValueError("--sinks runs the model at its own size (minireel: --size native or large), not on a --grid")
    if prompts is None and not boxed:
        raise ValueError("with --model give --prompts FILE: the probe has to generate something")
    resolved = resolve_plan(plan)
    texts = list(PROMPTS) if prompts is None else read_prompts(prompts)
    requests = [_request(text, number, size, steps, boxed=boxed) for number, text in enumerate(texts)]
    pipe = load_pipeline(model, "fp32", "cpu")

    def run() -> None:
        for number, request in enumerate(requests):
            console.say(f"prompt {number + 1} of {len(requests)}: {request.prompt}")
            generate(pipe, request)

    found = find_sinks(pipe, run, ratio=ratio)
    _print(found, ratio)
    if output is not None:
        with_sinks(resolved, found).save(output)
        console.say(f"wrote {output}")
    console.emit_json(json, {"ratio": ratio, "prompts": texts, "layers": [asdict(layer) for layer in found]})


def _request(prompt: str, seed: int, size: str | None, steps: int, *, boxed: bool) -> Request:
    from sparsereel import minireel
    from sparsereel.generation import Request

    if not boxed:
        return Request(prompt, seed=seed, steps=steps)
    chosen = {"native": minireel.NATIVE, "large": minireel.LARGE}.get(size or "")
    if chosen is None:
        raise ValueError(f"unknown size {size!r}; allowed: native, large")
    return Request(prompt, seed, steps, chosen.guidance, frames=chosen.frames, height=chosen.height, width=chosen.width)


def _print(found: list[LayerSinks], ratio: float) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layer", "peak", "sinks", "mass", "fair", "frame 0", "text", "where"):
        table.add_column(name, justify="left" if name == "where" else "right")
    for layer in found:
        places = ", ".join(f"frame {t} row {h:g} col {w:g}" for t, h, w in layer.places[:2])
        more = f" and {len(layer.places) - 2} more" if len(layer.places) > 2 else ""
        shares = (f"{x:.3f}" for x in (layer.mass, layer.fair_share, layer.first_frame, layer.text))
        table.add_row(str(layer.layer), f"{layer.peak:.1f}", str(len(layer.places)), *shares, places + more)
    console.people.print(table)
    console.say(
        "peak: mass of the heaviest key over the median; mass: share of attention that goes to the sinks; fair: theirs"
    )
    if not any(layer.places for layer in found):
        highest = max(layer.peak for layer in found)
        console.say(f"no key gets {ratio:g} times the mass of the median key; the most is {highest:.1f} times")
