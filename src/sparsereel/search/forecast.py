"""From weighted error to PSNR and from attention time to clip time, by what was measured on a calibration prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sparsereel.files import write_json
from sparsereel.generation import generate
from sparsereel.patterns import Full
from sparsereel.plan import AttentionPlan
from sparsereel.search.record import Study

CAP = 100.0
#: dB of PSNR for each dB of error: bounds on what a fit may say
SLOPES = (0.3, 1.5)
#: bounds on the part of dense attention that visiting nothing would save, and the share above which none is inferred
GAINS = (0.05, 1.5)
NEARLY_DENSE = 0.9


@dataclass(frozen=True)
class Anchor:
    """Three clips of the first prompt: untouched, dense on our kernels, and with the middling candidate everywhere.

    Attributes:
        seconds, attention: of the untouched clip, whole and inside self-attention.
        own_attention: inside self-attention where it is dense on our kernels.
        psnr: of the middling clip.
        sparse_attention: inside self-attention of the middling clip; None = was not measured.
    """

    seconds: float
    attention: float
    own_attention: float
    psnr: float
    sparse_attention: float | None = None


def measure_anchor(pipe: Any, study: Study, middling: AttentionPlan, on_step: Callable[[int], None]) -> Anchor:
    """Measure it, or take it from the folder of the study."""
    from sparsereel_eval.fidelity import psnr

    path = None if study.folder is None else study.folder / "anchor.json"
    if path is not None and path.is_file():
        return Anchor(**json.loads(path.read_text(encoding="utf-8")))
    request, backend = study.settings.request(0), study.settings.backend
    untouched = generate(pipe, request, profile=True)
    on_step(study.facts.steps)
    own = generate(pipe, request, AttentionPlan.uniform(Full()), backend=backend, profile=True)
    on_step(study.facts.steps)
    sparse = generate(pipe, request, middling, backend=backend, profile=True)
    on_step(study.facts.steps)
    anchor = Anchor(
        untouched.seconds,
        untouched.attention_seconds or 0.0,
        own.attention_seconds or 0.0,
        psnr(untouched.exact, sparse.exact) if untouched.exact.ndim == 4 else CAP,
        sparse.attention_seconds,
    )
    if path is not None:
        write_json(path, asdict(anchor))
    return anchor


@dataclass(frozen=True)
class Forecast:
    """Predictions; `learn` takes in what was measured.

    Attention's seconds are a line in its share, from dense on our kernels through the latest sparse clip measured: what
    a call costs however little it visits (lists, selection, small launches) does not shrink with the share.

    Attributes:
        points: (weighted error, PSNR) pairs known.
        gain: part of the dense seconds that visiting nothing would save; 1 = all of them.
        excess: density over the one predicted.
        measured_rest: seconds of a sparse clip outside of attention; None = those of the untouched one.
    """

    anchor: Anchor
    points: tuple[tuple[float, float], ...]
    gain: float = 1.0
    excess: float = 1.0
    measured_rest: float | None = None

    @classmethod
    def of(cls, anchor: Anchor, error: float, share: float) -> Forecast:
        """The forecast before any plan is measured; `error` and `share` are those predicted of the middling clip."""
        forecast = cls(anchor, ((error, anchor.psnr),))
        return forecast if anchor.sparse_attention is None else forecast._timed(share, anchor.sparse_attention)

    def seconds(self, share: float) -> float:
        """Seconds of a clip whose attention takes `share` of the dense time."""
        return self._rest + self.anchor.own_attention * (1 - self.gain * (1 - share))

    def speedup(self, share: float) -> float:
        """Seconds of the untouched clip over those."""
        return self.anchor.seconds / max(self.seconds(share), 1e-9)

    def share_for(self, speedup: float) -> float:
        """The share that `speedup` needs; negative where attention alone cannot give it."""
        part = (self.anchor.seconds / speedup - self._rest) / max(self.anchor.own_attention, 1e-9)
        return 1 - (1 - part) / self.gain

    @property
    def _rest(self) -> float:
        if self.measured_rest is not None:
            return self.measured_rest
        return max(0.0, self.anchor.seconds - self.anchor.attention)

    def _timed(self, share: float, attention: float) -> Forecast:
        """The line through a sparse clip's share and seconds in attention; a nearly dense one says too little."""
        own = self.anchor.own_attention
        if share > NEARLY_DENSE or own <= 0:
            return self
        return replace(self, gain=float(np.clip((own - attention) / (own * (1 - share)), *GAINS)))

    def psnr(self, error: float) -> float:
        """dB of a clip against the dense one."""
        if error <= 0:
            return CAP
        slope, offset = self._line()
        return min(CAP, offset - slope * _decibels(error))

    def error_for(self, psnr: float) -> float:
        """The weighted error that a PSNR allows."""
        slope, offset = self._line()
        return float(10 ** ((offset - psnr) / slope / 10))

    def _line(self) -> tuple[float, float]:
        """psnr = offset - slope * dB of error, by least squares; through the latest point where the fit is bound."""
        known = [(_decibels(error), psnr) for error, psnr in self.points if error > 0 and psnr < CAP]
        if not known:
            return 1.0, 30.0
        x, y = (np.array(values) for values in zip(*known, strict=True))
        slope = 1.0
        if len(known) > 1 and np.ptp(x) > 0.5:
            slope = float(np.clip(-np.polyfit(x, y, 1)[0], *SLOPES))
        # The latest point is the nearest to the target, and on other prompts than the first.
        return slope, float(y[-1] + slope * x[-1])

    def learn(self, error: float, share: float, measured: dict[str, Any]) -> Forecast:
        """The forecast after a plan of that predicted error and share was measured."""
        known = replace(self, points=(*self.points, (error, measured["psnr"])))
        # The machine may run at another pace than when the anchor was measured: dense clips tell.
        if measured.get("dense_attention_seconds"):
            pace = self.anchor.attention / measured["dense_attention_seconds"]
            rest = (measured["seconds"] - measured["attention_seconds"]) * self.anchor.seconds
            known = replace(known, measured_rest=rest / measured["dense_seconds"])
            return known._timed(share, measured["attention_seconds"] * pace)
        # What the rest of a clip took by chance counts as attention's here.
        seconds = measured["seconds"] * self.anchor.seconds / measured["dense_seconds"]
        return known._timed(share, max(seconds - self._rest, 0.0))


def _decibels(error: float) -> float:
    return 10 * math.log10(error)
