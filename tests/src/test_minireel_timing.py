"""The timing of dense clips: a share between 0 and 1, and a clock that counts self-attention only."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from sparsereel.minireel import Size, timing

TINY = Size(frames=5, height=32, width=32, steps=3, guidance=3.5, tokens=32)


def test_a_measurement_adds_up():
    measured = timing.measure(TINY, torch.float32, runs=1)
    assert 0 < measured.attention_share < 1
    assert measured.clip(3) == pytest.approx(6 * measured.forward + measured.decode)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        timing.measure(TINY, torch.float32, runs=0)


def test_the_clock_counts_self_attention_only():
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 16, 8)
    with timing.AttentionClock() as clock:
        across = F.scaled_dot_product_attention(query=q, key=k, value=k)
        assert clock.seconds == 0
        within = F.scaled_dot_product_attention(q, q, q)
        assert clock.seconds > 0
    assert torch.equal(across, F.scaled_dot_product_attention(q, k, k))
    assert torch.equal(within, F.scaled_dot_product_attention(q, q, q))


def test_the_command_prints_a_row_a_size(monkeypatch, capsys):
    monkeypatch.setattr(timing, "NATIVE", TINY)
    monkeypatch.setattr(sys, "argv", ["timing", "--size", "native", "--runs", "1"])
    timing.main()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows[2:]] == [["native", "float32", "32"], ["native", "bfloat16", "32"]]
