"""AMT-S, ViCLIP and MUSIQ: against values worked out by hand and other packages' networks, and from files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsereel.cli.main import run
from sparsereel.evaluate.vbench import Sources, measure
from sparsereel_eval.vbench import amt, backbones, dimensions, musiq, viclip, weights


def still_network(shift=0.0):
    """AMT-S that finds `shift` pixels to the right towards b, as much to the left towards a, and corrects nothing."""
    network = amt.AmtS().eval()
    with torch.no_grad():
        for decoder in (network.decoder4, network.decoder3, network.decoder2, network.decoder1):
            for value in decoder.convblock[2].parameters():
                value.zero_()
        for update in (network.update4, network.update3, network.update2):
            for head in (update.flow_head, update.feat_head):
                for value in head[2].parameters():
                    value.zero_()
        for value in network.comb_block[2].parameters():
            value.zero_()
        # Three motions to a, then three to b, x before y.
        bias = network.decoder1.convblock[2].bias
        bias[0:6:2], bias[6:12:2] = -shift, shift
    return network


def test_amt_blends_what_its_motions_point_at():
    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 3, 128, 144)
    with torch.no_grad():
        assert torch.allclose(still_network()(a, b), (a + b) / 2, atol=1e-5)
        # A picture that moves by 4 pixels: halfway it has moved by 2.
        moved = still_network(2.0)(a, a.roll(4, 3))
    assert torch.allclose(moved[..., 4:-4], a.roll(2, 3)[..., 4:-4], atol=1e-4)


def test_warping_by_hand():
    picture = torch.arange(12.0).reshape(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[:, 0], flow[:, 1] = 1.5, -1
    found = amt.warped(picture, flow)[0, 0]
    # One row up, the border repeated; one and a half columns to the right.
    assert torch.allclose(found[2], torch.tensor([5.5, 6.5, 7.0, 7.0]), atol=1e-5)
    assert torch.allclose(found[0], torch.tensor([1.5, 2.5, 3.0, 3.0]), atol=1e-5)


def test_correlation_by_hand():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 5, 16, 17)
    to_b, to_a = torch.zeros(2, 1, 2, 16, 17)
    to_b[:, 0], to_b[:, 1] = 2, -1
    found = amt.Correlation(a, b)(to_b, to_a)
    assert found.shape == (1, 2 * 4 * 49, 16, 17)
    y, x = 7, 8
    for dx, dy in ((0, 0), (3, -2), (-3, 1)):
        place = (dx + 3) * 7 + dy + 3
        expected = (a[0, :, y, x] * b[0, :, y - 1 + dy, x + 2 + dx]).sum() / 5**0.5
        assert found[0, place, y, x] == pytest.approx(float(expected), abs=1e-4)
        back = (b[0, :, y, x] * a[0, :, y + dy, x + dx]).sum() / 5**0.5
        assert found[0, 196 + place, y, x] == pytest.approx(float(back), abs=1e-4)
    coarse = (a[0, :, y, x, None, None] * b[0, :, 2:4, 10:12]).sum(0).mean() / 5**0.5
    to_b[:, 0], to_b[:, 1] = 10 - x, 2 - y
    assert amt.Correlation(a, b)(to_b, to_a)[0, 49 + 24, y, x] == pytest.approx(float(coarse), abs=1e-4)


def test_amt_has_the_published_layout():
    state = amt.AmtS().state_dict()
    assert sum(value.numel() for value in state.values()) == 2_990_543, "3.0 million, as published"
    shapes = {
        "feat_encoder.conv1.weight": (32, 3, 7, 7),
        "feat_encoder.layer2.0.downsample.0.weight": (64, 32, 1, 1),
        "feat_encoder.conv2.bias": (84,),
        "encoder.pyramid4.1.1.weight": (56,),
        "decoder4.convblock.0.0.weight": (112, 113, 3, 3),
        "decoder3.convblock.1.conv4.0.weight": (20, 20, 3, 3),
        "decoder2.convblock.1.prelu.weight": (96,),
        "decoder1.convblock.2.weight": (60, 24, 4, 4),
        "update4.convc1.weight": (64, 392, 1, 1),
        "update3.gru.0.weight": (76, 104, 3, 3),
        "update2.flow_head.2.bias": (4,),
        "comb_block.1.weight": (18,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_frames_between_are_padded_and_cut_to_levels():
    seen = []

    def network(a, b):
        seen.append(tuple(a.shape[-2:]))
        return (a + b) / 2

    a, b = np.full((2, 130, 37, 3), 10, np.uint8)
    b[:] = 13
    middle = backbones.interpolation(network)(a, b)
    assert seen == [(144, 128)]
    assert middle.shape == (130, 37, 3)
    assert middle.dtype == np.uint8
    assert (middle == 11).all(), "11.5 is cut, as the official program does"
    score = dimensions.motion_smoothness([a, b, a, b, a], backbones.interpolation(network))
    assert score == pytest.approx((255 - 3) / 255)
    with pytest.raises(ValueError, match="at least 3 frames, got 2"):
        dimensions.motion_smoothness([a, b], backbones.interpolation(network))


@pytest.mark.parametrize(("total", "wanted"), [(16, [0, 2, 4, 6, 8, 10, 12, 14]), (3, [0, 1, 2, 2, 2, 2, 2, 2])])
def test_middle_frames(total, wanted):
    assert dimensions.middle_frames(total, 8) == wanted


def test_middle_frames_of_uneven_parts():
    # Edges 0 2 4 6 8 10 12 14 17 after rounding down: the last part has three frames.
    assert dimensions.middle_frames(17, 8) == [0, 2, 4, 6, 8, 10, 12, 15]


TINY = {"side": 224, "patch": 56, "width": 64, "layers": 2, "text_width": 64, "text_layers": 2, "length": 32}


def tiny_clip():
    """open_clip's CLIP of ViCLIP's sizes, for one picture."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=56, image_size=224)
    text = CLIPTextCfg(context_length=32, vocab_size=49408, width=64, heads=1, layers=2)
    return CLIP(32, vision, text, quick_gelu=True).eval()


