"""Measuring a plan on prompts that the search has not seen: dense and sparse clips of the same seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from statistics import mean
from typing import Any

from sparsereel.generation import Clip, generate
from sparsereel.media import Frames
from sparsereel.plan import AttentionPlan
from sparsereel.search.record import Study

#: prompts whose clips the report shows
SHOWN = 3
logger = logging.getLogger("sparsereel")


class HeldOut:
    """The held-out prompts; their dense clips are made once and kept in memory."""

    def __init__(self, pipe: Any, study: Study, on_step: Callable[[int], None]) -> None:
        self._pipe = pipe
        self._study = study
        self._on_step = on_step
        # On a GPU, clocks inside the model would make it wait.
        self._profile = str(getattr(pipe, "device", "cpu")) == "cpu"
        self._dense: dict[int, Clip] = {}
        self._shown: list[list[tuple[str, int, Frames, Frames]]] = []

    def shown(self, turn: int) -> list[tuple[str, int, Frames, Frames]]:
        """(prompt, seed, dense frames, sparse frames) of the first SHOWN prompts in measurement `turn`."""
        return self._shown[turn]

    def measure(self, plan: AttentionPlan) -> dict[str, Any]:
        """Means over the held-out prompts, and one row a prompt under "clips"."""
        settings = self._study.settings
        rows = []
        self._shown.append([])
        for number in settings.measuring:
            request = settings.request(number)
            if number not in self._dense:
                self._dense[number] = generate(self._pipe, request, profile=self._profile)
                self._on_step(self._study.facts.steps)
            sparse = generate(self._pipe, request, plan, backend=settings.backend, profile=self._profile)
            self._on_step(self._study.facts.steps)
            rows.append(self._row(number, self._dense[number], sparse))
            if len(rows) <= SHOWN:
                pair = (self._dense[number].frames, sparse.frames)
                self._shown[-1].append((settings.prompts[number], settings.seed + number, *pair))
        names = [name for name in rows[0] if name not in ("prompt", "seed")]
        means = {name: mean(float(row[name]) for row in rows) for name in names}
        means["speedup"] = means["dense_seconds"] / means["seconds"]
        return {**means, "clips": rows}

    def _row(self, number: int, dense: Clip, sparse: Clip) -> dict[str, Any]:
        from sparsereel_eval.fidelity import WINDOW, psnr, ssim

        settings = self._study.settings
        prompt = settings.prompts[number]
        row: dict[str, Any] = {
            "prompt": prompt,
            "seed": settings.seed + number,
            "psnr": psnr(dense.exact, sparse.exact),
            "seconds": sparse.seconds,
            "dense_seconds": dense.seconds,
            "density": 1.0 if sparse.report is None or sparse.report.density is None else sparse.report.density,
        }
        if self._profile:
            row |= {"attention_seconds": sparse.attention_seconds, "dense_attention_seconds": dense.attention_seconds}
        if min(dense.exact.shape[1:3]) >= WINDOW:
            row["ssim"] = ssim(dense.exact, sparse.exact)
        if any(kind.__name__ == "MiniReelPipeline" for kind in type(self._pipe).__mro__):
            row |= _judged(prompt, dense, sparse)
        return row


def _judged(prompt: str, dense: Clip, sparse: Clip) -> dict[str, Any]:
    """Whether minireel's judge finds what the prompt asks for; nothing where it cannot read the prompt."""
    from sparsereel_eval.judge import Judge

    judge = Judge()
    try:
        return {
            "dense_sound": float(judge.score(dense.frames, prompt).sound),
            "sound": float(judge.score(sparse.frames, prompt).sound),
        }
    except ValueError as error:
        logger.debug("not judged: %s", error)
        return {}
