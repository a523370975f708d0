"""Whole models, dense and sparse: seconds end to end or a step, beside what Amdahl's law allows.

    python benchmarks/pipeline.py                                         # minireel at LARGE, a whole generation
    python benchmarks/pipeline.py --architecture wan2.1-1.3b --layers 1   # published sizes, random weights, one step

Speed needs no trained weights, so published architectures are built at full width from their configurations, with as
many layers as asked for. Amdahl = 1 / ((1 - a) + a * s), with a the share of a dense step spent in self-attention and s
the density of the sparse one. Writes benchmarks/results/pipeline-<architecture>.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparsereel
from sparsereel.arithmetic import arithmetic
from sparsereel.files import write_json
from sparsereel.generation import AttentionClock, Request, environment, generate, load_pipeline
from sparsereel.presets import resolve_plan

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Architecture:
    """A published model: class, configuration, latent size (frames, height, width) and prompt tokens."""

    class_name: str
    config: dict[str, Any]
    latents: tuple[int, int, int]
    text: tuple[int, int]


WAN_TEXT = (512, 4096)
ARCHITECTURES = {
    "wan2.1-1.3b": Architecture(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        (21, 60, 104),
        WAN_TEXT,
    ),
    "wan2.1-14b": Architecture(
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
        (21, 90, 160),
        WAN_TEXT,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure dense and sparse in turn, print one table, write one JSON."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = _minireel(options) if options.architecture == "minireel" else _architecture(options)
    dense, sparse = result["dense"], result["sparse"]
    share = dense["attention_seconds"] / dense["seconds"]
    amdahl = 1 / ((1 - share) + share * sparse["density"])
    result |= {
        "attention_share": share,
        "speedup": dense["seconds"] / sparse["seconds"],
        "attention_speedup": dense["attention_seconds"] / sparse["attention_seconds"],
        "amdahl": amdahl,
        "plan": options.plan,
        "options": {key: str(value) for key, value in vars(options).items() if key != "output"},
        "environment": environment(),
    }
    result["share_of_amdahl"] = result["speedup"] / amdahl
    _print(options, result)
    write_json(options.output / f"pipeline-{options.architecture}.json", result)
    print(f"wrote {options.output / f'pipeline-{options.architecture}.json'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=("minireel", *ARCHITECTURES), default="minireel")
    parser.add_argument("--plan", default="radial", help="preset name or plan file")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (minireel)")
    parser.add_argument("--layers", type=int, default=1, help="transformer layers (published architectures)")
    parser.add_argument("--dtype", choices=DTYPES, default=str(arithmetic()).removeprefix("torch."))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=1, help="alternating runs; the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def _minireel(options: argparse.Namespace) -> dict[str, Any]:
    """A whole generation at LARGE; the schedule's dense first steps are left out, as a few steps would all be dense."""
    from sparsereel.minireel import LARGE

    pipe = load_pipeline("minireel-large", {"float32": "fp32", "bfloat16": "bf16"}[options.dtype], options.device)
    pipe.set_progress_bar_config(disable=True)
    plan = resolve_plan(options.plan).with_schedule(dense_first=0, dense_last=0)
    size = (LARGE.frames, LARGE.height, LARGE.width)
    request = Request("a red 3 moving right on navy", 0, options.steps, LARGE.guidance, *size)
    generate(pipe, Request(request.prompt, 0, 1, LARGE.guidance, *size), plan)
    runs: dict[str, list[dict[str, float]]] = {"dense": [], "sparse": []}
    for _ in range(options.repeat):
        for name, used in (("dense", None), ("sparse", plan)):
            clip = generate(pipe, request, used, profile=True)
            density = 1.0 if clip.report is None or clip.report.density is None else clip.report.density
            allowed = 1.0 if clip.report is None or clip.report.token_density is None else clip.report.token_density
            seconds = (clip.seconds, clip.attention_seconds or 0.0)
            runs[name].append(_row(*seconds, density, allowed))
    return {"tokens": LARGE.tokens, **{name: _median(rows) for name, rows in runs.items()}}


@torch.inference_mode()
def _architecture(options: argparse.Namespace) -> dict[str, Any]:
    """One forward pass of a published architecture with random weights."""
    import diffusers

    made = ARCHITECTURES[options.architecture]
    torch.manual_seed(0)
    config = {**made.config, "num_layers": options.layers}
    with torch.device(options.device):
        model = getattr(diffusers, made.class_name)(**config).to(DTYPES[options.dtype]).eval()
        latents = torch.randn(1, 16, *made.latents, dtype=DTYPES[options.dtype])
        text = torch.randn(1, *made.text, dtype=DTYPES[options.dtype])
        when = torch.tensor([500])
    plan = resolve_plan(options.plan).with_schedule(dense_first=0, dense_last=0)

    def forward() -> None:
        model(hidden_states=latents, timestep=when, encoder_hidden_states=text, return_dict=False)

    runs: dict[str, list[dict[str, float]]] = {"dense": [], "sparse": []}
    for _ in range(options.repeat):
        clock = AttentionClock()
        with clock:
            seconds = _seconds(forward)
        runs["dense"].append(_row(seconds, clock.seconds, 1.0, 1.0))
        with sparsereel.sparsified(model, plan):
            forward()
            before = sum(layer.seconds or 0.0 for layer in sparsereel.report(model, profile=True))
            seconds = _seconds(forward)
            report = sparsereel.report(model)
        spent = sum(layer.seconds or 0.0 for layer in report) - before
        runs["sparse"].append(_row(seconds, spent, report.density or 1.0, report.token_density or 1.0))
    p = model.config.patch_size
    tokens = (made.latents[0] // p[0]) * (made.latents[1] // p[1]) * (made.latents[2] // p[2])
    return {"tokens": tokens, "layers": options.layers, **{name: _median(rows) for name, rows in runs.items()}}


def _seconds(call: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _row(seconds: float, attention: float, density: float, token_density: float) -> dict[str, float]:
    return {"seconds": seconds, "attention_seconds": attention, "density": density, "token_density": token_density}


def _median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _print(options: argparse.Namespace, result: dict[str, Any]) -> None:
    machine = result["environment"]["machine"]
    print(f"{options.architecture}, {result['tokens']} tokens, {options.dtype}; {options.threads} threads of {machine}")
    print(f"{'':<8}{'seconds':>9}{'attention':>11}{'density':>9}{'of tokens':>11}")
    for name in ("dense", "sparse"):
        row = result[name]
        print(
            f"{name:<8}{row['seconds']:>9.2f}{row['attention_seconds']:>11.2f}{row['density']:>9.3f}"
            f"{row['token_density']:>11.3f}"
        )
    print(
        f"{result['speedup']:.2f} times faster, attention alone {result['attention_speedup']:.2f}; "
        f"Amdahl's law at this density {result['amdahl']:.2f}: {result['share_of_amdahl']:.2f} of it"
    )


if __name__ == "__main__":
    main()
