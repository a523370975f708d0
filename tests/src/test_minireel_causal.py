"""The causal minireel: who sees whom in training, the cache of its rollout, its stages, and the shipped weights."""

from __future__ import annotations

import json

import pytest
import torch

from sparsereel import minireel
from sparsereel.minireel import train
from sparsereel.minireel.causal import load_causal_folder
from sparsereel.minireel.rollout import ChunkCache, roll_out
from sparsereel.minireel.training import stages
from sparsereel.minireel.training.architecture import build_transformer, export_transformer
from sparsereel.minireel.training.causal_flow import chunk_loss, predict_chunks, use_chunks
from sparsereel.minireel.training.clip_sets import ClipSet
from sparsereel.minireel.training.layouts import SINK_1, SINK_3, SLIDING, START, Layout
from sparsereel.minireel.training.recipe import Portion, Stage

LAYOUTS = (START, SLIDING, SINK_1, SINK_3)
ENDLESS = ClipSet("tiny_endless", count=3, frames=61, height=32, width=32, two=0.0, seed=0, starts_of=33)


def tiny_model(layers: int = 2):
    torch.manual_seed(0)
    model = build_transformer(layers=layers, heads=2, head_dim=16).eval()
    torch.nn.init.normal_(model.proj_out.weight, std=0.2)
    return model


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_shows_each_group_only_the_past_and_itself(layout):
    frames = layout.draw(21, torch.Generator().manual_seed(1)).tolist()
    assert len(frames) == layout.frames
    for *seen, (start, stop) in layout.views:
        own = frames[start:stop]
        assert own == list(range(own[0], own[0] + 3))
        past = [frame for a, b in seen for frame in range(a, b)]
        assert all(frame < layout.clean for frame in past)
        assert all(frames[frame] < own[0] for frame in past)
        # What is next to the group in the window was just before it in the clip.
        later = [frames[frame] for frame in past if frames[frame] >= 3 or layout.starts_at is None]
        if start >= layout.clean and later:
            assert later == list(range(own[0] - len(later), own[0]))


def test_later_windows_begin_anywhere_in_a_clip():
    generator = torch.Generator().manual_seed(0)
    assert all(START.draw(21, generator)[0] == 0 for _ in range(5))
    starts = {int(SLIDING.draw(21, generator)[0]) for _ in range(60)}
    assert starts == set(range(1, 10))
    sunk = [SINK_3.draw(21, generator) for _ in range(60)]
    assert {tuple(frames[:3].tolist()) for frames in sunk} == {(0, 1, 2)}
    assert {int(frames[3]) for frames in sunk} == set(range(3, 10))
    with pytest.raises(ValueError, match="clips of 13 latent frames, got 9"):
        SLIDING.draw(9, generator)


