"""Recording: what every candidate would do to every head, one dense run a prompt.

Only sums are kept. Each prompt has a file of its own, complete or absent, and totals are always added in the order of
the prompts: a search that was killed and goes on ends in the same bits as one that ran through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sparsereel.families.layout import Layout, decode
from sparsereel.files import replacing
from sparsereel.kernel_choice import kernel_for
from sparsereel.plan_entries import Method
from sparsereel.plan_parse import describe_use
from sparsereel.search.errors import SAMPLES, AttentionCall, RowMasks, Sums, measure
from sparsereel.search.settings import Bucket, Settings
from sparsereel.search.watch import ModelFacts, run, watched
from sparsereel.step import StepInfo
from sparsereel.team import Team
from sparsereel.token_order import GENERAL_TILE, tile_order

#: format of the files
VERSION = 2
#: steps looked at in each stretch
STEPS_EACH = 2

Key = tuple[str, int, int]
"""Component, layer, bucket."""


@dataclass(frozen=True)
class Study:
    """All that a recording depends on. `folder` is where its files lie; None = in memory only."""

    settings: Settings
    facts: ModelFacts
    candidates: tuple[Method, ...]
    buckets: tuple[Bucket, ...]
    folder: Path | None

    @cached_property
    def kernel(self) -> str:
        """Name of the backend that sparse calls will run on."""
        layer = next(iter(self.facts.layers.values()))
        tokens, heads = decode(layer.layout).seq_len, layer.heads
        device, dtype = self.facts.device_type, self.facts.dtype
        return kernel_for(self.settings.backend, device, dtype, tokens, heads=heads, head_dim=layer.head_dim)

    @classmethod
    def of(
        cls,
        settings: Settings,
        facts: ModelFacts,
        candidates: tuple[Method, ...],
        buckets: tuple[Bucket, ...],
        folder: Path | None,
    ) -> Study:
        """The study, in a sub-folder of its own: other settings never meet its files."""
        study = cls(settings, facts, candidates, buckets, None)
        return study if folder is None else cls(settings, facts, candidates, buckets, folder / study.identity())

    def description(self) -> dict[str, Any]:
        """Plain data that two equal studies share."""
        s = self.settings
        # A part of the steps is run where a small result leads.
        asked = {"asked_steps": s.steps} if self.facts.led else {}
        return {
            **asked,
            "version": VERSION,
            "model": self.facts.fingerprint,
            "layouts": self.facts.geometry(),
            "dtype": str(self.facts.dtype),
            "steps": self.facts.steps,
            "size": [s.frames, s.height, s.width, s.guidance],
            "prompts": [s.prompts[i] for i in s.calibrating],
            "seed": s.seed,
            "buckets": [bucket.stretch.text for bucket in self.buckets],
            "candidates": [describe_use(method) for method in self.candidates],
            "samples": [SAMPLES, STEPS_EACH],
        }

    def identity(self) -> str:
        """Short hash of the description."""
        text = json.dumps(self.description(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Recording:
    """Totals over prompts, by component, layer and bucket."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.sums: dict[Key, Sums] = {}

    def add(self, other: dict[Key, Sums]) -> None:
        """Add the sums of one prompt."""
        for key, sums in other.items():
            if key not in self.sums:
                self.sums[key] = Sums.zeros(*sums.error.shape)
            self.sums[key].add(sums)

    def check(self) -> None:
        """Raise ValueError where a layer that ran could not be looked at in any step."""
        recorded = {(component, layer) for component, layer, _ in self.sums}
        ran = {component for component, _ in recorded}
        layers = self.study.facts.layers.items()
        missing = [facts.name for key, facts in layers if key[0] in ran and key not in recorded]
        if missing or not ran:
            missing = missing or [facts.name for _, facts in layers]
            raise ValueError(f"{len(missing)} layers could not be recorded, such as {missing[0]}")


class PromptRecorder:
    """Watches one run and adds up what it sees at the sampled steps."""

    def __init__(self, study: Study, on_step: Callable[[int], None]) -> None:
        self.study = study
        self.sums: dict[Key, Sums] = {}
        self._on_step = on_step
        self._masks = RowMasks()
        self._bucket_of = {s: i for i, bucket in enumerate(study.buckets) for s in bucket.sampled(STEPS_EACH)}

    def __call__(
        self,
        component: str,
        layer: int,
        layout: Layout,
        step: StepInfo | None,
        q: Any,
        k: Any,
        v: Any,
        lengths: Any,
        scale: float | None,
    ) -> None:
        if step is None:
            raise ValueError("the denoising step is unknown here, so choices cannot be made step by step")
        self._on_step(step.index)
        bucket = self._bucket_of.get(step.index)
        if bucket is None:
            return
        grid = decode(layout)
        call = AttentionCall(
            q,
            k,
            v,
            grid,
            layer=layer,
            step=step.index,
            steps=step.total,
            lengths=lengths,
            scale=scale,
            order=tile_order(layout, GENERAL_TILE) if sees_tiles(layout) else None,
            backend=self.study.settings.backend,
        )
        key = (component, layer, bucket)
        if key not in self.sums:
            self.sums[key] = Sums.zeros(q.shape[1], len(self.study.candidates))
        self.sums[key].add(measure(call, self.study.candidates, self._masks))


def sees_tiles(layout: Layout) -> bool:
    """Whether selectors are judged in tile order, which plans of many selectors run in."""
    grid = decode(layout)
    return grid.seq_len > GENERAL_TILE[0] * GENERAL_TILE[1] * GENERAL_TILE[2]


def record(
    pipe: Any, study: Study, on_step: Callable[[int], None], on_kept: Callable[[], None], team: Team
) -> Recording:
    """Record all calibration prompts; those with a finished file are taken from it.

    Args:
        on_step: told each step number that a run reaches.
        on_kept: told of each prompt that was already there.
        team: processes that share the prompts; each ends with the whole recording.
    """
    if team.size > 1:
        for number in study.settings.calibrating:
            if team.does(number):
                _recorded(pipe, study, number, on_step, on_kept)
        team.meet()
    total = Recording(study)
    for number in study.settings.calibrating:
        total.add(_recorded(pipe, study, number, on_step, on_kept))
    total.check()
    return total


def _recorded(
    pipe: Any, study: Study, number: int, on_step: Callable[[int], None], on_kept: Callable[[], None]
) -> dict[Key, Sums]:
    path = None if study.folder is None else study.folder / f"prompt-{number:04d}.safetensors"
    sums = None if path is None else load_sums(path)
    if sums is not None:
        on_kept()
        return sums
    recorder = PromptRecorder(study, on_step)
    with watched(pipe, recorder, study.settings.backend):
        run(pipe, study.settings.request(number))
    if path is not None:
        save_sums(path, recorder.sums)
    return recorder.sums


def save_sums(path: Path, sums: dict[Key, Sums]) -> None:
    """Write the sums of one prompt in one move."""
    from safetensors.torch import save_file

    tensors = {
        f"{component}|{layer}|{bucket}|{field.name}": getattr(one, field.name).contiguous()
        for (component, layer, bucket), one in sums.items()
        for field in fields(Sums)
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def load_sums(path: Path) -> dict[Key, Sums] | None:
    """The sums of a finished prompt; None where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        grouped: dict[Key, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            component, layer, bucket, field = name.split("|")
            grouped.setdefault((component, int(layer), int(bucket)), {})[field] = tensor
        return {key: Sums(**grouped[key]) for key in sorted(grouped)}
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"the recording {path} is damaged ({error}); delete it to record it again") from error
