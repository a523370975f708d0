"""What a step costs: seconds, the share of self-attention in them, FLOPs, and the peak of memory.

Seconds a step come from the study's own clips. The rest is probed once a plan with a short clip, as a profiler in the
loop would slow what the study times. FLOPs count a multiplication and an addition as two and are of one forward pass of
the denoiser; with a plan, self-attention counts by the density that ran.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sparsereel.generation import AttentionClock, Request, run_request
from sparsereel.inject import report as report_of
from sparsereel.inject import sparsified
from sparsereel.sparse_layer import clock

PROBE_STEPS = 3
DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class Probe:
    """What one short clip with a plan showed.

    Attributes:
        attention_share: Self-attention's share of the denoiser's seconds; the first forward pass is left out.
        density: Share of self-attention that ran; 1 for dense.
        flops: Of one forward pass.
        dense_flops: The same without a plan.
        attention_flops: Part of `dense_flops` that is self-attention's two matrix products.
        peak_bytes: Highest memory while the clip was made: the device's, or on a CPU the whole process's; None where
            the system does not tell.
    """

    attention_share: float
    density: float
    flops: float
    dense_flops: float
    attention_flops: float
    peak_bytes: int | None


class _AttentionFlops(TorchFunctionMode):
    """Counts torch's attention, which torch's own counter does not see on every device."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = 0.0, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (kwargs.get(n, args[i] if i < len(args) else None) for i, n in enumerate(_QKV))
            pairs = query.shape[:-1].numel() * key.shape[-2]
            flops = 2 * pairs * (query.shape[-1] + value.shape[-1])
            if query.shape[-2] == key.shape[-2]:
                self.own += flops
            else:
                self.cross += flops
        return func(*args, **kwargs)


_QKV = ("query", "key", "value")


class _NoAttention(FlopCounterMode):
    """torch's counter for everything but attention, which `_AttentionFlops` counts."""

    def total(self) -> float:
        counts = self.get_flop_counts().get("Global", {})
        return float(sum(v for operator, v in counts.items() if "attention" not in str(operator)))


class _Watch:
    """Times every forward pass of the denoisers, and counts the FLOPs of the first if asked.

    `spent` tells the seconds of attention so far; what the first pass spends, which also builds kernels and masks, is
    kept apart.
    """

    def __init__(self, pipe: Any, count: bool, spent: Callable[[], float]):
        self.models = [m for name in DENOISERS if isinstance(m := getattr(pipe, name, None), torch.nn.Module)]
        self.count, self.spent = count, spent
        self.first_attention = 0.0
        self.seconds: list[float] = []
        self.own, self.other = 0.0, 0.0
        self._start = 0.0
        self._counting: ExitStack | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(lambda *_: self._before()) for m in self.models]
        handles += [m.register_forward_hook(lambda *_: self._after()) for m in self.models]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if self._counting is not None:
                self._counting.close()

    def _before(self) -> None:
        if self.count and not self.seconds:
            self._counting = ExitStack()
            self._modes = _NoAttention(display=False), _AttentionFlops()
            for mode in self._modes:
                self._counting.enter_context(mode)
        self._start = clock(next(self.models[0].parameters()))

    def _after(self) -> None:
        self.seconds.append(clock(next(self.models[0].parameters())) - self._start)
        if len(self.seconds) == 1:
            self.first_attention = self.spent()
        if self._counting is not None:
            self._counting.close()
            self._counting = None
            self.own, self.other = self._modes[1].own, self._modes[0].total() + self._modes[1].cross


def probe(pipe: Any, request: Request, plan: Any, backend: str, dense: Probe | None) -> Probe:
    """Make a short clip and look at it.

    Args:
        plan: A plan, or None for dense.
        dense: The dense probe, whose FLOPs a plan's are a share of; None for dense itself.

    Raises:
        ValueError: the pipeline has no denoiser that can be watched, or what the plan refuses.
    """
    short = replace(request, steps=min(request.steps or PROBE_STEPS, PROBE_STEPS))
    attention, density = AttentionClock(), 1.0

    def spent() -> float:
        return attention.seconds if plan is None else sum(layer.seconds or 0.0 for layer in report_of(pipe))

    watch = _Watch(pipe, dense is None, spent)
    if not watch.models:
        raise ValueError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}, so its steps cannot be watched")
    memory = PeakMemory(next(watch.models[0].parameters()).device)
    with ExitStack() as stack:
        if plan is None:
            stack.enter_context(attention)
        else:
            stack.enter_context(sparsified(pipe, plan, backend=backend))
            report_of(pipe, profile=True)
        with watch.watching():
            run_request(pipe, short)
        all_attention = spent()
        if plan is not None:
            found = report_of(pipe).density
            density = 1.0 if found is None else float(found)
    share = (all_attention - watch.first_attention) / max(sum(watch.seconds[1:]), 1e-9)
    own, other = (watch.own, watch.other) if dense is None else (dense.attention_flops, 0.0)
    total = own + other if dense is None else dense.dense_flops
    return Probe(
        attention_share=min(1.0, share),
        density=density,
        flops=total - own * (1 - density),
        dense_flops=total,
        attention_flops=own,
        peak_bytes=memory.read(),
    )


class PeakMemory:
    """Highest memory since it was made: CUDA's allocator, or the resident memory of the process (Linux)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            # 5 resets the high-water mark.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self.known = False

    def read(self) -> int | None:
        """Bytes, or None where the system does not tell."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if not self.known:
            return None
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        found = next((line for line in lines if line.startswith("VmHWM")), None)
        return None if found is None else 1024 * int(found.split()[1])


def probe_plans(
    pipe: Any, request: Request, plans: Mapping[str, Any], backend: str, kept: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """A probe of every plan as plain data, dense (None) first; those in `kept` are not repeated."""
    found: dict[str, Probe] = {name: Probe(**kept[name]) for name in plans if name in kept}
    dense = next((found[name] for name, plan in plans.items() if plan is None and name in found), None)
    for name, plan in plans.items():
        if name not in found:
            found[name] = probe(pipe, request, plan, backend, dense)
        if plan is None:
            dense = found[name]
    return {name: asdict(found[name]) for name in plans}


def summarise_steps(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds a step over clips: median, quartiles and number; clips whose step times are unknown do not count.

    `runs` hold "step_seconds", without each clip's first step, which also warms up.
    """
    import numpy as np

    seconds = [value for run in runs for value in run.get("step_seconds") or ()]
    if not seconds:
        return {"n": 0, "median": None, "quartiles": None}
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return {"n": len(seconds), "median": middle, "quartiles": [low, high]}


def read_kept(path: Path, identity: Any) -> dict[str, Any]:
    """Probes stored for the same study; empty where there are none or the study has changed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = isinstance(data, dict) and data.get("identity") == json.loads(json.dumps(identity))
    return data.get("probes", {}) if same else {}