def test_layouts_are_checked():
    with pytest.raises(ValueError, match="cover its 6 frames"):
        Layout("gap", 0, 6, 3, (((0, 3),), ((4, 6),)), None)
    with pytest.raises(ValueError, match="sees more than 9"):
        Layout("wide", 0, 12, 3, (((0, 9),), ((0, 9), (9, 12))), None)
    with pytest.raises(ValueError, match="one copy only"):
        START.repeated(2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_chunks_see_what_a_cached_rollout_sees(layout):
    """The whole sequence in one pass equals group after group with stock positions: own chunk and its window."""
    model, cells = tiny_model(layers=1), (2, 3)
    use_chunks(model)
    latents, text = torch.randn(2, 16, layout.frames, *cells), torch.randn(2, 4, 128)
    levels = torch.rand(2, layout.frames)
    levels[:, : layout.clean] = 0
    whole = predict_chunks(model, latents, levels, text, layout).unflatten(1, (-1, 6)).transpose(1, 2)
    stock = tiny_model(layers=1)
    at = layout.clean
    for spans in layout.views:
        if spans[-1][0] < layout.clean:
            continue
        # With one layer, what the past saw itself does not matter, and stock attention over the window is the same.
        window = torch.cat([torch.arange(a, b) for a, b in spans])
        times = (1000 * levels[:, window]).repeat_interleave(6, 1)
        alone = stock(latents[:, :, window], times, text, return_dict=False)[0][:, :, -3:]
        expected = alone.flatten(3).permute(0, 3, 2, 1)
        torch.testing.assert_close(
            whole[:, :, at - layout.clean : at - layout.clean + 3], expected, rtol=1e-4, atol=1e-4
        )
        at += 3


def test_the_cache_equals_the_uncached_pass():
    """Three clean chunks through the cache, one by one, equal the same chunks in one pass of a layout."""
    model, cells = tiny_model(), (2, 3)
    latents, text = torch.randn(1, 16, 9, *cells), torch.randn(1, 4, 128)
    cache, outputs = ChunkCache(model, cells, window=9, sink=0), []
    with cache.attached(), torch.no_grad():
        for start in (0, 3, 6):
            outputs.append(model(latents[:, :, start : start + 3], torch.zeros(1), text, return_dict=False)[0])
            cache.keep()
    chunks = [(0, 3), (3, 6), (6, 9)]
    views = tuple(tuple(chunks[: index + 1]) for index in range(3))
    layout = Layout("clean", 0, 3, 9, views, None)
    assert (layout.clean, layout.frames) == (0, 9)
    use_chunks(model)
    with torch.no_grad():
        whole = predict_chunks(model, latents, torch.zeros(1, 9), text, layout)
    cached = torch.cat(outputs, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sink", "expected"), [(0, [6, 7, 8, 9, 10, 11]), (1, [0, 7, 8, 9, 10, 11]), (3, [0, 1, 2, 9, 10, 11])]
)
def test_the_window_slides_beside_the_sink(sink, expected):
    model = tiny_model(layers=1)
    processors = [block.attn1.processor for block in model.blocks]
    cache = ChunkCache(model, (1, 1), window=9, sink=sink)
    with cache.attached():
        for chunk in range(4):
            # Frame numbers where keys and values would be.
            cache.layers[0].current = tuple(torch.arange(3.0 * chunk, 3 * chunk + 3).view(1, 3, 1, 1) for _ in range(2))
            cache.keep()
    assert cache.layers[0].past[1].flatten().tolist() == expected
    assert [block.attn1.processor for block in model.blocks] == processors
    with pytest.raises(ValueError, match="no forward pass"):
        cache.keep()
    with pytest.raises(ValueError, match=r"0\.\.6 beside a window of 9, got 7"):
        ChunkCache(model, (1, 1), window=9, sink=7)


def test_the_loss_is_the_velocity_error_of_noisy_chunks():
    model = tiny_model(layers=1)
    use_chunks(model)
    clean, noise, text = torch.randn(2, 16, 24, 2, 2), torch.randn(2, 16, 24, 2, 2), torch.randn(2, 4, 128)
    levels = torch.rand(2, 6)
    losses = chunk_loss(model, clean, noise, levels, text, START)
    assert losses.shape == (2, 6)
    s = torch.cat([torch.zeros(2, 6), levels.repeat_interleave(3, 1)], 1)
    noisy = (1 - s[:, None, :, None, None]) * clean + s[:, None, :, None, None] * noise
    velocity = predict_chunks(model, noisy, s, text, START).transpose(1, 2).unflatten(2, (18, 2, 2))
    error = (velocity - (noise - clean)[:, :, 6:]).square()
    torch.testing.assert_close(losses, error.unflatten(2, (6, 3)).mean((1, 3, 4, 5)))
    # Noise in the context is seen, and not told.
    other = chunk_loss(model, clean, noise, levels, text, START, torch.full((2, 2), 0.1))
    torch.testing.assert_close(other[:, 0], losses[:, 0])
    assert not torch.allclose(other[:, 1], losses[:, 1])


def test_the_stages_write_a_transformer_that_loads(tmp_path, monkeypatch):
    portions = tuple(Portion(ENDLESS, batch=2, share=1.0, layout=layout) for layout in (START, SINK_3))
    for name in ("CAUSAL_SMALL", "CAUSAL"):
        stage = Stage(name.lower(), 1, portions, 1e-3, 1e-3, 0.5, ENDLESS, warm_up=1)
        monkeypatch.setattr(stages.recipe, name, stage)
    asked = ["--output", str(tmp_path), "--steps", "2", "--no-compile", "--start-from", str(minireel.WEIGHTS)]
    assert train.main([*asked, "--stage", "causal"]) == 2
    for stage in ("causal_small", "causal"):
        assert train.main([*asked, "--stage", stage]) == 0
    pipeline = minireel.load_causal(weights=tmp_path / "causal")
    start, end = minireel.load().transformer, pipeline.transformer
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters(), strict=True)]
    assert all(moved)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a red 3 on navy", height=32, width=32, num_frames=21, num_inference_steps=1).frames
    assert made.shape == (1, 21, 32, 32, 3)
    assert json.loads((tmp_path / "causal" / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"


def test_a_video_does_not_depend_on_those_beside_it(tmp_path):
    export_transformer(tmp_path / "causal", minireel.load().transformer)
    pipeline = load_causal_folder(minireel.WEIGHTS, tmp_path / "causal", torch.float32, "cpu")
    size = {"height": 32, "width": 32, "steps": 2, "guidance": 3.0, "sink": 1}
    seeded = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = roll_out(pipeline, ["a red 3 on navy", "a blue 7 on black"], 4, generators=seeded, **size)
    alone = roll_out(pipeline, ["a blue 7 on black"], 4, generators=[torch.Generator().manual_seed(1)], **size)
    assert both.shape == (2, 16, 12, 4, 4)
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)


def test_wrong_use_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        minireel.load_causal(weights=tmp_path)
    export_transformer(tmp_path / "causal", minireel.load().transformer)
    pipeline = minireel.load_causal(weights=tmp_path / "causal")
    for arguments, message in (
        ({"num_frames": 32}, "4k"),
        ({"output_type": "pil"}, "np, pt or latent"),
        ({"sink_frames": 8}, "sink must lie"),
        ({"generator": [torch.Generator()] * 2}, "one a prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline("a red 3 on navy", num_inference_steps=1, **arguments)


def test_the_shipped_causal_model_goes_on_from_its_cache():
    """The second chunk depends on the first, and all but the transformer is minireel's own."""
    pipeline, plain = minireel.load_causal(), minireel.load()
    assert (pipeline.chunk_frames, pipeline.window_frames) == (3, 9)
    assert torch.equal(pipeline.text_encoder.shared.weight, plain.text_encoder.shared.weight)
    ours, theirs = pipeline.transformer.state_dict(), plain.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    size = {"height": 48, "width": 48, "steps": 4, "guidance": 2.0}
    red, blue = (
        roll_out(pipeline, [text], 2, generators=[torch.Generator().manual_seed(0)], **size)
        for text in ("a red 3 moving right on navy", "a blue 3 moving right on navy")
    )
    assert not torch.allclose(red[:, :, :3], blue[:, :, :3], atol=0.1)
    pixels = pipeline.decode(red)[0]
    assert pixels.shape == (21, 48, 48, 3)
    # The navy ground: blue above red and green, in the first frame and in the last.
    for frame in (pixels[0], pixels[-1]):
        ground = frame.reshape(-1, 3)[frame.reshape(-1, 3).sum(1) < 0.8].mean(0)
        assert ground[2] > ground[0]
        assert ground[2] > ground[1]


def test_the_scorecard_of_long_videos(tmp_path, capsys):
    from sparsereel.minireel import causal_scorecard

    out = tmp_path / "s.json"
    asked = ["--clips", "1", "--chunks", "4", "--steps", "1", "--json", str(out), "--sheet", str(tmp_path / "s.png")]
    causal_scorecard.main(asked)
    written = json.loads(out.read_text())
    assert len(written["stretches"]) == 1, "a rest of less than half a native clip belongs to the stretch before"
    assert (tmp_path / "s.png").exists()
    assert "stretch 0" in capsys.readouterr().out


def test_stretches_are_native_clips():
    import numpy as np

    from sparsereel.minireel.causal_scorecard import judge_stretches

    class Judge:
        def score(self, video, prompt):
            return len(video), prompt

    found = judge_stretches(Judge(), np.zeros((105, 1, 1, 3)), "a red 3 moving left on navy")
    assert [length for length, _ in found] == [33, 32, 40]
    assert [prompt for _, prompt in found] == ["a red 3 moving left on navy", *["a red 3 on navy"] * 2]
