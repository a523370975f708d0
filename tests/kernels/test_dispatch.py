"""Choosing a backend: named ones run or raise, "auto" says once what it chose and why, tables are data."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparsereel_kernels import BackendUnavailable, dispatch, sparse_attention, speed_table
from sparsereel_kernels.run import Wants, problem_of
from sparsereel_kernels.testing import make_qkv, random_block_mask


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch, tmp_path):
    """No remembered choice, no pin, no table of this user."""
    monkeypatch.setattr(speed_table, "user_file", lambda: tmp_path / "sparsereel" / "speed.json")
    monkeypatch.delenv("SPARSEREEL_BACKEND", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


def problem(**changed):
    q, k, v = make_qkv(100, head_dim=16)
    mask = random_block_mask(100, block=(32, 16))
    return replace(problem_of(q, k, v, mask, None, None, Wants()), **changed)


def fake_backends(monkeypatch, **reasons):
    """Replace what backends say about themselves."""

    def load(self):
        said = reasons.get(self.name, ["not here"])
        return SimpleNamespace(unsupported_reasons=lambda p: said, forward=None, backward=None)

    monkeypatch.setattr(dispatch.Backend, "load", load)


def test_auto_prefers_the_order_of_the_table(monkeypatch):
    fake_backends(monkeypatch, cpu=[], torch=[], flex=[])
    assert dispatch.choose("auto", problem(), None).name == "cpu"
    assert dispatch.choose("auto", problem(device_type="cuda"), None).name == "flex"
    assert dispatch.choose("auto", problem(device_type="xpu"), None).name == "torch"


def test_auto_says_once_what_it_chose_and_why(monkeypatch, caplog):
    fake_backends(monkeypatch, cpu=["no C++ compiler was found"], torch=[])
    with caplog.at_level(logging.INFO, "sparsereel_kernels"):
        for tokens in (100, 200, 300):
            assert dispatch.choose("auto", problem(q_len=tokens), None).name == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    expected = "sparse attention on cpu uses backend torch (passed over: cpu: no C++ compiler was found)"
    assert record.getMessage() == expected


@pytest.mark.parametrize(
    ("changed", "reason"), [({"dtype": torch.float64}, "dtype float64 is not supported"), ({}, dispatch.NO_GRADIENTS)]
)
def test_what_is_merely_unsupported_is_no_warning(monkeypatch, caplog, changed, reason):
    fake_backends(monkeypatch, cpu=[reason], torch=[])
    with caplog.at_level(logging.INFO, "sparsereel_kernels"):
        dispatch.choose("auto", problem(**changed), None)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_the_users_table_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert speed_table.user_file() == tmp_path / "sparsereel" / "speed.json"


def test_auto_never_takes_the_reference(monkeypatch):
    fake_backends(monkeypatch, reference=[])
    with pytest.raises(BackendUnavailable) as error:
        dispatch.choose("auto", problem(), None)
    assert str(error.value) == (
        "No backend can run sparse_attention for\n"
        "    query  [1, 2, 100, 16]  float32  cpu\n"
        "    key    [1, 2, 100, 16]\n"
        "    value  [1, 2, 100, 16]\n"
        "    mask   block 32×16, with partial blocks\n"
        "cpu   : not here\n"
        "torch : not here\n"
        'Use backend="reference" for a slow exact result.'
    )


def test_a_named_backend_raises_with_its_reasons():
    q, k, v = (x.requires_grad_() for x in make_qkv(100, head_dim=16))
    with pytest.raises(
        BackendUnavailable, match="(?s)Backend 'flex' cannot run.*with   gradients\nflex : gradients are"
    ):
        sparse_attention(q, k, v, backend="flex")
    with pytest.raises(BackendUnavailable, match='Use backend="auto" to let another one run'):
        sparse_attention(q, k, v, backend="flex")
    with pytest.raises(BackendUnavailable, match="flex : lse is not supported on CPU"):
        sparse_attention(q.detach(), k.detach(), v.detach(), backend="flex", return_lse=True)


def test_a_backend_that_is_not_part_of_this_version(monkeypatch):
    missing = dispatch.Backend("triton", "sparsereel_kernels.nothing", automatic=("cuda",))
    assert missing.reasons(problem()) == ["No module named 'sparsereel_kernels.nothing'"]
    empty = dispatch.Backend("triton", "sparsereel_kernels.errors", automatic=("cuda",))
    assert empty.reasons(problem()) == ["sparsereel_kernels.errors is not part of this version"]


def test_unknown_names_list_the_known_ones():
    q, k, v = make_qkv(20, head_dim=16)
    with pytest.raises(ValueError, match="one of auto, triton, cpu, flex, torch, triton_int8, reference, got 'tritn'"):
        sparse_attention(q, k, v, backend="tritn")


def test_the_environment_pins_auto_but_not_named(monkeypatch):
    monkeypatch.setenv("SPARSEREEL_BACKEND", "reference")
    assert dispatch.choose("auto", problem(), None).name == "reference"
    assert dispatch.choose("torch", problem(), None).name == "torch"
    monkeypatch.setenv("SPARSEREEL_BACKEND", "flex")
    with pytest.raises(BackendUnavailable, match="gradients"):
        dispatch.choose("auto", problem(needs_backward=True), None)
    monkeypatch.setenv("SPARSEREEL_BACKEND", "fastest")
    with pytest.raises(ValueError, match="got 'fastest'"):
        dispatch.choose("auto", problem(), None)


def test_explain_covers_every_backend():
    said = dispatch.explain(problem(needs_backward=True))
    assert list(said) == [backend.name for backend in dispatch.BACKENDS]
    assert said["torch"] == said["reference"] == []
    assert said["flex"]


# ------------------------------------------------------------ stored tables


def write_table(tmp_path, *entries, version=1):
    path = tmp_path / "sparsereel" / "speed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"version": version, "entries": list(entries)}), encoding="utf-8")
    speed_table.load.cache_clear()


def entry(**changed):
    plain = {
        "device": "cpu",
        "name": speed_table.device_name("cpu"),
        "dtype": "float32",
        "head_dim": 64,
        "tokens": 16384,
        "density": 0.2,
        "backward": False,
        "order": ["torch", "cpu"],
    }
    return plain | changed


def test_the_nearest_entry_decides(tmp_path, monkeypatch):
    fake_backends(monkeypatch, cpu=[], torch=[])
    write_table(tmp_path, entry(), entry(density=0.8, order=["cpu", "torch"]))
    sparse, dense = random_block_mask(256, density=0.25), random_block_mask(256, density=0.75)
    assert dispatch.choose("auto", problem(), sparse).name == "torch"
    assert dispatch.choose("auto", problem(), dense).name == "cpu"
    assert dispatch.choose("auto", problem(dtype=torch.bfloat16), sparse).name == "cpu"


def test_tables_of_other_machines_do_not_count(tmp_path, monkeypatch):
    fake_backends(monkeypatch, cpu=[], torch=[])
    write_table(tmp_path, entry(name="another processor"))
    assert dispatch.choose("auto", problem(), None).name == "cpu"


@pytest.mark.parametrize("broken", ["version", "field", "json"])
def test_tables_that_cannot_be_read_are_left_out(tmp_path, caplog, broken):
    write_table(tmp_path, entry(), version=2 if broken == "version" else 1)
    path = tmp_path / "sparsereel" / "speed.json"
    if broken == "field":
        path.write_text('{"version": 1, "entries": [{"device": "cpu"}]}', encoding="utf-8")
    if broken == "json":
        path.write_text("{", encoding="utf-8")
    speed_table.load.cache_clear()
    assert speed_table.load() == ()
    assert "speed.json is left out" in caplog.text
