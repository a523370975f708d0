"""What the triton backend says about itself, its tables and its order of work: nothing here runs a kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import util

import pytest
import torch

from sparsereel_kernels import BackendUnavailable, BlockMask, dispatch, sparse_attention, triton
from sparsereel_kernels.run import Wants, problem_of
from sparsereel_kernels.testing import make_qkv, random_block_mask
from sparsereel_kernels.triton import configs

HAS_TRITON = pytest.mark.skipif(util.find_spec("triton") is None, reason="triton is not installed")


def problem(**changed):
    q, k, v = make_qkv(100, head_dim=16)
    return replace(problem_of(q, k, v, None, None, None, Wants()), **changed)


def python(code, **environment):
    given = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ------------------------------------------------------------ what it says


def test_triton_is_not_imported_for_calls_on_a_cpu():
    """A call, and asking this backend for its reasons, leave Triton alone."""
    code = """
import sys
import torch
from sparsereel_kernels import dispatch, sparse_attention
from sparsereel_kernels.run import Wants, problem_of
already = {name for name in sys.modules if name.split(".")[0] == "triton"}
x = torch.randn(1, 1, 8, 8)
sparse_attention(x, x, x)
reasons = dispatch.BY_NAME["triton"].reasons(problem_of(x, x, x, None, None, None, Wants()))
assert {name for name in sys.modules if name.split(".")[0] == "triton"} == already
assert "sparsereel_kernels.triton.launch" not in sys.modules
print(*reasons, sep="|")
"""
    said = "device cpu is not supported (cuda; cpu only in Triton's interpreter, TRITON_INTERPRET=1)\n"
    assert python(code) == said


def test_without_triton_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(triton.util, "find_spec", lambda name: None)
    expected = ["triton is not installed (pip install triton)"]
    assert triton.unsupported_reasons(problem(device_type="cuda")) == expected


def test_reasons_are_single_sentences(monkeypatch):
    monkeypatch.setattr(triton, "_device_reasons", lambda device_type: [])
    assert triton.unsupported_reasons(problem()) == []
    assert triton.unsupported_reasons(problem(dtype=torch.float64)) == [
        "dtype float64 is not supported (float32, bfloat16, float16)"
    ]
    assert triton.unsupported_reasons(problem(v_dim=7)) == ["head dims 16, 7 are not supported (8 to 256)"]
    assert triton.unsupported_reasons(problem(modifier="alibi")) == [
        "modifier alibi is not supported (frame_decay, key_bias)"
    ]
    monkeypatch.undo()
    assert triton.unsupported_reasons(problem(device_type="xpu")) == ["device xpu is not supported (cuda)"]


@HAS_TRITON
def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    expected = ["compute capability 7.5 is not supported (8.0 and later)"]
    assert triton.unsupported_reasons(problem(device_type="cuda")) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert triton.unsupported_reasons(problem(device_type="cuda")) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.unsupported_reasons(problem(device_type="cuda")) == ["no CUDA device is present"]


def test_named_on_a_cpu_it_raises_with_its_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.forget()
    q, k, v = make_qkv(20, head_dim=16)
    with pytest.raises(BackendUnavailable, match="triton : device cpu is not supported"):
        sparse_attention(q, k, v, backend="triton")


@HAS_TRITON
def test_the_interpreter_must_be_asked_for_before_the_first_call():
    code = """
