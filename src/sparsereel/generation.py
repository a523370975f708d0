"""One clip from one request, timed: what `sparsereel generate` and the demo run."""

from __future__ import annotations

import inspect
import platform
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sparsereel.inject import PlanLike, sparsified
from sparsereel.inject import report as report_of
from sparsereel.media import Frames, to_uint8
from sparsereel.report import Report
from sparsereel.sparse_layer import clock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: names of the models in the box
BOXED = ("minireel", "minireel-large", "minireel-causal")
#: those with the weights that `--size` chooses between; None is the first
SIZED = (None, "minireel", "minireel-large")


@dataclass(frozen=True)
class Request:
    """What to generate. None leaves a value to the pipeline's own default. Sizes in frames and pixels."""

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of a diffusers pipeline call."""
        named = {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "num_frames": self.frames,
            "height": self.height,
            "width": self.width,
        }
        return {key: value for key, value in named.items() if value is not None}


@dataclass(frozen=True)
class Clip:
    """A generated clip.

    Attributes:
        frames: uint8 (F, H, W, 3).
        exact: the same frames as float32 in [0, 1], before rounding; fidelity is measured on these.
        seconds: the pipeline call: text encoding, denoising and decoding.
        report: what ran in every layer; None for a dense clip.
        attention_seconds: inside self-attention; None unless profiled.
        step_seconds: of every denoising step but the first, which also warms up; empty where the pipeline does not call
            back after its steps.
    """

    frames: Frames
    exact: np.ndarray
    seconds: float
    report: Report | None
    attention_seconds: float | None = None
    step_seconds: tuple[float, ...] = ()


def load_pipeline(model: str | None, dtype: str, device: str) -> Any:
    """A diffusers pipeline: a model in the box (`BOXED`; None is the first), a folder, or a hub id.

    Raises:
        ValueError: no such folder, no pipeline or no safetensors in it, unknown dtype, no such device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    _check_device(device)
    if model is None or model in BOXED:
        from sparsereel import minireel

        load = dict(zip(BOXED, (minireel.load, minireel.load_large, minireel.load_causal), strict=True))
        return load[model or BOXED[0]](DTYPES[dtype], device)
    from diffusers import DiffusionPipeline

    folder = Path(model)
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        _check_folder(folder.expanduser())
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder.expanduser()) if folder.exists() else model, torch_dtype=DTYPES[dtype], use_safetensors=True
        )
    except (OSError, KeyError, AttributeError, TypeError) as error:
        # diffusers has no error of its own for a folder that is not what it claims to be.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"could not load the model {model!r}: {first}") from error
    return pipe.to(device)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"the model folder {folder} does not exist")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    if not any(folder.rglob("*.safetensors")):
        raise ValueError(f"{folder} has no safetensors weights; other weight formats are not loaded")


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error


def generate(
    pipe: Any, request: Request, plan: PlanLike | None = None, *, backend: str = "auto", profile: bool = False
) -> Clip:
    """Generate one clip, dense (`plan` None) or with a plan; the pipeline is as before afterwards.

    Args:
        profile: also time self-attention (a GPU is synchronised around every call).

    Raises:
        ValueError: what the pipeline or the plan refuses.
    """
    if plan is None:
        clock = AttentionClock()
        with clock if profile else nullcontext():
            exact, seconds, steps = run_request(pipe, request)
        return Clip(to_uint8(exact), exact, seconds, None, clock.seconds if profile else None, steps)
    with sparsified(pipe, plan, backend=backend):
        report_of(pipe, profile=profile)
        exact, seconds, steps = run_request(pipe, request)
        done = report_of(pipe)
    spent = sum(layer.seconds or 0.0 for layer in done) if profile else None
    return Clip(to_uint8(exact), exact, seconds, done, spent, steps)


class AttentionClock(TorchFunctionMode):
    """Adds up the seconds spent in torch's own attention between equally many queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key = (kwargs.get(name, args[i] if i < len(args) else None) for i, name in enumerate(("query", "key")))
        if query is None or key is None or query.shape[-2] != key.shape[-2]:
            return func(*args, **kwargs)
        start = clock(query)
        result = func(*args, **kwargs)
        self.seconds += clock(query) - start
        return result


def run_request(pipe: Any, request: Request) -> tuple[np.ndarray, float, tuple[float, ...]]:
    """Call the pipeline as it is: frames as floats, seconds of the call, seconds of the steps after the first."""
    generator = torch.Generator("cpu").manual_seed(request.seed)
    ends: list[float] = []

    def step_ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return tensors

    watched = {"callback_on_step_end": step_ended} if _calls_back(pipe) else {}
    start = time.perf_counter()
    with torch.inference_mode():
        output = pipe(request.prompt, generator=generator, output_type="np", **watched, **request.arguments())
    seconds = time.perf_counter() - start
    frames = output.frames[0] if hasattr(output, "frames") else np.asarray(output.images)
    return np.asarray(frames, dtype=np.float32), seconds, tuple(b - a for a, b in pairwise(ends))


def _calls_back(pipe: Any) -> bool:
    """Whether the pipeline takes diffusers' callback after each step; looked up where its call spells it out."""
    calls = [vars(kind).get("__call__") for kind in type(pipe).__mro__]
    return any(call and "callback_on_step_end" in inspect.signature(call).parameters for call in calls)


def environment() -> dict[str, Any]:
    """Versions and machine, for sidecars and benchmark files."""
    import diffusers

    import sparsereel

    return {
        "sparsereel": sparsereel.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }


def machine() -> str:
    """The processor's (or, with CUDA, the device's) model name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model()


def cpu_model() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def request_data(request: Request) -> dict[str, Any]:
    """A request as plain data."""
    return asdict(request)
