"""Whether a clip fits in memory: what denoising takes, what the device has, and the largest size that would fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsereel.extend.sizes import Sizes, Triple
from sparsereel.extend.tracing import traced_activations
from sparsereel.families.base import by_suffix

#: resident memory over traced tensors on a CPU, whose kernels keep copies of their own; 1.51 to 2.02 were measured
CPU_OVERHEAD = 1.75


def activations(model: nn.Module, pipe: Any, sizes: Sizes, tokens: Triple, dtype: torch.dtype, device: str) -> float:
    """Bytes of one forward over so many tokens, beyond the weights.

    Counted on the meta device where the model can be traced (Wan, Stable Diffusion), else from its widths. On a CPU,
    minireel's transformer was measured at 0.86 to 1.15 times this (fp32 and bf16, 1,296 to 15,552 tokens); on other
    devices kernels' own buffers are not in it.
    """
    found = traced_activations(model, pipe, tokens, sizes.scale.patch, dtype)
    bytes_held = _from_widths(model, tokens, dtype) if found is None else float(found)
    return bytes_held * (CPU_OVERHEAD if torch.device(device).type == "cpu" else 1.0)


def _from_widths(model: nn.Module, tokens: Triple, dtype: torch.dtype) -> float:
    """What a block holds at once: the stream, its norm in fp32, and q, k, v and output, or the widest MLP."""
    attention: Any = by_suffix(model, [".attn1", ".attn"])[0][1]
    width = int(attention.to_q.out_features)
    inner = max(int(m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks." in n)
    stream = width * (dtype.itemsize + 4)
    return float(tokens[0] * tokens[1] * tokens[2]) * (stream + dtype.itemsize * max(4 * width, 2 * inner))


def available(device: str | torch.device) -> float | None:
    """Bytes that a process may still take on a device; None where nothing says."""
    kind = torch.device(device)
    if kind.type == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info(kind)[0])
    if kind.type != "cpu":
        return None
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        return None
    return None


def check(sizes: Sizes, needed: float, spare: float | None, per_token: float) -> None:
    """Refuse a clip that cannot fit.

    Args:
        needed: bytes; of the weights as well if those are not loaded yet.
        spare: bytes that are free; None = unknown, nothing is refused.
        per_token: bytes that a token adds.

    Raises:
        ValueError: it does not fit; the text says what would.
    """
    if spare is None or needed <= spare:
        return
    fits = largest(sizes, max(0.0, spare - (needed - per_token * _count(sizes.target_tokens))) / per_token)
    hint = "not even one frame would fit" if fits is None else "the largest size that fits is " + _named(sizes, fits)
    raise ValueError(
        f"denoising {_named(sizes, sizes.target)} needs about {needed / 2**30:.1f} GiB, but {spare / 2**30:.1f} GiB "
        f"are free; {hint}"
    )


def check_loaded(pipe: Any, model: nn.Module, sizes: Sizes, tokens: Triple) -> None:
    """Refuse a size that a model in memory cannot hold the activations of.

    Args:
        tokens: of its largest pass.

    Raises:
        ValueError: as `check`.
    """
    parameter = next(model.parameters())
    spare = available(parameter.device)
    # The widths tell without a trace whether it is anywhere near.
    if spare is None or _from_widths(model, tokens, parameter.dtype) * 4 < spare:
        return
    held = activations(model, pipe, sizes, tokens, parameter.dtype, str(parameter.device))
    check(sizes, held, spare, held / _count(tokens))


def largest(sizes: Sizes, tokens: float) -> Triple | None:
    """The target shrunk to so many tokens: frames first if they were asked for, then height and width together.

    None where even the smallest size is too large.
    """
    scale, target = sizes.scale, sizes.target
    frames, rows, columns = sizes.target_tokens
    per_frame = rows * columns
    if sizes.given[0] or not (sizes.given[1] or sizes.given[2]):
        fit = int(tokens // per_frame) // scale.patch[0] * scale.patch[0]
        return None if fit < 1 else ((min(fit, frames * scale.patch[0]) - 1) * scale.frames + 1, target[1], target[2])
    share = (tokens / (frames * per_frame)) ** 0.5
    unit = scale.pixels * scale.patch[1]
    height, width = (
        int(side * share) // unit * unit if given else side
        for side, given in zip(target[1:], sizes.given[1:], strict=True)
    )
    return None if min(height, width) < unit else (target[0], height, width)


def _count(tokens: Triple) -> int:
    return tokens[0] * tokens[1] * tokens[2]


def _named(sizes: Sizes, size: Triple) -> str:
    names = ("frames", "height", "width")
    given = [f"{name}={value}" for name, value, asked in zip(names, size, sizes.given, strict=True) if asked]
    return " ".join(given) or "x".join(map(str, size))
