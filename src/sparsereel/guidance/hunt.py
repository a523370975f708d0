"""HeadHunter: which heads to perturb, found greedily for an objective (arXiv 2506.10978).

Start with no head. In each round every candidate head is added to the set in turn, clips are generated with the set
perturbed, and the objective scores them; the best heads join the set. The set with the best score of all is the
result. The paper's rounds, heads a round and prompts are not known; here they are arguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from sparsereel.families import find, models_of
from sparsereel.files import write_json
from sparsereel.generation import Request, generate
from sparsereel.guidance.perturbation import HeadPerturbation
from sparsereel.guidance.pipelines import guided
from sparsereel.plan import AttentionPlan
from sparsereel.search.progress import Bar, bar, silenced
from sparsereel.search.watch import fingerprint

Head = tuple[int, int]
"""Layer and head."""
Objective = Callable[[np.ndarray, str], float]
"""(frames uint8 [F, H, W, 3], prompt) -> score, higher is better."""


@dataclass(frozen=True)
class Hunt:
    """The result.

    Attributes:
        perturbation: the heads found; none where no set was better than none.
        score, baseline: mean objective with them and without any.
        history: every set that was tried, in order: heads and score.
        scale, start, stop: of the guidance they were tried with.
    """

    perturbation: HeadPerturbation
    score: float
    baseline: float
    history: tuple[tuple[tuple[Head, ...], float], ...]
    scale: float
    start: float
    stop: float

    def save(self, path: str | Path) -> None:
        """Write all of it as JSON in one move."""
        write_json(Path(path), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain data; "guider" holds the arguments of `HeadPerturbationGuidance`."""
        found = self.perturbation
        return {
            "guider": {
                "heads": found.table(),
                "strength": found.strength,
                "rows": found.rows,
                "perturbed_guidance_scale": self.scale,
                "perturbed_guidance_start": self.start,
                "perturbed_guidance_stop": self.stop,
            },
            "score": self.score,
            "baseline": self.baseline,
            "history": [{"heads": [list(head) for head in heads], "score": score} for heads, score in self.history],
        }