def as_viclip(network) -> dict[str, torch.Tensor]:
    """ViCLIP's file of CLIP's weights, with times that say nothing."""
    state = {}
    for name, value in network.state_dict().items():
        if name.startswith("visual."):
            new = "vision_encoder." + name.removeprefix("visual.")
            state[new] = value[:, :, None] if name == "visual.conv1.weight" else value
        elif not name.startswith("logit"):
            state[f"text_encoder.{name}"] = value
    state["vision_encoder.temporal_positional_embedding"] = torch.zeros(1, 8, 64)
    state["temp"] = torch.tensor(0.01)
    return {name: value.clone().contiguous() for name, value in state.items() if "attn_mask" not in name}


@torch.no_grad()
def test_viclip_of_one_frame_is_clip():
    clip = tiny_clip()
    network = viclip.ViClip(**TINY).eval()
    network.load_state_dict(as_viclip(clip))
    picture = torch.randn(2, 3, 224, 224)
    tokens = torch.cat([viclip.tokenizer()(text) for text in ("a dog", "a very " * 40 + "long text")])
    torch.testing.assert_close(network.encode_text(tokens), clip.encode_text(tokens), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.encode_video(picture[:, None]), clip.encode_image(picture), atol=1e-5, rtol=1e-4)
    # Frames that are alike, without times, share attention evenly: again the picture's vector.
    alike = picture[:, None].expand(-1, 8, -1, -1, -1)
    plain = network.encode_video(alike)
    network.vision_encoder.temporal_positional_embedding.normal_()
    assert not torch.allclose(network.encode_video(alike), plain, atol=1e-3), "times are looked at"
    assert not torch.allclose(
        network.encode_video(torch.cat([alike[:, :4], alike[:, :4] + 1], 1)),
        network.encode_video(torch.cat([alike[:, :4] + 1, alike[:, :4]], 1)),
        atol=1e-3,
    ), "and so is their order"


