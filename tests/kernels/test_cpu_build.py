"""Building and loading the C++ kernels: once, by one process, into a folder that only the user may enter."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sparsereel_kernels import cpu
from sparsereel_kernels.cpu import builder
from sparsereel_kernels.problem import Problem

needs_compiler = pytest.mark.skipif(bool(cpu.build_status().reason), reason=cpu.build_status().reason)

PROBLEM = Problem("cpu", torch.float32, 1, 2, 2, 64, 64, 32, 32, (128, 64), True, None, True)
USE = """
import logging, sys, torch
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
from sparsereel_kernels import cpu
x = torch.randn(1, 1, 8, 8)
print("sum", float(cpu.forward(x, x, x, None, 1.0)[0].isfinite().all()))
"""


@pytest.fixture
def unloaded(monkeypatch):
    """As in a process that has not loaded the kernels yet."""
    monkeypatch.setattr(builder, "_loaded", None)
    cpu.binding.kernels.cache_clear()
    yield
    cpu.binding.kernels.cache_clear()


@needs_compiler
def test_two_processes_build_once(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", USE], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all("sum 1.0" in output for output in outputs)
    assert sum("building the CPU kernels" in output for output in outputs) == 1
    folder = tmp_path / "sparsereel" / "kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".sha256", ".so"]


@needs_compiler
def test_a_library_that_was_changed_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []

    def compile_nothing(tools, target, verbose):
        built.append(target)
        target.write_bytes(b"library")
        target.with_suffix(".sha256").write_text(builder.hashlib.sha256(b"library").hexdigest())

    monkeypatch.setattr(builder, "_compile", compile_nothing)
    path = cpu.build()
    assert cpu.build() == path
    assert cpu.build_status().built
    assert len(built) == 1
    path.write_bytes(b"something else")
    assert not cpu.build_status().built
    cpu.build()
    assert len(built) == 2


@needs_compiler
def test_a_folder_open_to_others_is_refused(tmp_path, monkeypatch, unloaded):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "sparsereel" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    assert cpu.unsupported_reasons(PROBLEM) == [
        f"{folder} must be a folder of your own that only you may enter (chmod 700)"
    ]


@needs_compiler
def test_a_folder_that_cannot_be_made_is_a_reason(tmp_path, monkeypatch, unloaded):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    [reason] = cpu.unsupported_reasons(PROBLEM)
    assert "set XDG_CACHE_HOME to a writable folder" in reason


def test_no_compiler_is_a_reason(tmp_path, monkeypatch, unloaded):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    [reason] = cpu.unsupported_reasons(PROBLEM)
    assert reason.startswith("no C++ compiler found (looked for c++, g++ or clang++)")
    assert cpu.build_status().reason == reason
    monkeypatch.setenv("CXX", "icpx")
    assert "CXX=icpx" in cpu.build_status().reason


@needs_compiler
def test_a_failing_compiler_is_a_reason(tmp_path, monkeypatch, unloaded):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 1.0 && exit 0\necho 'fatal error: no headers' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    [reason] = cpu.unsupported_reasons(PROBLEM)
    assert "no headers" in reason
    assert list((tmp_path / "cache" / "sparsereel" / "kernels").glob("*.so")) == []


@needs_compiler
def test_a_library_of_another_version_is_refused(monkeypatch, unloaded):
    class Longer(ctypes.Structure):
        _fields_ = [("args", cpu.binding.Args), ("more", ctypes.c_int64)]

    monkeypatch.setattr(cpu.binding, "Args", Longer)
    assert "does not fit this version" in cpu.unsupported_reasons(PROBLEM)[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_type": "cuda"}, "device cuda is not supported (cpu)"),
        ({"dtype": torch.float64}, "dtype float64 is not supported (float32, bfloat16, float16)"),
        ({"head_dim": 4}, "head dims 4, 32 are not supported (8 to 256)"),
        ({"v_dim": 320}, "head dims 32, 320 are not supported (8 to 256)"),
        ({"modifier": "alibi"}, "modifier alibi is not supported (frame_decay, key_bias)"),
    ],
)
def test_reasons(changes, reason):
    assert cpu.unsupported_reasons(replace(PROBLEM, **changes)) == [reason]


@needs_compiler
def test_all_is_well():
    assert cpu.unsupported_reasons(PROBLEM) == []
    status = cpu.build_status()
    assert status.built
    assert status.reason == ""
    assert cpu.isas()[-1] == "portable"
