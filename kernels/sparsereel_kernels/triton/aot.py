"""Compiles a launch for any GPU, without one, and reads what came out from the disassembly.

Arguments go through Triton's own binder, as in a real launch, so that what is compiled is what would run: the same
constants, the same alignment of addresses and strides.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .launch import Launch

KIB = 1024
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm89": GPUTarget("cuda", 89, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one block of threads may have, from the CUDA programming guide and the CDNA3 ISA guide.
SHARED_LIMIT = {
    "sm80": 163 * KIB,
    "sm89": 99 * KIB,
    "sm90": 227 * KIB,
    "sm100": 227 * KIB,
    "sm120": 99 * KIB,
    "gfx942": 64 * KIB,
}
# Longer names first: "v_mfma" begins "v_mfma_i32".
BYTES = ("IMMA", "IGMMA", "UTCIMMA", "v_mfma_i32")
TENSOR_CORE = (*BYTES, "HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "v_mfma")
TMA = ("UTMALDG", "UBLKCP")
LOCAL_MEMORY = ("LDL", "STL")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        registers: a thread.
        spills: bytes of local memory (stack included) a thread; AMD: spilled vector registers.
        local_accesses: instructions that read or write local memory; AMD: bytes of private memory a thread.
        shared: bytes a block of threads.
        tensor_core, tma: instructions found, by name.
    """

    registers: int
    spills: int
    local_accesses: int
    shared: int
    tensor_core: dict[str, int]
    tma: dict[str, int]


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel for `target`."""
    kernel, given = launch.kernel, {"S": launch.shape, **launch.options, "debug": False, "instrumentation_mode": ""}
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.arguments, **given)
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def inspect(compiled: Any) -> Resources:
    """Registers, memory and the instructions that matter.

    Raises:
        FileNotFoundError: Triton came without cuobjdump or nvdisasm.
    """
    if "amdgcn" in compiled.asm:
        return _inspect_amd(compiled)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        counts = _count(_output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(path)))
    sizes = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Resources(
        registers=sizes["REG"],
        spills=sizes["STACK"] + sizes["LOCAL"],
        local_accesses=sum(counts.get(name, 0) for name in LOCAL_MEMORY),
        shared=compiled.metadata.shared + sizes["SHARED"],
        tensor_core=_only(counts, TENSOR_CORE),
        tma=_only(counts, TMA),
    )


def _inspect_amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return Resources(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        local_accesses=number("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        tensor_core=_only(_count(text), TENSOR_CORE),
        tma={},
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def _count(assembly: str) -> dict[str, int]:
    """How often each instruction that matters occurs, without its suffixes."""
    counts: dict[str, int] = {}
    for name in re.findall(rf"\b({'|'.join((*TENSOR_CORE, *TMA, *LOCAL_MEMORY))})", assembly):
        counts[name] = counts.get(name, 0) + 1
    return counts


def _only(counts: dict[str, int], names: tuple[str, ...]) -> dict[str, int]:
    return {name: counts[name] for name in names if name in counts}