def test_viclip_has_the_published_layout():
    with torch.device("meta"):
        state = viclip.ViClip().state_dict()
    shapes = {
        "temp": (),
        "vision_encoder.class_embedding": (1024,),
        "vision_encoder.positional_embedding": (257, 1024),
        "vision_encoder.temporal_positional_embedding": (1, 8, 1024),
        "vision_encoder.conv1.weight": (1024, 3, 1, 14, 14),
        "vision_encoder.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
        "vision_encoder.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
        "vision_encoder.proj": (1024, 768),
        "text_encoder.positional_embedding": (32, 768),
        "text_encoder.token_embedding.weight": (49408, 768),
        "text_encoder.transformer.resblocks.11.ln_2.bias": (768,),
        "text_encoder.text_projection": (768, 768),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert not any(name.startswith(("vision_encoder.ln_mid", "text_encoder.logit")) for name in state)


def filled(network):
    """Random weights everywhere, also where the published layout starts at 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in network.parameters():
            value.normal_(0, 0.05)
    return network.eval()


@torch.no_grad()
def test_musiq_looks_at_three_sizes():
    network = filled(musiq.Musiq(layers=1))
    picture = torch.rand(1, 3, 70, 100)
    seen = []
    network.transformer_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    rating = network(picture)
    tokens, places, scales = seen[0]
    # 157 x 224, 269 x 384 and 70 x 100 pixels in patches of 32.
    assert torch.bincount(scales).tolist() == [5 * 7, 9 * 12, 3 * 4]
    assert tokens.shape == (1, 155, 384)
    # Three rows and four columns of ten places each.
    assert places[-12:].tolist() == [10 * y + x for y in (0, 3, 6) for x in (0, 2, 5, 7)]
    assert not torch.equal(network(picture.flip(3)), rating), "places count"
    assert rating.shape == (1,)


def test_musiq_patches_and_padding_by_hand():
    picture = torch.arange(40.0 * 33).reshape(1, 1, 40, 33).expand(1, 3, 40, 33)
    patches, count = musiq._patches(picture)
    assert count == (2, 2)
    assert patches.shape == (1, 4, 3, 32, 32)
    # 24 zeros down are 12 above, 31 across are 15 before.
    assert patches[0, 0, 0, 11].abs().sum() == 0
    assert patches[0, 0, 0, 12, 14:17].tolist() == [0, 0, 1]
    assert patches[0, 1, 0, 12, :17].tolist() == [*range(17, 33), 0]
    convolution = musiq._Convolution(1, 1, 3, 2, bias=False)
    with torch.no_grad():
        found = convolution(torch.ones(1, 1, 6, 6))
        weight = convolution.weight[0, 0]
        weight = (weight - weight.mean()) / (weight.std() + 1e-5)
    # Of TensorFlow's one zero over the size, none stands before and one after.
    assert found.shape == (1, 1, 3, 3)
    torch.testing.assert_close(found[0, 0, 0, 0], weight.sum(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0, 0, 2, 2], weight[:2, :2].sum(), atol=1e-5, rtol=1e-5)


def test_musiq_has_the_published_layout():
    with torch.device("meta"):
        state = musiq.Musiq().state_dict()
    assert sum(value.numel() for value in state.values()) * 4 == pytest.approx(109e6, rel=0.01), "the file's size"
    shapes = {
        "conv_root.weight": (64, 3, 7, 7),
        "block1.gn_proj.bias": (256,),
        "embedding.weight": (384, 16384),
        "transformer_encoder.cls": (1, 1, 384),
        "transformer_encoder.posembed_input.position_emb": (1, 100, 384),
        "transformer_encoder.scaleembed_input.scale_emb": (3, 384),
        "transformer_encoder.transformer.encoderblock_13.attention.out.weight": (384, 384),
        "transformer_encoder.transformer.encoderblock_0.mlp.fc1.weight": (1152, 384),
        "head.weight": (1, 384),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_imaging_quality_takes_the_published_file(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(weights.WeightFile, "digits", property(lambda self: None))
    whole = musiq.Musiq
    monkeypatch.setattr(musiq, "Musiq", lambda: whole(layers=1))
    network = filled(musiq.Musiq())
    network.head.bias.data.fill_(60)
    path = tmp_path / weights.MUSIQ.path
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    found = measure(clips, ["imaging_quality"], print, sources=Sources(tmp_path))["vbench_like"]["imaging_quality"]
    frames = torch.tensor(np.load(next(clips.iterdir()))).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        assert found["score"] == pytest.approx(float(network(frames).mean()) / 100, abs=1e-5)


def test_clip_dimensions_take_their_files(clips, tmp_path, monkeypatch):
    """Through open_clip, with a small model in place of both CLIPs, its tensors in safetensors files."""
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    def small(name, pretrained=None):
        assert name.endswith("-quickgelu")
        vision = CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=112, image_size=224)
        return CLIP(768, vision, CLIPTextCfg(width=64, heads=1, layers=1), quick_gelu=True)

    monkeypatch.setattr(open_clip, "create_model", small)
    torch.manual_seed(0)
    network, head = small("x-quickgelu").eval(), torch.nn.Linear(768, 1)
    for file in (weights.CLIP_B, weights.CLIP_L, weights.AESTHETIC):
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
    for file in (weights.CLIP_B, weights.CLIP_L):
        save_file(network.state_dict(), tmp_path / file.path)
    torch.save(head.state_dict(), tmp_path / weights.AESTHETIC.path)
    info = tmp_path / "VBench_full_info.json"
    style = {"appearance_style": {"appearance_style": "cubist"}}
    info.write_text(json.dumps([{"prompt_en": "a square", "dimension": list(KEYS), "auxiliary_info": style}]))
    found = measure(clips, KEYS, print, sources=Sources(tmp_path), info=info)["vbench_like"]
    frames = np.load(next(clips.iterdir()))
    with torch.no_grad():
        seen = torch.cat([network.encode_image(backbones._clip_picture(frame)) for frame in frames])
        seen = torch.nn.functional.normalize(seen, dim=-1)
        beauty = float(head(seen).mean()) / 10
    after = [float((seen[i] @ seen[i - 1]).clamp(0) + (seen[i] @ seen[0]).clamp(0)) / 2 for i in range(1, 5)]
    assert found["background_consistency"]["score"] == pytest.approx(np.mean(after), abs=1e-5)
    assert found["aesthetic_quality"]["score"] == pytest.approx(beauty, abs=1e-5)
    assert -1 <= found["appearance_style"]["score"] <= 1


KEYS = ("background_consistency", "aesthetic_quality", "appearance_style")


def test_text_consistency_by_hand():
    frames = [np.zeros((8, 8, 3), np.uint8)] * 2
    cosine = dimensions.text_consistency(frames, lambda clip: torch.tensor([3.0, 4.0]), torch.tensor([0.0, -2.0]))
    assert cosine == pytest.approx(-0.8)
    seen = []
    encode = lambda clips: seen.append(clips.shape) or clips.mean((1, 3, 4))  # noqa: E731
    vector = backbones.video_features(encode)([np.full((100, 300, 3), 128, np.uint8)] * 8)
    assert seen == [(1, 8, 3, 224, 224)]
    expected = (128 / 255 - torch.tensor(backbones._CLIP[0])) / torch.tensor(backbones._CLIP[1])
    torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    video = np.full((5, 40, 50, 3), 40, np.uint8)
    for frame in range(5):
        video[frame, 8:24, 3 * frame : 3 * frame + 16] = 190
    np.save(folder / "a square-0.npy", video)
    return folder


def test_motion_smoothness_takes_the_published_file(clips, tmp_path):
    """A dictionary with the tensors in state_dict, read without running it; or its conversion."""
    folder = tmp_path / "w"
    path = folder / weights.AMT.path
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": still_network().state_dict(), "epoch": 300}, path)
    found = measure(clips, ["motion_smoothness"], print, sources=Sources(folder))["vbench_like"]["motion_smoothness"]
    # The mean of both sides is off by half of 150 levels in four bars of 3 columns, 16 rows.
    assert found["score"] == pytest.approx(1 - 4 * 3 * 16 * 75 / (40 * 50) / 255, abs=1e-6)
    save_file(still_network().state_dict(), path.with_suffix(".safetensors"))
    path.unlink()
    again = measure(clips, ["motion_smoothness"], print, sources=Sources(folder))["vbench_like"]["motion_smoothness"]
    assert again["score"] == found["score"]
    save_file({"a": torch.zeros(1)}, path.with_suffix(".safetensors"))
    with pytest.raises(ValueError, match="does not hold the weights of AMT-S"):
        measure(clips, ["motion_smoothness"], print, sources=Sources(folder))


def test_viclip_dimensions_take_prompts(clips, tmp_path, monkeypatch, capsys):
    whole = viclip.ViClip
    monkeypatch.setattr(viclip, "ViClip", lambda: whole(**TINY))
    path = tmp_path / "w" / weights.VICLIP.path
    path.parent.mkdir(parents=True)
    torch.save({"model": as_viclip(tiny_clip())}, path)
    base = ["eval", "vbench", "measure", str(clips), "--weights", str(tmp_path / "w"), "--json", "-"]
    both = ["--dimension", "temporal style", "--dimension", "overall_consistency"]
    assert run([*base, *both]) == 4
    assert "temporal_style compares with prompts: no prompt is known for" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "prompts.txt").write_text("a square moves\n")
    assert run([*base, *both, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    custom = json.loads(capsys.readouterr().out)["vbench_like"]
    score = custom["temporal_style"]["score"]
    assert -1 <= score <= 1
    assert custom["overall_consistency"]["score"] == score
    # The official suite takes the prompt from its list.
    info = tmp_path / "VBench_full_info.json"
    info.write_text(json.dumps([{"prompt_en": "a square", "dimension": ["temporal_style"]}]))
    assert run([*base, *both[:2], "--info", str(info)]) == 0
    official = json.loads(capsys.readouterr().out)["vbench_like"]["temporal_style"]["score"]
    assert official != score
    assert run([*base, "--info", str(info), "--prompts", str(tmp_path / "prompts.txt")]) == 2
