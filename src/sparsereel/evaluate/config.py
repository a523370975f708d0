"""The configuration of a study: prompts x seeds x plans on one model, read from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DENSE = "dense"
#: costs of a plan that thresholds may name, and whether more is better
COSTS = {"speedup": True, "density": False, "token_density": False}


@dataclass(frozen=True)
class StudyConfig:
    """What a study generates and measures.

    Attributes:
        prompts: Texts; in YAML a list, or the path of a file with one a line.
        plans: Name in the report to preset or plan file; dense is always run beside them.
        seeds: One clip a prompt and seed.
        model: Folder or hub id of a pipeline; "minireel" is the model in the box.
        frames, height, width, steps, guidance, negative_prompt: As of `sparsereel generate`; None is the model's own.
        dtype, device, backend: As of `sparsereel generate`.
        lpips: "alex", "vgg" or "off".
        judge: "auto": minireel's judge scores the clips where it knows the words of every prompt; or "off".
        efficiency: Also probe every plan with a short clip: share of attention, FLOPs, peak memory.
        thresholds: Figure to the mean each plan must reach: those of `eval compare`, the judge's, and `COSTS`.
        name: Title of the report.
    """

    prompts: tuple[str, ...]
    plans: dict[str, str]
    seeds: tuple[int, ...] = (0,)
    model: str = "minireel"
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    backend: str = "auto"
    lpips: str = "alex"
    judge: str = "auto"
    efficiency: bool = True
    thresholds: dict[str, float] = field(default_factory=dict)
    name: str = "Study"

    def __post_init__(self) -> None:
        if not self.prompts or not all(isinstance(text, str) and text.strip() for text in self.prompts):
            raise ValueError("prompts must be a list of texts, or a file of them")
        if len(set(self.prompts)) != len(self.prompts):
            raise ValueError("a prompt is listed twice; use seeds for several clips of one prompt")
        if not self.plans or DENSE in self.plans:
            raise ValueError(f"plans must name one plan or more, none of them {DENSE!r}, which is always run")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(_is_int(s) for s in self.seeds):
            raise ValueError(f"seeds must be different whole numbers, got {list(self.seeds)}")
        for key in ("frames", "height", "width", "steps"):
            value = getattr(self, key)
            if value is not None and not (_is_int(value) and value >= 1):
                raise ValueError(f"{key} must be a whole number of 1 or more, got {value!r}")
        if self.lpips not in ("alex", "vgg", "off"):
            raise ValueError(f"lpips must be alex, vgg or off, got {self.lpips!r}")
        if self.judge not in ("auto", "off"):
            raise ValueError(f"judge must be auto or off, got {self.judge!r}")
        if not isinstance(self.efficiency, bool):
            raise ValueError(f"efficiency must be true or false, got {self.efficiency!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def load_config(path: Path) -> StudyConfig:
    """Read a YAML file; paths in it are relative to it.

    Raises:
        ValueError: unreadable, unknown keys (the allowed ones are listed), or wrong values.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold keys such as prompts and plans")
    allowed = [each.name for each in fields(StudyConfig)]
    unknown = [str(key) for key in data if key not in allowed]
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    absent = [key for key in ("prompts", "plans") if key not in data]
    if absent:
        raise ValueError(f"{path}: {' and '.join(absent)} must be given")
    try:
        return StudyConfig(**{**data, **_resolved(data, path.parent)})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _resolved(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    from sparsereel.batch import read_prompts
    from sparsereel.evaluate.judging import FIGURES
    from sparsereel_eval.paired import HIGHER_IS_BETTER, parse_thresholds

    prompts, plans = data["prompts"], data["plans"]
    if isinstance(prompts, str):
        prompts = read_prompts(folder / prompts)
    if isinstance(plans, list):
        plans = {Path(str(plan)).stem: plan for plan in plans}
    if not isinstance(prompts, list) or not isinstance(plans, dict):
        raise ValueError("prompts must be a list or a file name, plans a list or names with presets or files")
    # A name that is a file beside the configuration means that file.
    found = {str(k): str(folder / str(v)) if (folder / str(v)).is_file() else str(v) for k, v in plans.items()}
    seeds = data.get("seeds", [0])
    thresholds = data.get("thresholds") or {}
    if not isinstance(thresholds, dict):
        raise ValueError(f"thresholds must be names with numbers, such as psnr: 22, got {thresholds!r}")
    names = (*HIGHER_IS_BETTER, *FIGURES, *COSTS)
    # YAML reads a bare off as false.
    switched_off = {key: "off" for key in ("lpips", "judge") if data.get(key) is False}
    return {
        **switched_off,
        "prompts": tuple(prompts),
        "plans": found,
        "seeds": tuple(seeds) if isinstance(seeds, list) else (seeds,),
        "thresholds": parse_thresholds([f"{k}={v}" for k, v in thresholds.items()], names) if thresholds else {},
    }
