"""Train the judge's digit classifier and report how well the judge reads held-out real clips.

    python -m sparsereel_eval.train_judge [--steps 1500] [--output FILE]

Takes about two minutes on two cores. Prints, for handwritings never used in training:

    real clips (n=200, held-out handwriting): sound 0.94  digit 0.985  colour 1.000 ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sparsereel_eval.classifier import WEIGHTS, DigitClassifier, save_classifier
from sparsereel_eval.digits import render, sample_clip
from sparsereel_eval.ink import find_ink
from sparsereel_eval.judge import Judge, average

BATCH = 128


def rendered_windows(rng: np.random.Generator, count: int, images: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (N, 1, 32, 32) cut from rendered clips as the judge cuts them, and the digits' values (N,)."""
    windows, values = [], []
    for _ in range(count):
        clip = sample_clip(rng, frames=5, height=48, width=48, images=images, two=0.0, any_motion=True)
        ink = find_ink(render(clip)[0])
        for frame in (0, 4):
            if ink.blobs[frame]:
                windows.append(ink.window(frame, ink.blobs[frame][0]))
                values.append(clip.digits[0].value)
    return torch.stack(windows).unsqueeze(1), torch.tensor(values)


def augment(windows: torch.Tensor) -> torch.Tensor:
    """Turn, scale and shift a little; blur or roughen, so that a soft sample is still read."""
    count = len(windows)
    angle = (torch.rand(count) - 0.5) * 0.4
    zoom = 1 + (torch.rand(count) - 0.5) * 0.3
    shift = (torch.rand(count, 2) - 0.5) * 0.2
    turn = torch.stack([angle.cos() * zoom, -angle.sin(), shift[:, 0], angle.sin(), angle.cos() * zoom, shift[:, 1]], 1)
    grid = F.affine_grid(turn.view(count, 2, 3), list(windows.shape), align_corners=False)
    moved = F.grid_sample(windows, grid, align_corners=False)
    blurred = F.avg_pool2d(moved, 3, 1, 1)
    amount = torch.rand(count, 1, 1, 1)
    noisy = moved * (1 - amount) + blurred * amount + 0.08 * torch.randn_like(moved) * torch.rand(count, 1, 1, 1)
    return noisy.clamp(0, 1)


def train(steps: int, seed: int = 0, clips: int = 3000) -> DigitClassifier:
    """Fit the classifier on renderings of the training handwritings."""
    torch.manual_seed(seed)
    windows, values = rendered_windows(np.random.default_rng(seed), clips, "train")
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        chosen = torch.randint(len(windows), (BATCH,))
        loss = F.cross_entropy(model(augment(windows[chosen])), values[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def calibrate(judge: Judge, count: int, *, size: int = 96, frames: int = 33, two: float = 0.0) -> dict[str, float]:
    """Mean scores of real clips of held-out handwriting: the most a generated clip can be expected to reach."""
    rng = np.random.default_rng(1234)
    clips = [sample_clip(rng, frames=frames, height=size, width=size, images="test", two=two) for _ in range(count)]
    return average([judge.score(render(clip)[0], clip.prompt) for clip in clips])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 128 windows")
    parser.add_argument("--clips", type=int, default=200, help="held-out clips to report on")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="where the weights go (safetensors)")
    arguments = parser.parse_args()
    model = train(arguments.steps)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(model, arguments.output)
    for two, label in ((0.0, "one digit"), (1.0, "two digits")):
        scores = calibrate(Judge(model), arguments.clips, two=two)
        text = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        print(f"real clips, {label} (n={arguments.clips}, held-out handwriting): {text}")


if __name__ == "__main__":
    main()
