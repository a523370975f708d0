"""What this machine has and lacks for sparsereel: the facts behind `sparsereel doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsereel_kernels import dispatch
from sparsereel_kernels.problem import Problem

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "triton", "imageio-ffmpeg")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` is None for facts that are neither good nor bad."""

    topic: str
    text: str
    ok: bool | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All findings; healthy when nothing that every run needs is missing."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether no finding is a failure."""
        return all(finding.ok is not False for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}


def diagnose(*, build: bool = False) -> Diagnosis:
    """Look at versions, kernels, compiler, GPU, ffmpeg and the seam into diffusers.

    Args:
        build: build the native CPU kernels now instead of at first use.
    """
    findings = [_python(), *_packages(), _processor(), _gpu(), _native(build), *_backends(), _seam(), _ffmpeg()]
    return Diagnosis(tuple(findings))


def _python() -> Finding:
    return Finding("python", platform.python_version(), sys.version_info >= (3, 11))


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            optional = name == "triton"
            findings.append(Finding(name, "not installed", None if optional else False))
    return findings


def _processor() -> Finding:
    from sparsereel.generation import cpu_model

    return Finding("processor", f"{cpu_model()}, {torch.get_num_threads()} threads")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("gpu", "none that torch can use")
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Finding("gpu", f"{torch.cuda.get_device_name()}, compute {major}.{minor}, {memory:.0f} GiB", True)


def _native(build: bool) -> Finding:
    from sparsereel_kernels import cpu

    if build:
        try:
            path = cpu.build()
            dispatch.forget()
            return Finding("cpu kernels", f"built: {path}; instruction sets {', '.join(cpu.isas())}", True)
        except cpu.BuildError as error:
            return Finding("cpu kernels", f"not built: {error}; PyTorch code runs instead, slower")
    status = cpu.build_status()
    if status.built:
        return Finding("cpu kernels", f"built: {status.path}", True)
    if status.reason:
        return Finding("cpu kernels", f"cannot be built: {status.reason}; PyTorch code runs instead, slower")
    return Finding("cpu kernels", f"built at first use with {status.compiler}, or now with: sparsereel doctor --build")


def _backends() -> list[Finding]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(
        device_type=device,
        dtype=torch.bfloat16,
        batch=1,
        heads=8,
        kv_heads=8,
        q_len=8192,
        kv_len=8192,
        head_dim=64,
        v_dim=64,
        block=(128, 64),
        has_partial=True,
        modifier=None,
        needs_backward=False,
    )
    findings = []
    for name, reasons in _reasons(problem).items():
        findings.append(Finding(f"backend {name}", "; ".join(reasons) or f"runs on {device}", not reasons or None))
    return findings


def _reasons(problem: Problem) -> dict[str, list[str]]:
    from sparsereel_kernels import cpu

    status = cpu.build_status()
    found = {}
    for backend in dispatch.BACKENDS:
        # Asking the cpu backend builds it; a look at the machine should not take ten seconds.
        unbuilt = backend.name == "cpu" and problem.device_type == "cpu" and not status.built
        found[backend.name] = [status.reason or "not built yet"] if unbuilt else backend.reasons(problem)
    return found


def _seam() -> Finding:
    from sparsereel.families.diffusers_seam import check_versions

    try:
        check_versions()
    except ValueError as error:
        return Finding("diffusers seam", str(error), False)
    return Finding("diffusers seam", "works with the installed diffusers", True)


def _ffmpeg() -> Finding:
    try:
        import imageio_ffmpeg

        return Finding("ffmpeg", str(imageio_ffmpeg.get_ffmpeg_version()), True)
    except (ImportError, RuntimeError) as error:
        return Finding("ffmpeg", f"not usable ({error}); mp4 files cannot be written", False)
