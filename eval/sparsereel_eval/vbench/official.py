"""The official VBench program in an environment of its own, as its pins (numpy 1, transformers 4.33) fit no other.

`build` makes the environment once; `run` measures dimensions there, in a child process, and brings the official results
back. Neither is done unasked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsereel_eval.lpips import MissingWeights
from sparsereel_eval.vbench.names import dimension

PYTHONS = ("python3.11", "python3.10")
#: in this order: the source build of vbench looks for torch, and two of its dependencies for old setuptools
STEPS = (
    ("torch<2.6", "torchvision", "setuptools<70", "wheel", "numpy<2"),
    ("--no-build-isolation", "vbench==0.1.5"),
)
_CHILD = Path(__file__).with_name("official_child.py")
SECONDS = 6 * 3600


def default_environment() -> Path:
    """Where the environment lies unless said otherwise."""
    home = Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser()
    return home / "sparsereel" / "vbench"


def interpreter(environment: Path) -> Path:
    """The environment's Python.

    Raises:
        MissingWeights: there is no such environment; the text says how to get it.
    """
    python = environment / "bin" / "python"
    if not python.is_file():
        raise MissingWeights(
            f"the official program has no environment at {environment}: sparsereel eval vbench setup --env "
            f"{environment} builds it (Python 3.10 or 3.11, about 6 GB from PyPI)"
        )
    return python


def build(environment: Path, say: Callable[[str], None]) -> None:
    """Make the environment and install the official program into it.

    Raises:
        MissingWeights: no Python 3.10 or 3.11 on this machine.
        ValueError: a step failed; the last line of its output is in the text.
    """
    python = next((found for name in PYTHONS if (found := shutil.which(name))), None)
    if python is None and sys.version_info[:2] in ((3, 10), (3, 11)):
        python = sys.executable
    if python is None:
        raise MissingWeights("the official program needs Python 3.10 or 3.11, and neither is on this machine")
    # Scripts of an environment hold its path, so it is made where it stays, and removed where it does not get complete.
    shutil.rmtree(environment, ignore_errors=True)
    environment.parent.mkdir(parents=True, exist_ok=True)
    _step([python, "-m", "venv", str(environment)], say)
    try:
        for packages in STEPS:
            _step([str(environment / "bin" / "python"), "-m", "pip", "install", *packages], say)
    except ValueError:
        shutil.rmtree(environment, ignore_errors=True)
        raise


def _step(command: list[str], say: Callable[[str], None]) -> None:
    say(" ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ValueError(f"{command[0]} ended with code {done.returncode}: {lines[-1] if lines else 'no output'}")


def run(
    environment: Path,
    videos: Path,
    names: Sequence[str],
    output: Path,
    *,
    name: str = "official",
    info: Path | None = None,
    weights: Path | None = None,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Measure dimensions with the official program.

    Args:
        videos: Folder of clips.
        names: Dimensions.
        output: Folder for the official files; `{name}_eval_results.json` holds all dimensions together.
        info: The official VBench_full_info.json, for the standard mode; None for custom_input.
        weights: The official program's cache of weights.

    Returns:
        "results": dimension to the official [score, clips]; "failed": dimension to its error.

    Raises:
        MissingWeights: no environment.
        ValueError: the child ended without a result, or took longer than `seconds`.
    """
    python = interpreter(environment)
    keys = [dimension(each) for each in names]
    output.mkdir(parents=True, exist_ok=True)
    job = {
        "videos": str(videos.resolve()),
        "dimensions": keys,
        "output": str(output.resolve()),
        "name": name,
        "info": None if info is None else str(info.resolve()),
    }
    path = output / f"{name}_job.json"
    path.write_text(json.dumps(job, indent=2), encoding="utf-8")
    variables = {**os.environ, **({"VBENCH_CACHE_DIR": str(weights)} if weights else {})}
    # The parent's packages must not shine through.
    variables.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [str(python), str(_CHILD), str(path)], env=variables, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the official program took longer than {seconds:.0f} s") from error
    status = output / f"{name}_status.json"
    if done.returncode or not status.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"the official program ended with code {done.returncode}: {lines[-1] if lines else ''}")
    failed = json.loads(status.read_text(encoding="utf-8"))
    results: dict[str, Any] = {}
    for key in keys:
        file = output / f"{name}-{key}_eval_results.json"
        if key not in failed and file.is_file():
            results |= json.loads(file.read_text(encoding="utf-8"))
        else:
            failed.setdefault(key, "it wrote no result")
    merged = output / f"{name}_eval_results.json"
    merged.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return {"results": results, "failed": failed}
