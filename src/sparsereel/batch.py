"""Many clips, one after another, resumable: a clip whose sidecar says the same request is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsereel.files import write_json
from sparsereel.generation import Clip, Request, environment, generate, request_data
from sparsereel.media import side_by_side, write_contact_sheet, write_mp4
from sparsereel.plan import AttentionPlan


@dataclass(frozen=True)
class Job:
    """One request and where its clip goes; `done` holds the sidecar of a finished equal one."""

    request: Request
    video: Path
    identity: dict[str, Any]
    done: dict[str, Any] | None

    @property
    def sidecar(self) -> Path:
        return self.video.with_suffix(".json")

    @property
    def sheet(self) -> Path:
        return self.video.with_suffix(".png")


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        ValueError: the file is missing, not UTF-8, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {path}: {error.strerror or error}") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"the prompt file {path} holds no prompt")
    return prompts


def plan_jobs(requests: list[Request], output: Path | None, settings: dict[str, Any], *, folder: bool) -> list[Job]:
    """Where every clip goes, and which are finished. Prompts never become file names.

    Raises:
        ValueError: the output is a folder where a file is meant, or has an ending other than .mp4.
    """
    if folder:
        target = output or Path("out")
        if target.suffix == ".mp4":
            raise ValueError(f"--prompts writes many clips: -o must be a folder, got {target}")
        videos = [target / f"{number:04d}.mp4" for number in range(len(requests))]
    else:
        video = output or Path("out.mp4")
        if video.suffix != ".mp4" or video.is_dir():
            raise ValueError(f"-o must be a file that ends in .mp4, got {video}")
        videos = [video]
    jobs = []
    for request, video in zip(requests, videos, strict=True):
        identity = {"request": request_data(request), **settings}
        # A single clip is always made anew: whoever repeats the command wants it run.
        done = _finished(video, identity) if folder else None
        jobs.append(Job(request, video, identity, done))
    return jobs


def _finished(video: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = json.loads(json.dumps(identity)) == found.get("identity")
    return found if same and video.is_file() else None


def run_jobs(
    pipe: Any, jobs: list[Job], plan: AttentionPlan | None, *, compare: bool, backend: str
) -> list[dict[str, Any]]:
    """Generate what is not finished; every clip is complete on disk before the next begins."""
    check_writable(jobs[0].video.parent)
    return [job.done or _run(pipe, job, plan, compare, backend) for job in jobs]


def check_writable(folder: Path) -> None:
    """Find out before minutes of work, not after.

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    from sparsereel.files import replacing

    probe = folder / ".sparsereel-probe"
    with replacing(probe) as temporary:
        temporary.write_bytes(b"")
    probe.unlink(missing_ok=True)


def _run(pipe: Any, job: Job, plan: AttentionPlan | None, compare: bool, backend: str) -> dict[str, Any]:
    if compare and plan is not None:
        dense = _clip(pipe, job.request, None, backend, "dense")
        sparse = _clip(pipe, job.request, plan, backend, "sparse")
        result = _compared(job, dense, sparse)
        write_mp4(job.video, side_by_side(dense.frames, sparse.frames))
        write_contact_sheet(job.sheet, _labels(result, dense, sparse))
    else:
        clip = _clip(pipe, job.request, plan, backend, "dense" if plan is None else "sparse")
        result = _record(job, [_row("dense" if plan is None else "sparse", clip)])
        if clip.report is not None:
            result["report"] = clip.report.to_dict()
        write_mp4(job.video, clip.frames)
        write_contact_sheet(job.sheet, [(job.request.prompt, clip.frames)])
    # Last: a sidecar means that the clip is complete.
    write_json(job.sidecar, result)
    return result


def _clip(pipe: Any, request: Request, plan: AttentionPlan | None, backend: str, label: str) -> Clip:
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(desc=label)
    return generate(pipe, request, plan, backend=backend)


def _compared(job: Job, dense: Clip, sparse: Clip) -> dict[str, Any]:
    from sparsereel_eval.fidelity import psnr, ssim

    row = _row("sparse", sparse)
    row["psnr"] = float(psnr(dense.exact, sparse.exact))
    row["ssim"] = float(ssim(dense.exact, sparse.exact))
    result = _record(job, [_row("dense", dense), row])
    result["speedup"] = dense.seconds / sparse.seconds
    if sparse.report is not None:
        result["report"] = sparse.report.to_dict()
    return result


def _row(attention: str, clip: Clip) -> dict[str, Any]:
    density = 1.0 if clip.report is None or clip.report.density is None else clip.report.density
    return {"attention": attention, "seconds": clip.seconds, "density": density}


def _record(job: Job, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "output": str(job.video),
        "sheet": str(job.sheet),
        "prompt": job.request.prompt,
        "runs": runs,
        "identity": job.identity,
        "environment": environment(),
    }


def _labels(result: dict[str, Any], dense: Clip, sparse: Clip) -> list[tuple[str, Any]]:
    row = result["runs"][1]
    return [
        (f"dense   {dense.seconds:.1f} s   {result['prompt']}", dense.frames),
        (
            f"sparse  {sparse.seconds:.1f} s   density {row['density']:.2f}   PSNR {row['psnr']:.1f} dB",
            sparse.frames,
        ),
    ]
