"""Forecasts of passes and memory, and sizes that do not fit."""

from __future__ import annotations

import logging

import pytest
import torch

import sparsereel
from sparsereel import minireel
from sparsereel.cli.main import run
from sparsereel.extend import forecast as forecasting
from sparsereel.extend import memory
from sparsereel.extend.forecast import forecast, meta_pipeline
from sparsereel.extend.memory import check, largest
from sparsereel.extend.passes import Pass, passes
from sparsereel.extend.recipes import resolve
from sparsereel.extend.sizes import resolve as resolve_size
from sparsereel.extend.tracing import peak_of, traced_activations

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe():
    return meta_pipeline(minireel.WEIGHTS, minireel.MiniReelPipeline)


def sizes(pipe, frames=None, height=None, width=None):
    return resolve_size(pipe, pipe.transformer, frames, height, width)


def test_the_trace_counts_what_a_real_forward_holds(tiny):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    inputs = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    real = peak_of(lambda: model(**inputs, return_dict=False))
    frames, height, width = (
        n // p for n, p in zip(inputs["hidden_states"].shape[2:], model.config.patch_size, strict=True)
    )

    class Pipe:
        def __call__(self, max_sequence_length=tiny.TEXT):
            raise NotImplementedError

    traced = traced_activations(model, Pipe(), (frames, height, width), model.config.patch_size, torch.float32)
    assert traced == real
    twice = traced_activations(model, Pipe(), (2 * frames, height, width), model.config.patch_size, torch.float32)
    assert 1.9 < twice / traced < 2.1


def test_peaks_are_of_what_lives_at_once():
    def chain():
        x = torch.zeros(1000)
        for _ in range(5):
            x = x + 1
        return x

    assert peak_of(chain) == 2 * 4000
    weight = torch.zeros(100, 100)
    assert peak_of(lambda: torch.zeros(1, 100) @ weight.t()) == 2 * 400


@pytest.mark.parametrize(
    ("method", "asked", "expected"),
    [
        ("plain", {"frames": 2.0}, [Pass(40, (18, 12, 12))]),
        ("sliding", {"frames": 2.0}, [Pass(40 * 4, (9, 12, 12))]),
        ("multidiffusion", {"height": 2.0, "width": 2.0}, [Pass(40 * 9, (9, 12, 12))]),
        ("freeswim", {"height": 2.0, "width": 2.0},
         [Pass(40, (9, 12, 12)), Pass(28 * 0.8 * 0.5 / 5, (9, 24, 24), windowed=False), Pass(28, (9, 24, 24))]),
    ],
)  # fmt: skip
def test_passes_by_recipe(pipe, method, asked, expected):
    wanted = sizes(pipe, **asked)
    found = passes(resolve(method, "wan", wanted), wanted, 40)
    assert [(p.tokens, p.windowed) for p in found] == [(p.tokens, p.windowed) for p in expected]
    assert [p.count for p in found] == pytest.approx([p.count for p in expected])


def ask(method, plan=None, **size):
    given = {"frames": None, "height": None, "width": None, **size}
    return forecast(minireel.WEIGHTS, minireel.MiniReelPipeline, given, method, plan)


def test_windows_cost_their_share():
    plain, window, sliding = (ask(m, frames=4.0) for m in ("plain", "window", "sliding"))
    assert window.density == pytest.approx(9 / 36)
    assert window.attention_flops == pytest.approx(plain.attention_flops / 4)
    # Windows of 9 frames, every 4 of them, over 36 latent frames.
    assert sliding.passes == 8 * sliding.forwards
    assert sliding.attention_flops == pytest.approx(plain.attention_flops * 8 / 16)
    assert sliding.memory < window.memory


@pytest.mark.parametrize(
    ("asked", "tokens", "fits"),
    [
        ({"frames": 4.0}, 20 * 144, (77, 96, 96)),
        ({"frames": 4.0}, 100, None),
        ({"height": 3.0, "width": 3.0}, 9 * 24 * 24, (33, 192, 192)),
    ],
)
def test_the_largest_size_that_fits(pipe, asked, tokens, fits):
    assert largest(sizes(pipe, **asked), tokens) == fits


def test_a_clip_that_does_not_fit_is_refused(pipe):
    wanted = sizes(pipe, frames=4.0)
    check(wanted, 2**31, None, 1.0)
    check(wanted, 2**30, 2**31, 2**30 / 5184)
    with pytest.raises(ValueError, match=r"frames=141 needs about 1.0 GiB, but 0.5 GiB are free; .* fits is frames=69"):
        check(wanted, 2**30, 2**29, 2**30 / 5184)


def test_the_command_and_the_verb_refuse_it_too(monkeypatch, tmp_path, capsys, caplog):
    monkeypatch.setattr(memory, "available", lambda device: 200 * 2.0**20)
    monkeypatch.setattr(forecasting, "available", lambda device: 200 * 2.0**20)
    video = tmp_path / "long.mp4"
    assert run(["extend", "a red 3", "--frames", "40x", "-o", str(video)]) == 2
    assert "the largest size that fits is frames=" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
    loaded = minireel.load()
    with pytest.raises(ValueError, match="GiB are free; the largest size that fits is frames="):
        sparsereel.extend(loaded, frames=100.0, method="plain")
    with caplog.at_level(logging.WARNING):
        assert sparsereel.extend(loaded, frames=2.0).replaced == 6
