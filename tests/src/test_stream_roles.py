"""Roles of heads: measured on heads that were planted, kept in a file, read by a stream."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import sparsereel
from sparsereel.cli.main import run
from sparsereel.extend.rope import plain_frequencies
from sparsereel.stream.cache import CachePolicy, HeadGroup, KVCache
from sparsereel.stream.role_meter import RoleMeter, choose_streaming, measure_roles
from sparsereel.stream.roles import HeadRoles, load_roles, write_roles

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, DIM, TOKENS, CHUNK, WINDOW, SINK, RECENT = 4, 16, 2, 2, 10, 2, 4
FAR, NEAR, START, EVERYWHERE = range(HEADS)


def planted(generator, frame):
    """q, k, v of a chunk at `frame`. The last channels say how old a frame is; each head likes another age."""
    q, k, v = (torch.zeros(1, HEADS, CHUNK * TOKENS, DIM) for _ in range(3))
    for i in range(CHUNK * TOKENS):
        k[..., i, 4] = frame + i // TOKENS  # what grows with time
        k[..., i, 5] = 1.0 if frame + i // TOKENS < SINK else 0.0  # the sink
    v.copy_(torch.randn(v.shape, generator=generator))
    q[:, NEAR, :, 4] = 50.0
    q[:, FAR, :, 4], q[:, FAR, :, 5] = -50.0, -1e4
    q[:, START, :, 5] = 1e4
    return q, k, v


def fill(cache, chunks):
    generator = torch.Generator().manual_seed(0)
    for chunk in range(chunks):
        cache.start = chunk * CHUNK
        for layer in range(len(cache.layers)):
            cache.attend(layer, *planted(generator, cache.start))
        cache.commit(CHUNK)


def test_planted_heads_are_found():
    policy = CachePolicy(((HeadGroup(None, SINK, WINDOW),),) * 2, CHUNK, plain_frequencies(4, 100.0))
    cache = KVCache(policy, HEADS, DIM, TOKENS)
    with RoleMeter(cache, HEADS, RECENT) as meter:
        fill(cache, 9)
    # Every full window holds 2 frames of sink, 4 far ones and 4 recent ones.
    expected = torch.zeros(2, HEADS, dtype=torch.float64)
    expected[:, FAR], expected[:, EVERYWHERE] = 1.0, 0.4
    torch.testing.assert_close(meter.scores("mass"), expected, atol=1e-5, rtol=0)
    assert choose_streaming(meter.scores("mass"), 0.5, within_layers=False) == {0: (NEAR, START), 1: (NEAR, START)}
    apart = meter.scores("distance")
    assert (apart[:, EVERYWHERE] < apart[:, :EVERYWHERE].min(1).values).all()  # an average is nearest to the centre
    assert all(group.observer is None for group in cache)


def test_a_window_that_never_filled_measures_nothing():
    cache = KVCache(CachePolicy(((HeadGroup(None, SINK, WINDOW),),), CHUNK, plain_frequencies(4, 100.0)), HEADS, DIM, 2)
    with RoleMeter(cache, HEADS, RECENT) as meter:
        fill(cache, 4)
    with pytest.raises(ValueError, match="measure a longer stream"):
        meter.scores("mass")


@pytest.mark.parametrize(
    ("keep", "within", "expected"),
    [
        (0.0, False, {0: (0, 1, 2), 1: (0, 1, 2)}),
        (0.2, False, {0: (0, 1, 2), 1: (0,)}),  # 2 of 6, both in layer 1
        (0.2, True, {0: (0, 1), 1: (0, 1)}),
        (1.0, False, {}),
    ],
)
def test_the_best_are_kept_over_all_layers_or_within_each(keep, within, expected):
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert choose_streaming(scores, keep, within_layers=within) == expected


def measured(streams, **arguments):
    arguments = {"causal": streams.CAUSAL, "window": 8, "sink": 2, "steps": 1, "guidance": 1.0, **arguments}
    return measure_roles(streams.pipe(), [streams.PROMPT], chunks=1, **streams.SIZE, **arguments)


def test_measured_on_a_stream_kept_in_a_file_and_used(streams, tmp_path):
    found = measured(streams, recent=3, keep=0.5)
    assert found.scores["mass"].shape == (2, 3)
    assert ((found.scores["mass"] > 0) & (found.scores["mass"] < 1)).all()
    assert sum(len(heads) for heads in found.roles.streaming.values()) == 3
    path = tmp_path / "roles.yaml"
    found.save(path)
    assert load_roles(path, 2, 3) == found.roles
    assert yaml.safe_load(path.read_text())["measured"]["by"] == "mass"
    arguments = {"causal": streams.CAUSAL, "window": 8, "sink": 2, "steps": 1, "guidance": 1.0, **streams.SIZE}
    made = [
        torch.cat(
            list(sparsereel.stream(streams.pipe(), streams.PROMPT, frames=45, output="latents", **arguments, **r)), 1
        )
        for r in ({"head_roles": path}, {"head_roles": found.roles}, {})
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0][:, :4], made[2][:, :4])  # nothing evicted yet
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"recent": 6}, "recent must be 2 .a chunk. to 5"),
        ({"keep": 1.5}, "keep must be a share"),
        ({"by": "luck"}, "allowed: mass, distance"),
        ({"method": "deep-forcing"}, "plain window"),
        ({"method": "windows", "sink": None}, "plain window"),
    ],
)
def test_wrong_measures_are_refused(streams, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        measured(streams, **arguments)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "not a roles file of version 1"),
        ({"model": {"layers": 3, "heads": 3}}, "this one has 2 layers of 3 heads"),
        ({"streaming": {0: [7]}}, "a model of 2 x 3 lacks"),
        ({"streaming": {0: "all"}}, "whole numbers by layer"),
        ({"recent": "few"}, "must hold recent"),
        ({"recent": 0}, "recent >= 1"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, change, sentence):
    path = tmp_path / "roles.yaml"
    write_roles(path, HeadRoles({0: (1,)}, 4), 2, 3, {})
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(ValueError, match=sentence):
        load_roles(path, 2, 3)


def test_the_command_measures_and_uses_roles(tmp_path, capsys):
    roles, video = tmp_path / "roles.yaml", tmp_path / "v.mp4"
    small = ["--height", "16", "--width", "16", "--steps", "1", "--guidance", "1"]
    prompt = "a red 3 moving right on navy"
    assert run(["stream", prompt, "--measure-roles", str(roles), "--recent", "4", *small]) == 0
    assert "keeps everything; wrote" in capsys.readouterr().err
    assert len(yaml.safe_load(roles.read_text())["measured"]["scores"]["mass"]) == 6
    assert run(["stream", prompt, "--frames", "50", "--roles", str(roles), "-o", str(video), *small]) == 0
    assert json.loads(video.with_suffix(".json").read_text())["settings"]["head_roles"]
    assert run(["stream", prompt, "--frames", "9", "--roles", str(tmp_path / "no.yaml"), "-o", str(video), *small]) == 2
    assert "cannot read the roles file" in capsys.readouterr().err
