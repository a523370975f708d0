"""What the wheel holds: four typed packages, presets, kernel sources and weights, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"sparsereel", "sparsereel_kernels", "sparsereel_eval", "sparsereel_pipelines"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_four_typed_packages_and_their_metadata_only(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops - PACKAGES == {"sparsereel-0.1.0.dist-info"}
    assert tops >= PACKAGES
    for package in PACKAGES:
        assert f"{package}/py.typed" in wheel.namelist()


def test_the_wheel_holds_every_tracked_file_of_the_packages(wheel):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    roots = ("src/", "kernels/", "pipelines/", "eval/")
    tracked = {name.split("/", 1)[1] for name in listed.stdout.splitlines() if name.startswith(roots)}
    assert len(tracked) > 100
    assert tracked <= set(wheel.namelist())


def test_data_files_are_there_and_small(wheel):
    names = wheel.namelist()
    assert "sparsereel/presets/radial.yaml" in names
    assert any(name.startswith("sparsereel_kernels/cpu/csrc/") for name in names)
    weights = [info for info in wheel.infolist() if info.filename.endswith(".safetensors")]
    assert {w.filename.split("/")[3] for w in weights if "minireel" in w.filename} >= {"transformer", "vae"}
    assert sum(w.file_size for w in weights) < 44 * 2**20
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".so"))]


def test_the_metadata_says_what_is_needed(wheel):
    metadata = wheel.read("sparsereel-0.1.0.dist-info/METADATA").decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert 'Requires-Dist: triton>=3.5; sys_platform == "linux"' in metadata.replace("'", '"')
    for requirement in project["dependencies"]:
        assert "==" not in requirement.split(";")[0], "users are given lower bounds"
    assert b"sparsereel = sparsereel.cli:main" in wheel.read("sparsereel-0.1.0.dist-info/entry_points.txt")