def hunt_heads(
    pipe: Any,
    prompts: Sequence[str],
    objective: Objective | str = "judge",
    *,
    rounds: int = 3,
    per_round: int = 1,
    heads: Iterable[Head] | None = None,
    shortlist: int | None = None,
    record: AttentionPlan | None = None,
    strength: float = 1.0,
    rows: str = "image",
    scale: float = 2.0,
    start: float = 0.0,
    stop: float = 1.0,
    steps: int | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Hunt:
    """Find the heads whose perturbation improves an objective most.

    Args:
        pipe: a diffusers pipeline with one model of a known family.
        prompts: what to generate; prompt number n with seed `seed + n`.
        objective: scores a clip; "judge" is minireel's judge (mean of digit, colour, direction, count, smoothness).
        rounds, per_round: heads join the set in `rounds` rounds, `per_round` a round.
        heads: (layer, head) candidates; None = all.
        shortlist: look only at so many candidates, those whose attention is most concentrated in `record`.
        record: a plan that `search` made for this model; its calibration tells how concentrated each head is.
        strength, rows: of `HeadPerturbation`. scale, start, stop: of `guided`.
        steps, frames, height, width, guidance: of the calls; None = the pipeline's own defaults.
        folder: where scores are kept, so that an interrupted hunt goes on there; None = nowhere.
        progress: show a bar with the time left.

    Raises:
        ValueError: no prompt, several models, a value out of range, an objective that is no number, a shortlist without
            a record.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError("prompts must be a list of texts that are not empty, with one at least")
    for name, value in (("rounds", rounds), ("per_round", per_round)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
    models = models_of(pipe)
    if len(models) != 1:
        raise ValueError(f"a hunt needs a pipeline with one model, got {', '.join(models)}")
    candidates = _candidates(models, heads, shortlist, record)
    size: dict[str, Any] = {"steps": steps, "frames": frames, "height": height, "width": width, "guidance": guidance}
    requests = [Request(prompt, seed=seed + number, **size) for number, prompt in enumerate(prompts)]
    options = {"scale": scale, "start": start, "stop": stop}
    with silenced(pipe), bar(progress) as shown:
        trial = _Trial(pipe, models, requests, objective, HeadPerturbation({}, strength, rows), options, folder, shown)
        shown.expect(1 + sum(len(candidates) - n * per_round for n in range(rounds)))
        shown.stage("hunting heads")
        return _greedy(trial, candidates, rounds, per_round)


def _greedy(trial: _Trial, candidates: list[Head], rounds: int, per_round: int) -> Hunt:
    history: list[tuple[tuple[Head, ...], float]] = []

    def score(heads: tuple[Head, ...]) -> float:
        history.append((heads, trial.score(heads)))
        return history[-1][1]

    baseline = score(())
    chosen: tuple[Head, ...] = ()
    for _ in range(rounds):
        left = [head for head in candidates if head not in chosen]
        if not left:
            break
        # Ties go to the earlier head.
        ranked = sorted(left, key=lambda head: -score(tuple(sorted((*chosen, head)))))
        chosen = tuple(sorted((*chosen, *ranked[:per_round])))
        if per_round > 1:
            score(chosen)
    best = max(history, key=lambda entry: entry[1])
    found = trial.perturbation(best[0])
    return Hunt(found, best[1], baseline, tuple(history), **trial.options)


def _candidates(
    models: dict[str, Any], heads: Iterable[Head] | None, shortlist: int | None, record: AttentionPlan | None
) -> list[Head]:
    ((component, model),) = models.items()
    family = find(model)
    assert family is not None
    counts = [family.heads(module) for _, module in family.self_attention(model)]
    every = [(layer, head) for layer, count in enumerate(counts) for head in range(count)]
    wanted = every if heads is None else [(int(layer), int(head)) for layer, head in heads]
    unknown = [head for head in wanted if head not in every]
    if unknown or not wanted:
        raise ValueError(f"the model has no head {unknown[0]}" if unknown else "there is no head to try")
    if shortlist is None:
        return wanted
    known = {} if record is None else record.calibration.get("heads", {}).get(component, {})
    if not known:
        raise ValueError("a shortlist needs record: a plan that search made for this model")
    if isinstance(shortlist, bool) or not isinstance(shortlist, int) or shortlist < 1:
        raise ValueError(f"shortlist must be a whole number, 1 or more, got {shortlist!r}")

    def spread(head: Head) -> float:
        return float(known[str(head[0])]["entropy"][head[1]])

    return sorted(sorted(wanted, key=spread)[:shortlist])


class _Trial:
    """Scores sets of heads; what was scored once is kept, in memory and in a file."""

    def __init__(
        self,
        pipe: Any,
        models: dict[str, Any],
        requests: list[Request],
        objective: Objective | str,
        empty: HeadPerturbation,
        options: dict[str, float],
        folder: str | Path | None,
        shown: Bar,
    ) -> None:
        self.pipe, self.requests, self.options = pipe, requests, options
        self.objective = objective if callable(objective) else _named(objective)
        self._empty = empty
        self._shown = shown
        name = objective if isinstance(objective, str) else getattr(objective, "__qualname__", "objective")
        self._about = {
            "model": fingerprint(models),
            "objective": name,
            "requests": [vars(request) for request in requests],
            "strength": empty.strength,
            "rows": empty.rows,
            **options,
        }
        self._path = None if folder is None else Path(folder) / "hunt.json"
        self._scores = self._kept()

    def perturbation(self, heads: Sequence[Head]) -> HeadPerturbation:
        """A set of heads, with the strength of this hunt."""
        table: dict[int, list[int]] = {}
        for layer, head in heads:
            table.setdefault(layer, []).append(head)
        return HeadPerturbation(table, self._empty.strength, self._empty.rows)

    def score(self, heads: tuple[Head, ...]) -> float:
        """Mean objective over the prompts with a set of heads perturbed."""
        key = " ".join(f"{layer}.{head}" for layer, head in heads)
        if key not in self._scores:
            with guided(self.pipe, self.perturbation(heads), **self.options):
                self._scores[key] = mean(map(self._of, self.requests))
            if self._path is not None:
                write_json(self._path, {"about": self._about, "scores": self._scores})
        self._shown.done(1)
        return self._scores[key]

    def _of(self, request: Request) -> float:
        value = self.objective(generate(self.pipe, request).frames, request.prompt)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not math.isfinite(value):
            raise ValueError(f"the objective must return a finite number, got {value!r} for {request.prompt!r}")
        return float(value)

    def _kept(self) -> dict[str, float]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            about, scores = kept["about"], kept["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the scores in {self._path} are damaged ({error}); delete the file") from error
        if about != json.loads(json.dumps(self._about)):
            raise ValueError(f"{self._path} is of another hunt (model, prompts or settings differ); use another folder")
        return {str(key): float(value) for key, value in scores.items()}


def _named(objective: object) -> Objective:
    if objective != "judge":
        raise ValueError(f"objective must be a function of (frames, prompt) or 'judge', got {objective!r}")
    from sparsereel_eval.judge import Judge

    judge = Judge()

    def judged(frames: np.ndarray, prompt: str) -> float:
        score = judge.score(frames, prompt)
        named = replace(score, direction=1.0) if score.direction is None else score
        return mean((named.digit, named.colour, named.direction or 0.0, named.count, named.smoothness))

    return judged
