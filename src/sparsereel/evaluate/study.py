"""A study: every prompt and seed dense and with every plan, measured against dense; resumable clip by clip.

Each clip is a safetensors file (fp16, so neither a codec nor rounding to 8 bits enters the figures) with a JSON beside
it that says what it is. A clip whose JSON says the same is kept. A folder that holds another study is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsereel.evaluate.config import COSTS, DENSE, StudyConfig
from sparsereel.evaluate.efficiency import summarise_steps
from sparsereel.evaluate.judging import can_judge, judge_clips, judge_table
from sparsereel.evaluate.plots import on_front
from sparsereel.evaluate.shards import Shard, this_shard, wait_until
from sparsereel.files import replacing, write_json
from sparsereel.generation import Clip, Request, environment, generate, load_pipeline, request_data
from sparsereel.plan import AttentionPlan

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One clip of a study: which prompt, seed and plan, and where it lies."""

    number: int
    prompt: str
    seed: int
    plan: str
    path: Path
    identity: dict[str, Any]

    @property
    def sidecar(self) -> Path:
        return self.path.with_suffix(".json")

    def done(self) -> dict[str, Any] | None:
        """The sidecar, if the clip is there and is this one."""
        try:
            found = json.loads(self.sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if self.path.is_file() and found.get("identity") == json.loads(json.dumps(self.identity)) else None

    def found(self) -> dict[str, Any]:
        """The sidecar of a clip that must be there."""
        done = self.done()
        if done is None:
            raise ValueError(f"the clip {self.path} is gone or has changed; run the study again")
        return done


class _Pipeline:
    """The study's pipeline, loaded when a clip or a probe first needs it."""

    def __init__(self, config: StudyConfig, shard: Shard):
        self.config, self.shard = config, shard
        self.loaded: Any = None

    def get(self) -> Any:
        if self.loaded is None:
            config = self.config
            self.loaded = load_pipeline(config.model, config.dtype, self.shard.device(config.device))
        return self.loaded


def run_study(config: StudyConfig, output: Path, *, update: bool = False, say: Say = lambda text: None) -> dict:
    """Generate what is missing, measure everything, write `result.json` and `report.html`; returns the result.

    Args:
        update: Accept a folder made with another configuration; clips that are still the same are kept.

    Raises:
        ValueError: the folder holds another study, or what the pipeline, plans or metrics refuse.
    """
    from sparsereel.evaluate.html import write_report
    from sparsereel.presets import resolve_plan

    plans: dict[str, AttentionPlan | None] = {DENSE: None}
    plans |= {name: resolve_plan(source) for name, source in config.plans.items()}
    _claim(output, config, plans, update, write=this_shard().is_first)
    cells = list_cells(config, output, plans)
    shard = this_shard()
    pipe = _Pipeline(config, shard)
    groups = [cells[start : start + len(plans)] for start in range(0, len(cells), len(plans))]
    _generate(config, [cell for group in shard.share(groups) for cell in group], plans, pipe, say)
    if not shard.is_first:
        return {}
    if shard.count > 1:
        wait_until(lambda: all(cell.done() for cell in cells))
    probes = _probe(config, output, plans, pipe, say) if config.efficiency else {}
    result = measure_study(config, cells, [cell.found() for cell in cells], probes, say)
    result["plans"] = {name: plan.to_dict() for name, plan in plans.items() if plan is not None}
    write_json(output / "result.json", result)
    write_report(output / "report.html", result, {cell.path.stem: cell.path for cell in cells})
    return result


def _claim(
    output: Path, config: StudyConfig, plans: dict[str, AttentionPlan | None], update: bool, write: bool
) -> None:
    """Mark the folder as this study's; with `write` off only see that it is not another's."""
    ours = json.loads(json.dumps({**asdict(config), "plan_contents": {k: v and v.to_dict() for k, v in plans.items()}}))
    mark = output / "study.json"
    if mark.is_file() and not update:
        try:
            theirs = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{mark} is damaged ({error}); give another folder, or --update") from error
        # What only decides how results are shown may change freely.
        free = ("name", "thresholds", "lpips", "judge", "efficiency")
        differ = [k for k in ours if k not in free and ours[k] != theirs.get(k)]
        if differ:
            raise ValueError(
                f"{output} holds a study with other {', '.join(differ)}; give another folder, or --update to redo "
                "what has changed"
            )
    if write:
        write_json(mark, ours)


def list_cells(config: StudyConfig, output: Path, plans: dict[str, AttentionPlan | None]) -> list[Cell]:
    """All clips, dense next to its plans, so that drift of the machine meets all alike. Prompts name no files."""
    cells = []
    settings = {"model": config.model, "dtype": config.dtype, "backend": config.backend, "device": config.device}
    for number, prompt in enumerate(config.prompts):
        for seed in config.seeds:
            for index, (name, plan) in enumerate(plans.items()):
                request = _request(config, prompt, seed)
                contents = None if plan is None else plan.to_dict()
                identity = {"request": request_data(request), "plan_contents": contents, **settings}
                path = output / "clips" / f"{number:04d}-{seed}-{index}.safetensors"
                cells.append(Cell(number, prompt, seed, name, path, identity))
    return cells


def _request(config: StudyConfig, prompt: str, seed: int) -> Request:
    names = ("steps", "guidance", "frames", "height", "width", "negative_prompt")
    return Request(prompt, seed, **{name: getattr(config, name) for name in names})


def _generate(
    config: StudyConfig, cells: Sequence[Cell], plans: dict[str, AttentionPlan | None], source: _Pipeline, say: Say
) -> None:
    import torch
    from safetensors.torch import save_file

    found = [cell.done() for cell in cells]
    pending = sum(done is None for done in found)
    if pending < len(cells):
        say(f"{len(cells) - pending} of {len(cells)} clips are there already and are kept")
    seen: set[str] = set()
    for place, (cell, done) in enumerate(zip(cells, found, strict=True), start=1):
        if done is None:
            pipe = source.get()
            if hasattr(pipe, "set_progress_bar_config"):
                pipe.set_progress_bar_config(desc=cell.plan)
            say(f"clip {place} of {len(cells)}: {cell.plan}, seed {cell.seed}, {cell.prompt}")
            clip = generate(pipe, _request(config, cell.prompt, cell.seed), plans[cell.plan], backend=config.backend)
            with replacing(cell.path) as temporary:
                save_file({"video": torch.tensor(clip.exact).half().contiguous()}, temporary)
            done = {
                "identity": json.loads(json.dumps(cell.identity)),
                "seconds": clip.seconds,
                "step_seconds": list(clip.step_seconds),
                # The first clip of a plan also builds kernels and masks: its time is shown but not counted.
                "warm": cell.plan in seen,
                **_densities(clip),
                "environment": environment(),
            }
            # Last: a sidecar means that the clip is complete.
            write_json(cell.sidecar, done)
            seen.add(cell.plan)


def _probe(
    config: StudyConfig, output: Path, plans: dict[str, AttentionPlan | None], source: _Pipeline, say: Say
) -> dict[str, dict[str, Any]]:
    """Attention's share, FLOPs and memory of every plan, from short clips; kept beside the clips."""
    from sparsereel.evaluate.efficiency import probe_plans, read_kept

    request = _request(config, config.prompts[0], config.seeds[0])
    settings = {"model": config.model, "dtype": config.dtype, "backend": config.backend, "device": config.device}
    contents = {name: plan and plan.to_dict() for name, plan in plans.items()}
    identity = {"request": request_data(request), "plans": contents, **settings}
    path = output / "efficiency.json"
    kept = read_kept(path, identity)
    if set(kept) >= set(plans):
        return {name: kept[name] for name in plans}
    say("probing every plan: attention's share, FLOPs, memory")
    try:
        probes = probe_plans(source.get(), request, plans, config.backend, kept)
    except ValueError as error:
        say(f"no efficiency figures: {error}")
        return {}
    write_json(path, {"identity": json.loads(json.dumps(identity)), "probes": probes})
    return probes


def _densities(clip: Clip) -> dict[str, float]:
    """Share of blocks visited and of pairs allowed; 1 for a dense clip and where no layer was replaced."""
    kinds = ("density", "token_density")
    found = {kind: None if clip.report is None else getattr(clip.report, kind) for kind in kinds}
    return {kind: 1.0 if share is None else share for kind, share in found.items()}


def measure_study(
    config: StudyConfig,
    cells: Sequence[Cell],
    sidecars: Sequence[dict[str, Any]],
    probes: dict[str, dict[str, Any]] | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Figures of every clip against its dense one and by the judge, and their summaries a plan."""
    from sparsereel.evaluate.comparison import load_measure
    from sparsereel_eval.paired import compare_clips

    lpips = load_measure(config.lpips, None, download=False, say=say)
    judged: dict[Path, dict[str, float]] = {}
    if config.judge == "auto" and can_judge(config.prompts):
        judged = judge_clips({cell.path: cell.prompt for cell in cells})
    dense = {(c.number, c.seed): (c, s) for c, s in zip(cells, sidecars, strict=True) if c.plan == DENSE}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in config.plans}
    compared: dict[str, list[Any]] = {name: [] for name in config.plans}
    for cell, sidecar in zip(cells, sidecars, strict=True):
        if cell.plan == DENSE:
            continue
        base, base_sidecar = dense[cell.number, cell.seed]
        pair = compare_clips(base.path, cell.path, lpips=lpips)
        compared[cell.plan].append(pair)
        about = {"prompt": cell.prompt, "seed": cell.seed, "clip": cell.path.stem, "dense_clip": base.path.stem}
        times = {"seconds": sidecar["seconds"], "dense_seconds": base_sidecar["seconds"]}
        warm = sidecar["warm"] and base_sidecar["warm"]
        shares = {kind: sidecar[kind] for kind in ("density", "token_density")}
        own, other = judged.get(cell.path, {}), judged.get(base.path, {})
        extra = {**shares, "warm": warm, "values": pair.values, "missing": pair.missing}
        extra |= {"judged": own, "dense_judged": other, "step_seconds": sidecar.get("step_seconds", [])}
        runs[cell.plan].append({**about, **times, **extra, "per_frame": pair.per_frame})
    summary = {name: _summary(runs[name], compared[name]) for name in config.plans}
    steps = {DENSE: [sidecar for _, sidecar in dense.values()], **runs}
    sentences = [f"{n}: {s}" for n, row in summary.items() for s in _missed(row, config.thresholds)]
    _mark_front(summary)
    return {
        "config": json.loads(json.dumps(asdict(config))),
        "environment": environment(),
        "environments": _environments(sidecars),
        "summary": summary,
        "efficiency": {
            name: {"step_seconds": summarise_steps(rows), **(probes or {}).get(name, {})}
            for name, rows in steps.items()
        },
        "between": _between(config, compared),
        "runs": runs,
        "missed": sentences,
    }


def _summary(runs: list[dict[str, Any]], compared: list[Any]) -> dict[str, Any]:
    import numpy as np

    from sparsereel_eval.intervals import summarise
    from sparsereel_eval.paired import aggregate

    timed = [run for run in runs if run["warm"]] or runs
    # Ratios: averaged and resampled as logarithms, prompt by prompt.
    logs = summarise(
        [float(np.log(run["dense_seconds"] / run["seconds"])) for run in timed], [run["prompt"] for run in timed]
    )
    interval = None if logs["interval"] is None else [float(np.exp(end)) for end in logs["interval"]]
    return {
        "clips": len(runs),
        "density": float(np.mean([run["density"] for run in runs])),
        "token_density": float(np.mean([run["token_density"] for run in runs])),
        "speedup": float(np.exp(logs["mean"])),
        "speedup_interval": interval,
        "speedup_clips": len(timed),
        "speedup_is_warm": all(run["warm"] for run in timed),
        "figures": aggregate(compared, [run["prompt"] for run in runs]) | judge_table(runs),
    }


def _missed(row: dict[str, Any], thresholds: dict[str, float]) -> list[str]:
    """A sentence for every threshold that a plan misses; after hours of work also for one nothing was measured for."""
    from sparsereel_eval.paired import missed

    costs = {name: {"mean": row[name], "higher_is_better": higher} for name, higher in COSTS.items()}
    table = row["figures"] | costs
    known = {name: wanted for name, wanted in thresholds.items() if name in table}
    unknown = [name for name in thresholds if name not in table]
    return missed(table, known) + [f"{name} was not measured, its threshold cannot be checked" for name in unknown]


def _mark_front(summary: dict[str, dict[str, Any]]) -> None:
    """Which plans no other beats in both speed and PSNR."""
    front = on_front({name: (row["speedup"], row["figures"]["psnr"]["mean"]) for name, row in summary.items()})
    for name, row in summary.items():
        row["on_front"] = name in front


def _environments(sidecars: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The different environments clips were made in, each with how many."""
    counted: dict[str, int] = {}
    for sidecar in sidecars:
        key = json.dumps(sidecar["environment"], sort_keys=True)
        counted[key] = counted.get(key, 0) + 1
    return [{"clips": number, **json.loads(key)} for key, number in counted.items()]


def _between(config: StudyConfig, compared: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """PSNR of every two plans, paired by prompt (seeds averaged): mean difference, interval, p of Wilcoxon's test."""
    from sparsereel_eval.intervals import group_means, summarise, wilcoxon

    groups = [prompt for prompt in config.prompts for _ in config.seeds]
    rows, names = [], list(config.plans)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            left, right = (group_means([pair.values["psnr"] for pair in compared[n]], groups) for n in (a, b))
            row = summarise((left - right).tolist())
            rows.append({"a": a, "b": b, "figure": "psnr", **row, "p": wilcoxon(left.tolist(), right.tolist())})
    return rows
