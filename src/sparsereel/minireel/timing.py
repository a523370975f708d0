"""How long a dense clip takes here, and how much of it self-attention takes: the figures beside every speed-up.

    python -m sparsereel.minireel.timing --threads 2

    size    dtype     tokens  forward s  attention  decode s  clip s
    native  float32     1296       0.19        22%       0.6     8.2

The forward pass and the decoding are timed, the best of a few runs each; a clip is 2 x steps forward passes (guidance)
and one decoding. Attention is timed inside the forward pass, as its share of the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsereel.generation import AttentionClock
from sparsereel.minireel.sizes import LARGE, NATIVE, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, Size


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward pass and one decoding, and the share of the forward pass spent in self-attention."""

    forward: float
    attention_share: float
    decode: float

    def clip(self, steps: int) -> float:
        """Seconds of a whole clip with guidance."""
        return 2 * steps * self.forward + self.decode


@torch.no_grad()
def measure(size: Size, dtype: torch.dtype, runs: int = 3) -> Timing:
    """Time minireel at a size on the CPU; the best of `runs` after one to warm up.

    Raises:
        ValueError: runs is below 1, or dtype is one minireel does not load in.
    """
    from sparsereel.minireel import load

    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}.")
    pipeline = load(dtype)
    frames = (size.frames - 1) // TEMPORAL_COMPRESSION + 1
    shape = (1, 16, frames, size.height // SPATIAL_COMPRESSION, size.width // SPATIAL_COMPRESSION)
    latents = torch.randn(shape, dtype=dtype)
    text, level = torch.randn(1, 16, pipeline.transformer.config.text_dim, dtype=dtype), torch.tensor([500.0])

    def forward() -> float:
        with AttentionClock() as clock:
            pipeline.transformer(latents, level, text, return_dict=False)
        return clock.seconds

    forward()
    seconds, attention = min(_timed(forward) for _ in range(runs))
    decode = min(_timed(lambda: pipeline.vae.decode(latents.float()))[0] for _ in range(runs))
    return Timing(seconds, attention / seconds, decode)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("native", "large", "both"), default="both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--runs", type=int, default=3, help="the best of so many")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{torch.get_num_threads()} threads")
    print(f"{'size':8}{'dtype':10}{'tokens':>7}{'forward s':>11}{'attention':>11}{'decode s':>10}{'clip s':>9}")
    for name, size in (("native", NATIVE), ("large", LARGE)):
        for dtype in ("float32", "bfloat16"):
            if arguments.size in (name, "both") and arguments.dtype in (dtype, "both"):
                t = measure(size, getattr(torch, dtype), arguments.runs)
                figures = f"{t.forward:11.2f}{t.attention_share:11.0%}{t.decode:10.1f}{t.clip(size.steps):9.1f}"
                print(f"{name:8}{dtype:10}{size.tokens:7}{figures}", flush=True)


if __name__ == "__main__":
    main()
