"""Intel AMX: the unit for matrix tiles, with its instructions spelled out in plain code, so that any processor with
AVX-512 BF16 can check the kernels around them. What stays untested without the hardware is the eight instructions."""

from __future__ import annotations

import pytest
import torch

from sparsereel_kernels import cpu
from sparsereel_kernels.cpu import builder
from sparsereel_kernels.testing import assert_matches_reference, frame_decay, make_qkv, random_block_mask

pytestmark = pytest.mark.skipif(bool(cpu.build_status().reason), reason=cpu.build_status().reason)


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    """A library of the portable and the emulated AMX unit, in the place of the usual one."""
    if "avx512_bf16" not in cpu.isas():
        pytest.skip("the emulation needs AVX-512 BF16")
    usual = builder._toolchain()
    units = {"portable": (), "amx": (*builder.X86_UNITS["avx512_bf16"], "-DSPARSEREEL_EMULATE_AMX")}
    with pytest.MonkeyPatch.context() as patch:
        tools = builder._Toolchain(usual.compiler, usual.version, units)
        patch.setattr(builder, "COMMON_FLAGS", (*builder.COMMON_FLAGS, "-DSPARSEREEL_EMULATE_AMX"))
        patch.setattr(builder, "_toolchain", lambda: tools)
        patch.setattr(builder, "_loaded", None)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("SPARSEREEL_ISA", raising=False)
        cpu.binding.kernels.cache_clear()
        assert cpu.isas() == ["amx", "portable"]
        yield
    cpu.binding.kernels.cache_clear()


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (16, 33), (63, 63), (111, 1000), (300, 300)])
def test_lengths(q_len, kv_len):
    q, k, v = make_qkv(q_len, kv_len, head_dim=64, dtype=torch.bfloat16, layout="bshd")
    mask = random_block_mask(q_len, kv_len, density=0.5, heads=2, empty_rows=q_len > 128)
    assert_matches_reference(q, k, v, mask, backend="cpu")


@pytest.mark.parametrize(
    ("head_dim", "v_dim"), [(8, 256), (33, 17), (40, 48), (72, 64), (80, 160), (128, 128), (256, 80)]
)
def test_head_dims(head_dim, v_dim):
    q, k, v = make_qkv(131, 90, head_dim=head_dim, v_dim=v_dim, dtype=torch.bfloat16)
    assert_matches_reference(q, k, v, random_block_mask(131, 90, block=(64, 32), density=0.6), backend="cpu")


@pytest.mark.parametrize("block", [(8, 8), (16, 24), (136, 64), (256, 128)], ids=str)
def test_blocks_groups_and_modifiers(block):
    q, k, v = make_qkv(301, 275, batch=2, heads=4, kv_heads=2, head_dim=24, dtype=torch.bfloat16)
    mask = random_block_mask(301, 275, block=block, density=0.5, partial_share=0.7, heads=4, empty_rows=True)
    lengths = torch.tensor([275, 37], dtype=torch.int32)
    assert_matches_reference(q, k, v, mask, backend="cpu", key_lengths=lengths, modifier=frame_decay(301, 275))


def test_full_precision_takes_the_same_road_as_without_tiles():
    q, k, v = make_qkv(131, 200, head_dim=40)
    assert_matches_reference(q, k, v, random_block_mask(131, 200), backend="cpu")
