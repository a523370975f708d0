"""Compiling for GPUs that are not here: a few kernels by default, the whole table under `slow`."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import util
from pathlib import Path

import pytest
import torch

from sparsereel_kernels.testing import make_qkv, random_block_mask
from sparsereel_kernels.triton import compile_check, configs
from sparsereel_kernels.triton.compile_check import Case

pytestmark = pytest.mark.skipif(util.find_spec("triton") is None, reason="triton is not installed")

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "triton_compile.json"


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    configs.tuned.cache_clear()
    yield
    configs.tuned.cache_clear()


@pytest.mark.parametrize(
    ("case", "instructions"),
    [
        (Case("sm80", "forward", 16, 64, "plain", False), {"HMMA"}),
        (Case("sm90", "forward", 16, 64, "plain", True), {"HGMMA", "UTMALDG"}),
        (Case("sm90", "keys", 16, 64, "plain", True), {"HGMMA", "UTMALDG"}),
        (Case("sm100", "forward", 16, 128, "plain", True), {"UTCHMMA", "UTMALDG"}),
        (Case("sm120", "queries", 16, 128, "plain", True), {"HMMA", "UTMALDG"}),
        (Case("gfx942", "forward", 16, 64, "plain", False), {"v_mfma"}),
        (Case("sm90", "forward", 16, 128, "split", True), {"HGMMA", "UTMALDG"}),
        (Case("sm120", "forward", 32, 128, "tf32", False), {"HMMA"}),
        (Case("sm90", "forward", 16, 128, "int8", True), {"IGMMA", "HGMMA", "UTMALDG"}),
    ],
    ids=lambda x: f"{x.architecture}-{x.kernel}-{x.variant}" if isinstance(x, Case) else "",
)
def test_representative_kernels(case, instructions):
    found = compile_check.check(case)
    assert found["problems"] == []
    assert {*found["tensor_core"], *found["tma_instructions"]} == instructions
    assert 0 < found["shared"] <= found["shared_limit"]


@pytest.mark.slow
def test_every_shipped_configuration(tmp_path):
    path = tmp_path / "compiled.json"
    assert compile_check.main(["--json", str(path)]) == 0
    assert len(json.loads(path.read_text(encoding="utf-8"))["kernels"]) == len(list(compile_check.cases()))


def test_the_committed_results_are_those_of_the_shipped_table():
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = ("architecture", "kernel", "bits", "width", "variant", "tma")
    found = {tuple(row[name] for name in names): row for row in stored["kernels"]}
    assert stored["problems"] == 0
    for case in compile_check.cases():
        row = found.pop(tuple(getattr(case, name) for name in names))
        table = configs.TABLE[case.architecture][case.kernel, case.bits, case.width]
        fitted = configs.fitted(table, compile_check.BLOCK)
        for name in ("tile_m", "tile_n", "num_warps", "num_stages"):
            assert row[name] == getattr(fitted, name), case
    assert not found


BAD = {
    "spills 8 with 0 accesses to local memory": {"spills": 8},
    "spills 0 with 3 accesses to local memory": {"local_accesses": 3},
    "no tensor-core instruction": {"tensor_core": {}},
    "no TMA load": {"tma": {}},
    "240000 bytes of shared memory, more than 232448": {"shared": 240000},
}


@pytest.mark.parametrize("problem", BAD)
def test_what_fails_the_check(monkeypatch, capsys, problem):
    from sparsereel_kernels.triton import aot

    good = aot.Resources(128, 0, 0, 100000, {"HGMMA": 8}, {"UTMALDG": 4})
    monkeypatch.setattr(aot, "compile_launch", lambda launch, target: None)
    monkeypatch.setattr(compile_check, "run", lambda chosen: [compile_check.check(case) for case in chosen])
    wished = ["--architecture", "sm90", "--kernel", "forward", "--bits", "16", "--width", "64"]
    monkeypatch.setattr(aot, "inspect", lambda compiled: good)
    assert compile_check.main(wished) == 0
    monkeypatch.setattr(aot, "inspect", lambda compiled: replace(good, **BAD[problem]))
    assert compile_check.main(wished) == 1
    assert problem in capsys.readouterr().out


def test_spills_in_backward_and_fp32_without_tensor_cores_are_only_reported(monkeypatch):
    from sparsereel_kernels.triton import aot

    found = aot.Resources(255, 64, 20, 50000, {}, {})
    monkeypatch.setattr(aot, "compile_launch", lambda launch, target: None)
    monkeypatch.setattr(aot, "inspect", lambda compiled: found)
    assert compile_check.check(Case("sm80", "keys", 32, 64, "plain", False))["problems"] == []
    for without in (Case("sm80", "keys", 16, 64, "plain", False), Case("sm80", "keys", 32, 64, "tf32", False)):
        assert compile_check.check(without)["problems"] == ["no tensor-core instruction"]


def test_wrong_use(monkeypatch, capsys):
    assert compile_check.main(["--bits", "32", "--variant", "decay"]) == 2
    assert "no shipped configuration fits" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        compile_check.main(["--architecture", "sm70"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_check.main([]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_other_lengths_and_masks_need_no_other_kernel():
    """Sizes are not compiled in: a video a frame longer finds its kernels ready."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from sparsereel_kernels.triton import aot, launch

    def keys(tokens, density):
        q, k, v = make_qkv(tokens, head_dim=64, dtype=torch.bfloat16, layout="bshd")
        mask = random_block_mask(tokens, block=(128, 64), density=density, heads=2)
        call = launch.Call(q, k, v, mask, 0.1, None, None, launch.Target("GPU", "sm80", 1))
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
        made = list(launch.forward_launches(call, out, lse))
        given = launch.Given(out, lse, out, lse, lse)
        made += list(launch.backward_launches(call, given, launch.Gradients(q, k, v, None)))
        backend = make_backend(aot.TARGETS["sm80"])
        bind = [create_function_from_signature(x.kernel.signature, x.kernel.params, backend) for x in made]
        return [str(b(*x.arguments, S=x.shape, **x.options)[1:]) for b, x in zip(bind, made, strict=True)]

    first = keys(512, 0.5)
    assert len(first) == 4
    assert keys(501, 0.3) == first
    assert keys(1024, 0.9) == first
