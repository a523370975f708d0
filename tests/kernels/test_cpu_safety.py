"""Memory, processes and threads: the C++ kernels touch only what they were given, and may be called from anywhere."""

from __future__ import annotations

import concurrent.futures
import ctypes
import mmap
import os
import subprocess
import sys
import time

import pytest
import torch

from sparsereel_kernels import BlockMask, FrameDecay, KeyBias, cpu
from sparsereel_kernels.testing import make_qkv, random_block_mask

pytestmark = pytest.mark.skipif(bool(cpu.build_status().reason), reason=cpu.build_status().reason)

PAGE = mmap.PAGESIZE
SCALE = 0.2


class Guarded:
    """Copies of tensors that end right before (or begin right after) a page that nobody may touch."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.kept: list[mmap.mmap] = []

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        size = x.numel() * x.element_size()
        room = -(-max(size, 1) // PAGE) * PAGE
        area = mmap.mmap(-1, room + 2 * PAGE)
        self.kept.append(area)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for guard in (start, start + PAGE + room):
            assert self.libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
        offset = PAGE + (room - size if self.at_end else 0)
        if size == 0:
            return x
        copy = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
        return copy.copy_(x)

    def mask(self, mask: BlockMask) -> BlockMask:
        return BlockMask(mask.seq_lengths, mask.BLOCK_SIZE, {n: self.copy(x) for n, x in mask.tensors().items()})

    def view(self, x: torch.Tensor):
        """What binding.view gives, for a result written into guarded memory."""
        return self.copy(torch.empty_like(x))


def modifiers(guarded: Guarded, n: int, m: int):
    tokens = [guarded.copy(torch.arange(x, dtype=torch.int32)) for x in (n, m)]
    frames = [guarded.copy(torch.arange(x, dtype=torch.int32) // 9) for x in (n, m)]
    yield None
    yield KeyBias(guarded.copy(torch.randn(m)))
    yield FrameDecay(*tokens, guarded.copy(torch.rand(5)))
    yield FrameDecay(*frames, guarded.copy(torch.rand(1000)))


def run_guarded(at_end: bool) -> None:
    """Every size and modifier once; a read or write outside ends the process."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, m, head_dim, v_dim, block in (
            (77, 45, 40, 24, (16, 24)),
            (130, 201, 33, 9, (64, 40)),
            (1, 1, 8, 8, (8, 8)),
        ):
            guarded = Guarded(at_end)
            q, k, v = make_qkv(n, m, batch=2, heads=2, kv_heads=1, head_dim=head_dim, v_dim=v_dim, dtype=dtype)
            q, k, v = map(guarded.copy, (q, k, v))
            mask = guarded.mask(random_block_mask(n, m, block=block, density=0.6))
            lengths = guarded.copy(torch.tensor([m, m // 2], dtype=torch.int32))
            for modifier in modifiers(guarded, n, m):
                for chosen in (mask, None):
                    out, lse = map(guarded.copy, cpu.forward(q, k, v, chosen, SCALE, lengths, modifier))
                    grad = guarded.copy(torch.randn(out.shape, generator=generator).to(dtype))
                    cpu.backward(grad, lse, q, k, v, out, lse, chosen, SCALE, lengths, modifier)


def run_results_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what the kernels write: results are placed before the forbidden page."""
    guarded = Guarded(at_end=True)
    monkeypatch.setattr(cpu, "empty_like_query", lambda q, n: guarded.copy(torch.empty(*q.shape[:3], n, dtype=q.dtype)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = make_qkv(77, 45, heads=2, head_dim=37, v_dim=9, dtype=dtype)
        out, lse = cpu.forward(q, k, v, random_block_mask(77, 45, block=(16, 24)), SCALE)
        grads = cpu.backward(out, None, q, k, v, out, lse, None, SCALE)
        assert not any(bool(x.isnan().any()) for x in (out, *grads[:3]))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_nothing_is_read_outside_the_inputs(isa):
    """In a process of its own: a bad access ends it."""
    if isa not in cpu.isas():
        pytest.skip(f"{isa} does not run here")
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"SPARSEREEL_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"


def test_threads_may_call_at_once():
    calls = [make_qkv(300, heads=2, head_dim=32, seed=seed) for seed in range(8)]
    mask = random_block_mask(300, density=0.5)

    def everything(inputs):
        out, lse = cpu.forward(*inputs, mask, SCALE)
        return out, lse, *cpu.backward(out, None, *inputs, out, lse, mask, SCALE)[:3]

    alone = [everything(inputs) for inputs in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(everything, calls * 3))
    for expected, found in zip(alone * 3, together, strict=True):
        assert all(map(torch.equal, expected, found))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_a_forked_child_may_call():
    """OpenMP's pool is gone in a child; a kernel that waited for it would hang.

    Small enough that torch's own operators, which do hang, need one thread only.
    """
    q, k, v = make_qkv(200, heads=4, head_dim=32)
    expected = cpu.forward(q, k, v, None, SCALE)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if all(map(torch.equal, cpu.forward(q, k, v, None, SCALE), expected)) else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 0


def test_offsets_beyond_32_bits_reach_the_right_row():
    """Strides of 2**31 elements and more, on memory that is only reserved: nothing but the rows in use is touched."""
    stride, rows = 2**31 + 64, 3
    try:
        area = mmap.mmap(
            -1, rows * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        )
    except (OSError, ValueError):
        pytest.skip("the system does not reserve this much address space")
    wide = torch.frombuffer(area, dtype=torch.bfloat16)
    k = wide.as_strided((1, 1, rows, 8), (0, 0, stride // 2, 1))
    values = torch.randn(1, 1, rows, 8).bfloat16()
    k.copy_(values)
    q = torch.randn(1, 1, 40, 8).bfloat16()
    found, expected = cpu.forward(q, k, k, None, SCALE), cpu.forward(q, values, values, None, SCALE)
    assert all(map(torch.equal, found, expected))


if __name__ == "__main__":
    torch.set_num_threads(2)
    run_guarded(at_end=True)
    run_guarded(at_end=False)
    with pytest.MonkeyPatch.context() as patch:
        run_results_guarded(patch)