import os
from sparsereel_kernels import dispatch, triton
import sparsereel_kernels.triton.forward_kernel
os.environ["TRITON_INTERPRET"] = "1"
print(*triton._device_reasons("cpu"))
"""
    assert python(code) == "TRITON_INTERPRET=1 was set after the kernels were first used\n"


# ------------------------------------------------------------ configurations


def test_every_architecture_has_every_entry():
    wanted = {(kernel, bits, width) for kernel in configs.KERNELS for bits in (16, 32) for width in configs.WIDTHS}
    for architecture, table in configs.TABLE.items():
        assert set(table) == wanted, architecture
        assert architecture in configs.WITH_TMA or not any(config.tma for config in table.values())


@pytest.mark.parametrize(
    ("capability", "hip", "name"),
    [
        ((8, 0), False, "sm80"),
        ((8, 6), False, "sm89"),
        ((8, 9), False, "sm89"),
        ((9, 0), False, "sm90"),
        ((10, 0), False, "sm100"),
        ((12, 0), False, "sm120"),
        ((13, 0), False, "sm89"),
        ((9, 4), True, "gfx942"),
    ],
)
def test_architectures(capability, hip, name):
    assert configs.architecture_of(capability, hip) == name


@pytest.mark.parametrize(
    ("block", "wished", "tile"),
    [
        (128, 64, 64),
        (64, 128, 64),
        (96, 128, 32),
        (8, 64, 16),
        (24, 64, 16),
        (40, 64, 16),
        (1024, 128, 128),
        (16, 16, 16),
    ],
)
def test_tiles_divide_blocks_or_are_the_smallest(block, wished, tile):
    assert configs.tile_of(block, wished) == tile


def test_small_tiles_get_fewer_warps():
    config = configs.Config(128, 64, 8, 3)
    assert configs.fitted(config, (128, 64)) == config
    small = configs.fitted(config, (16, 16))
    assert (small.tile_m, small.tile_n, small.num_warps) == (16, 16, 1)


@pytest.mark.parametrize("changed", [{"tile_m": 48}, {"tile_n": 8}, {"num_warps": 3}, {"num_stages": 0}, {"tma": 1.0}])
def test_impossible_configurations_are_refused(changed):
    with pytest.raises(ValueError, match=f"{next(iter(changed))} must be one of"):
        configs.Config(**({"tile_m": 64, "tile_n": 64, "num_warps": 4, "num_stages": 2} | changed))


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.tuned.cache_clear()
    yield tmp_path
    configs.tuned.cache_clear()


def test_tuned_configurations_come_first_on_the_same_device_and_block(cache_folder):
    table = configs.choose("A100", "sm80", "forward", 16, 128, (128, 64))
    tuned = configs.Config(64, 32, 4, 2)
    configs.save({configs.tuned_key("A100", "forward", 16, 128, (128, 64)): tuned})
    assert configs.user_file() == cache_folder / "sparsereel" / "triton.json"
    assert configs.choose("A100", "sm80", "forward", 16, 128, (128, 64)) == tuned != table
    assert configs.choose("A100", "sm80", "forward", 16, 96, (128, 64)) == tuned
    for other in (("A10", 16, 128, (128, 64)), ("A100", 32, 128, (128, 64)), ("A100", 16, 128, (64, 64))):
        device, bits, width, block = other
        assert configs.choose(device, "sm80", "forward", bits, width, block) != tuned
    second = configs.Config(32, 32, 4, 1)
    configs.save({configs.tuned_key("A100", "keys", 16, 128, (128, 64)): second})
    assert set(configs.tuned().values()) == {tuned, second}


@pytest.mark.parametrize(
    "content",
    ["{", '{"version": 2, "entries": {}}', '{"version": 1, "entries": {"a": {"tile_m": 64}}}', "[]"],
    ids=["json", "version", "entry", "list"],
)
def test_a_file_that_cannot_be_read_is_left_out(cache_folder, caplog, content):
    configs.user_file().parent.mkdir()
    configs.user_file().write_text(content, encoding="utf-8")
    assert configs.tuned() == {}
    assert "triton.json are left out" in caplog.text


def test_what_is_stored_is_plain_json(cache_folder):
    path = configs.save({"key": configs.Config(64, 32, 4, 2, True)})
    entry = {"tile_m": 64, "tile_n": 32, "num_warps": 4, "num_stages": 2, "tma": True}
    assert json.loads(path.read_text(encoding="utf-8")) == {"version": 1, "entries": {"key": entry}}


# ------------------------------------------------------------ order of work


@HAS_TRITON
def test_dear_rows_come_first_and_neighbours_stay_together():
    from sparsereel_kernels.triton.lists import order_of_cost

    order = order_of_cost(torch.tensor([[[8, 100, 9, 101], [0, 8, 99, 1]]])).tolist()
    assert order == [1, 3, 6, 0, 2, 5, 4, 7]


@HAS_TRITON
def test_rows_are_made_once_a_mask():
    from sparsereel_kernels.triton.lists import key_rows, query_rows

    mask = random_block_mask(300, block=(32, 16), heads=4)
    rows = query_rows(mask, 16)
    assert query_rows(mask, 16) is rows
    assert sorted(rows.lists.order.tolist()) == list(range(4 * 10))
    by_key = key_rows(mask, 16, 2)
    assert sorted(by_key.lists.order.tolist()) == list(range(2 * 19))
    assert (by_key.blocks, by_key.heads) == (19, 4)


@HAS_TRITON
@pytest.mark.parametrize("word", [8, 16, 32])
def test_words_hold_the_bits_in_order(word):
    from sparsereel_kernels.bits import unpack_bits
    from sparsereel_kernels.triton.lists import words_of

    bits = torch.randint(0, 256, (3, 16, 8), dtype=torch.uint8)
    words = words_of(bits[1:], word).long()
    found = (words[..., None] >> torch.arange(word)) & 1
    assert torch.equal(found.flatten(-2).bool(), unpack_bits(bits[1:]))


@HAS_TRITON
def test_tokens_far_apart_are_copied():
    """Inside a tile offsets have 32 bits; whoever spreads tokens wider pays for a copy."""
    from sparsereel_kernels.triton.launch import LARGEST_TILE, LARGEST_TOKEN_STRIDE, within_offsets

    near, far = (torch.empty(1, device="meta").as_strided((1, 1, 4, 8), (0, 0, n, 1)) for n in (4096, 2**24))
    assert within_offsets(near) is near
    assert within_offsets(far).stride(2) == 8
    assert (LARGEST_TILE - 1) * LARGEST_TOKEN_STRIDE + 255 < 2**31


@HAS_TRITON
def test_few_programs_and_long_lists_are_cut():
    from sparsereel_kernels.triton import launch
    from sparsereel_kernels.triton.lists import query_rows

    q, k, v = make_qkv(64, 8192, head_dim=16)
    mask = BlockMask.from_dense(torch.ones(64, 8192, dtype=torch.bool), (64, 64))
    rows = query_rows(mask, 32)
    call = launch.Call(q, k, v, mask, 0.25, None, None, launch.Target("GPU", "sm80", 108))
    assert launch.split_count(call, rows, 2, 1) == 16
    assert launch.split_count(call, rows, 2, 4) == 16
    assert launch.split_count(call, rows, 30, 1) == 3
    assert launch.split_count(call, rows, 108, 1) == 1
