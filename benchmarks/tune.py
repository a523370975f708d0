"""A LoRA for minireel at twice its length under the radial plan: held-out loss without and with it.

    python benchmarks/tune.py --steps 60 --clips 10 --output /tmp/tune

Clips are drawn by the renderer of minireel's own training, at twice the native length, and written as captioned mp4;
the rest is `sparsereel tune`. Called again it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

import sparsereel
from sparsereel import minireel
from sparsereel.files import write_json
from sparsereel.generation import environment
from sparsereel.media import write_mp4
from sparsereel.tune.loop import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--frames", type=int, default=69)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--plan", default="radial")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tune.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = given.output / "clips"
    _render(folder, given)
    settings = Settings(
        steps=given.steps, rank=given.rank, learning_rate=given.learning_rate, held_out=0.3, checkpoint_every=10
    )
    size = {"frames": given.frames, "height": given.side, "width": given.side}
    start = time.perf_counter()
    result = sparsereel.tune(
        minireel.load(), folder, given.output / "lora", **size, plan=given.plan, settings=settings,
        on_step=lambda step, loss: print(f"step {step}  loss {loss:.4f}", flush=True),
    )  # fmt: skip
    data = {"environment": environment(), "load": os.getloadavg()[0], "size": size, "plan": given.plan}
    data |= {"steps": result.steps, "held_out_before": result.before, "held_out_after": result.after}
    write_json(given.json, data | {"seconds": time.perf_counter() - start})
    print(f"held-out loss {result.before:.4f} before, {result.after:.4f} after {result.steps} steps")


def _render(folder: Path, given: argparse.Namespace) -> None:
    from sparsereel_eval.digits import render, sample_clip

    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(5), []
    for number in range(given.clips):
        clip = sample_clip(rng, frames=given.frames, height=given.side, width=given.side, two=0.0)
        path = folder / f"{number:03d}.mp4"
        if not path.is_file():
            write_mp4(path, render(clip)[0])
        lines.append(json.dumps({"file": path.name, "caption": clip.prompt}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
