"""What extended sizes cost, measured: one forward dense and extended, side by side, in one run.

    python benchmarks/extend_cost.py                      # both parts, a few minutes on two quiet cores
    python benchmarks/extend_cost.py --part length --ratio 4 --side 12 --runs 3
    python benchmarks/extend_cost.py --part unet --latent 32 --channels 64

length: minireel's transformer at `ratio` times its native length, plain dense against sparse plans with UltraViCo's
decay, and the peak of memory at 1, 2 and `ratio` times the length, counted tensor by tensor (tracing.py).
unet: a U-Net built as Stable Diffusion 1.5's with fewer channels and random weights, at four times its side, plain
against HiDiffusion, step by step; a run's saving follows from how many steps are shrunk.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sparsereel
from sparsereel import AttentionPlan, minireel
from sparsereel.extend.tracing import traced_activations
from sparsereel.files import write_json
from sparsereel.generation import environment
from sparsereel.patterns import Neighborhood, Radial


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=("both", "length", "unet"), default="both")
    parser.add_argument("--ratio", type=int, default=4, help="of the native length")
    parser.add_argument("--side", type=int, default=16, help="rows and columns of tokens; native 12, large 16")
    parser.add_argument("--latent", type=int, default=32, help="the U-Net's trained side in latent cells")
    parser.add_argument("--channels", type=int, default=64, help="of its first level; SD 1.5 has 320")
    parser.add_argument("--runs", type=int, default=3, help="timings of each, of which the median counts")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/extend_cost.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {"environment": environment(), "load": os.getloadavg()[0], "threads": given.threads}
    if given.part != "unet":
        result["length"] = _length(given)
    if given.part != "length":
        result["unet"] = _unet(given)
    write_json(given.json, result)


def _timed(run: Callable[[], Any], runs: int) -> float:
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


@torch.inference_mode()
def _length(given: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.float32 if given.dtype == "fp32" else torch.bfloat16
    pipe = minireel.load(dtype)
    model, native = pipe.transformer, (minireel.NATIVE.frames - 1) // 4 + 1
    frames = native * given.ratio
    pixels = 8 * given.side
    size = {"frames": float(given.ratio), "height": pixels, "width": pixels}
    inputs = {
        "hidden_states": torch.randn(1, model.config.in_channels, frames, given.side, given.side, dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, model.config.text_dim, dtype=dtype),
    }
    window = (native, given.side, given.side)
    sparse = {"max_density": 1.0, "min_tokens": 0}
    cases = {
        "dense": ("plain", None),
        "dense + decay": ("ultravico_frames", None),
        "neighborhood": ("plain", AttentionPlan.uniform(Neighborhood(window=window), **sparse)),
        "neighborhood + decay": (
            "ultravico_frames",
            AttentionPlan.uniform(Neighborhood(window=window), **sparse),
        ),
        "radial": ("plain", AttentionPlan.uniform(Radial(), **sparse)),
        "radial + decay": ("ultravico_frames", AttentionPlan.uniform(Radial(), **sparse)),
    }
    print(f"{given.ratio}x length: {frames * given.side**2} tokens, {given.dtype}\n{'':22s} seconds  of dense  density")
    rows: dict[str, Any] = {}
    for name, (method, plan) in cases.items():
        sparsereel.extend(pipe, **size, method=method, plan=plan)
        seconds = _timed(lambda: model(**inputs), given.runs)
        density = sparsereel.report(pipe).density
        sparsereel.restore(pipe)
        rows[name] = {"seconds": seconds, "ratio": seconds / rows.get("dense", {}).get("seconds", seconds)}
        rows[name]["density"] = density
        print(f"{name:22s} {seconds:7.3f}  {rows[name]['ratio']:8.2f}  {density:7.3f}")
    memory = {
        ratio: traced_activations(model, pipe, (native * ratio, given.side, given.side), (1, 1, 1), dtype)
        for ratio in (1, 2, given.ratio)
    }
    print("activations in MiB: " + ", ".join(f"{r}x {(m or 0) / 2**20:.1f}" for r, m in memory.items()))
    return {"tokens": frames * given.side**2, "rows": rows, "activation_bytes": memory}


@torch.inference_mode()
def _unet(given: argparse.Namespace) -> dict[str, Any]:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel

    c = given.channels
    unet = UNet2DConditionModel(
        sample_size=given.latent,
        block_out_channels=(c, 2 * c, 4 * c, 4 * c),
        cross_attention_dim=64,
        attention_head_dim=max(1, c // 40),
    ).eval()
    vae = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    none = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = EulerDiscreteScheduler(steps_offset=1)
    pipe = StableDiffusionPipeline(unet=unet, vae=vae, scheduler=scheduler, requires_safety_checker=False, **none)
    side = 4 * given.latent
    inputs = {
        "sample": torch.randn(1, 4, side, side),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, 64),
    }
    plain = _timed(lambda: unet(**inputs), given.runs)
    sparsereel.extend(pipe, height=4.0, width=4.0, method="hidiffusion")
    steps: dict[str, float] = {}
    # Up to 30% of the steps everything is shrunk, up to 70% the first level only, then windows alone are left.
    for name, step in (("dilated and pooled", 0), ("dilated", 20), ("windows alone", 40)):
        scheduler.set_timesteps(50)
        scheduler._step_index = step
        steps[name] = _timed(lambda: unet(**inputs), given.runs)
    sparsereel.restore(pipe)
    run = 0.3 * steps["dilated and pooled"] + 0.4 * steps["dilated"] + 0.3 * steps["windows alone"]
    print(f"U-Net at 4x side, latents of {side} x {side}, fp32: plain {plain:.3f} s a pass")
    for name, seconds in steps.items():
        print(f"{name:22s} {seconds:7.3f}  {seconds / plain:8.2f} of plain")
    print(f"{'50 steps':22s} {50 * run:7.1f}  {run / plain:8.2f} of plain ({50 * plain:.1f})")
    return {"latent": side, "plain": plain, "steps": steps, "run_ratio": run / plain}


if __name__ == "__main__":
    main()
