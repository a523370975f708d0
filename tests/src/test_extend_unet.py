"""HiDiffusion, agent attention and local statistics on tiny U-Nets, against plain restatements of the papers."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel

import sparsereel
from sparsereel import AttentionPlan, TokenGrid
from sparsereel.extend.agent import AgentAttention
from sparsereel.extend.hidiffusion import HiDiffusion, Levels, Shrinking, draw_quarters
from sparsereel.extend.recipes import METHODS, Recipe
from sparsereel.extend.regions import Regions, attend_in_groups
from sparsereel.extend.statistics import LocalStatistics, box_mean, local_group_norm
from sparsereel.patterns import Neighborhood
from sparsereel.step import StepInfo

pytestmark = pytest.mark.usefixtures("one_thread")

SD = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 12,
    "attention_head_dim": 1,
    "norm_num_groups": 4,
}
SDXL = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
    "cross_attention_dim": 12,
    "attention_head_dim": 1,
    "norm_num_groups": 4,
}
BUILDS = {"sd": SD, "sdxl": SDXL}


@pytest.fixture
def make(tiny):
    """A pipeline around a tiny U-Net that was "trained" on latents of 8 x 8, and arguments for a call."""

    def build(kind="sd", scheduler=None):
        pipe, call = tiny.sd_pipe(scheduler or EulerDiscreteScheduler())
        torch.manual_seed(3)
        pipe.register_modules(unet=UNet2DConditionModel(**BUILDS[kind]).eval())
        return pipe, call

    return build


def inputs(kind, height=16, width=16, batch=1):
    g = torch.Generator().manual_seed(height * 100 + width)
    found = {
        "sample": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=g),
    }
    if kind == "sdxl":
        found["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 8, generator=g),
            "time_ids": torch.randn(batch, 6, generator=g),
        }
    return found


def run_at(pipe, step, total, arguments):
    """One forward of the U-Net at a step of a run, as a denoising loop drives it."""
    pipe.scheduler.set_timesteps(total)
    pipe.scheduler._step_index = step
    with torch.no_grad():
        return pipe.unet(**arguments).sample


# ------------------------------------------------------------------ a plain restatement of the paper


class Restated:
    """The U-Net's forward, module by module, as the paper changes it."""

    def __init__(self, unet, kind, dilated, pooled, quarters):
        self.unet, self.kind = copy.deepcopy(unet), kind
        self.dilated, self.pooled, self.quarters = dilated, pooled, quarters
        self.blocks = 1 if kind == "sd" else 2

    def __call__(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None):
        unet, large = self.unet, self.kind != "sd"
        self.text = encoder_hidden_states
        emb = unet.time_embedding(unet.time_proj(timestep.expand(sample.shape[0])).to(sample.dtype))
        if added_cond_kwargs is not None:
            ids = unet.add_time_proj(added_cond_kwargs["time_ids"].flatten()).reshape(sample.shape[0], -1)
            emb = emb + unet.add_embedding(torch.cat([added_cond_kwargs["text_embeds"], ids], dim=-1))
        self.emb = emb
        x = unet.conv_in(sample)
        skips = [x]
        for i, block in enumerate(unet.down_blocks):
            for j, resnet in enumerate(block.resnets):
                x = resnet(x, emb)
                if hasattr(block, "attentions"):
                    windowed = i == (1 if large else 0)
                    x = self.transformer(block.attentions[j], x, windowed, f"down_blocks.{i}.{j}")
                if self.pooled and i == 1 and j == 0:
                    full = x.shape[2:]
                    x = F.avg_pool2d(x, 2)
                skips.append(x)
            if block.downsamplers:
                conv = block.downsamplers[0].conv
                if self.dilated and i == (1 if large else 0):
                    x = F.conv2d(x, conv.weight, conv.bias, stride=4, padding=2, dilation=2)
                else:
                    x = conv(x)
                skips.append(x)
        x = unet.mid_block(x, emb, encoder_hidden_states=self.text)
        last = len(unet.up_blocks) - 1
        for i, block in enumerate(unet.up_blocks):
            for j, resnet in enumerate(block.resnets):
                x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
                if hasattr(block, "attentions"):
                    windowed = i == (1 if large else last)
                    x = self.transformer(block.attentions[j], x, windowed, f"up_blocks.{i}.{j}")
                if self.pooled and i == last - 1 and j == 1:
                    x = F.interpolate(x, size=full, mode="bicubic")
            if block.upsamplers:
                # As large as what it meets next.
                size = skips[-1].shape[2:]
                x = block.upsamplers[0].conv(F.interpolate(x, size=size, mode="nearest"))
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))

    def transformer(self, module, x, windowed, at):
        height, width = x.shape[2:]
        residual = x
        x = module.norm(x)
        if module.use_linear_projection:
            x = module.proj_in(x.flatten(2).transpose(1, 2))
        else:
            x = module.proj_in(x).flatten(2).transpose(1, 2)
        for b, block in enumerate(module.transformer_blocks):
            quiet = block.norm1(x)
            if windowed and b < self.blocks:
                quiet = self.in_windows(block.attn1, quiet, height, width, self.quarters[f"{at}.{b}"])
            else:
                quiet = block.attn1(quiet)
            x = x + quiet
            x = x + block.attn2(block.norm2(x), encoder_hidden_states=self.text)
            x = x + block.ff(block.norm3(x))
        if module.use_linear_projection:
            x = module.proj_out(x).transpose(1, 2).unflatten(2, (height, width))
        else:
            x = module.proj_out(x.transpose(1, 2).unflatten(2, (height, width)))
        return x + residual

    def in_windows(self, attention, x, height, width, quarters):
        rows, columns = math.ceil(height / 2), math.ceil(width / 2)
        shift = (rows // 4 * quarters, columns // 4 * quarters)
        x = x.unflatten(1, (height, width)).roll((-shift[0], -shift[1]), (1, 2))
        out = torch.empty_like(x)
        for top in (0, rows):
            for left in (0, columns):
                part = x[:, top : top + rows, left : left + columns]
                out[:, top : top + rows, left : left + columns] = attention(part.flatten(1, 2)).view(part.shape)
        return out.roll(shift, (1, 2)).flatten(1, 2)


def quarters_of(pipe, step):
    """What each windowed layer draws, by the restatement's names."""
    layers = sparsereel.families.find(pipe.unet).self_attention(pipe.unet)
    found = {}
    for index, (name, _) in enumerate(layers):
        part = name.split(".")
        if part[0] != "mid_block":
            found[f"{part[0]}.{part[1]}.{part[3]}.{part[5]}"] = draw_quarters(0, step, index)
    return found


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (32, 32)], ids=str)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_step_equals_the_restatement(make, kind, size):
    pipe, _ = make(kind)
    arguments = inputs(kind, *size)
    shrink = HiDiffusion().shrinking(kind, min(size) / 8, controlled=False, gentle=False)
    plain = pipe.unet(**arguments).sample
    restated = {}
    for step in (0, 1, 3, 9):
        dilated, pooled = shrink.at(StepInfo(step, 10))
        restated[step] = Restated(pipe.unet, kind, dilated, pooled, quarters_of(pipe, step))(**arguments)
    sparsereel.extend(pipe, height=size[0] * 2, width=size[1] * 2)
    for step, expected in restated.items():
        out = run_at(pipe, step, 10, arguments)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert (out - plain).abs().max() > 1e-3
    sparsereel.restore(pipe)
    assert torch.equal(pipe.unet(**arguments).sample, plain)


def test_the_restatement_without_changes_is_the_unet(make):
    for kind in BUILDS:
        pipe, _ = make(kind)
        arguments = inputs(kind)
        whole = Restated(pipe.unet, kind, False, False, {})
        whole.blocks = 0
        torch.testing.assert_close(whole(**arguments), pipe.unet(**arguments).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "ratio", "options", "expected"),
    [
        ("sd", 2, {}, Shrinking((0.0, 0.4), (0.0, 0.0))),
        ("sd", 4, {}, Shrinking((0.0, 0.7), (0.0, 0.3))),
        ("sdxl", 2, {}, Shrinking((0.0, 0.16), (0.16, 0.4))),
        ("sdxl", 2, {"gentle": True}, Shrinking((0.0, 0.0), (0.0, 0.4))),
        ("sdxl", 2, {"controlled": True}, Shrinking((0.0, 0.16), (0.16, 0.5))),
        ("sdxl", 4, {}, Shrinking((0.0, 0.3), (0.0, 0.7))),
        ("sdxl_turbo", 2, {}, Shrinking((0.0, 0.0), (0.0, 0.5))),
    ],
)
def test_the_authors_tables(kind, ratio, options, expected):
    given = {"controlled": False, "gentle": False, **options}
    assert HiDiffusion().shrinking(kind, ratio, **given) == expected


def test_modules_of_the_published_models():
    from diffusers import UNet2DConditionModel as UNet

    with torch.device("meta"):
        small = UNet(cross_attention_dim=768, attention_head_dim=8)
        large = UNet(
            block_out_channels=(320, 640, 1280),
            down_block_types=SDXL["down_block_types"],
            up_block_types=SDXL["up_block_types"],
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
        )
    assert Levels.of(small, "sd") == Levels(0, 2, 1, 2, 0, 3, 1)
    assert Levels.of(large, "sdxl") == Levels(1, 0, 1, 1, 1, 1, 2)
    for unet, kind, count in ((small, "sd", 5), (large, "sdxl", 10)):
        levels = Levels.of(unet, kind)
        layers = sparsereel.families.find(unet).self_attention(unet)
        assert sum(levels.in_windows(name) for name, _ in layers) == count


def test_turbo_is_told_by_its_name(make):
    pipe, _ = make("sdxl")
    method = HiDiffusion()
    assert method.kind_of(pipe.unet, "stabilityai/sdxl-turbo") == "sdxl_turbo"
    assert method.kind_of(pipe.unet, "stabilityai/stable-diffusion-xl-base-1.0") == "sdxl"
    with pytest.raises(ValueError, match="not built as those of sdxl"):
        Levels.of(SimpleNamespace(down_blocks=[1], up_blocks=[1]), "sdxl")


# ------------------------------------------------------------------ in pipelines


@pytest.mark.parametrize("method", METHODS["stable_diffusion"])
def test_native_calls_and_restore_are_bit_identical(make, method):
    # This scheduler keeps no index: steps are counted.
    pipe, call = make(scheduler=DDIMScheduler(steps_offset=1, clip_sample=False))

    def run(**size):
        g = torch.Generator().manual_seed(1)
        return pipe(**{**call, **size}, num_inference_steps=5, generator=g).images

    native, large = run(height=16, width=16), run(height=32, width=32)
    sparsereel.extend(pipe, height=1.0, width=1.0, method=method)
    assert torch.equal(run(height=16, width=16), native)
    report = sparsereel.extend(pipe, height=2.0, width=2.0, method=method)
    assert report.arguments == {"height": 32, "width": 32}
    assert torch.equal(run(height=16, width=16), native)
    extended = run(**report.arguments)
    assert torch.equal(extended, large) == (method == "plain")
    assert torch.equal(run(**report.arguments), extended)
    sparsereel.restore(pipe)
    assert torch.equal(run(height=32, width=32), large)
    assert torch.equal(run(height=16, width=16), native)


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (40, 56)], ids=str)
def test_odd_and_oblong_sizes_keep_their_shape(make, size):
    pipe, call = make()
    sparsereel.extend(pipe, height=size[0], width=size[1])
    out = pipe(**{**call, "height": size[0], "width": size[1]}, num_inference_steps=3).images
    assert out.shape[-2:] == (size[0] // 2, size[1] // 2)
    assert out.isfinite().all()


def test_shifts_follow_the_generator_and_guidance_in_two_calls_is_one_batch(make):
    pipe, call = make()
    sparsereel.extend(pipe, height=32, width=32, method="hidiffusion")

    def run(seed, **more):
        state = torch.random.get_rng_state()
        g = torch.Generator().manual_seed(seed)
        latents = torch.ones(1, 4, 16, 16)
        out = pipe(**{**call, "height": 32, "width": 32, **more}, latents=latents, num_inference_steps=4, generator=g)
        assert torch.equal(torch.random.get_rng_state(), state)
        return out.images

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    together = inputs("sd", batch=2)
    apart = [run_at(pipe, 2, 10, {k: v[i : i + 1] if v.ndim else v for k, v in together.items()}) for i in (0, 1)]
    torch.testing.assert_close(run_at(pipe, 2, 10, together), torch.cat(apart), rtol=1e-5, atol=1e-6)


def test_shifts_are_drawn_evenly():
    seen = Counter(draw_quarters(7, step, layer) for step in range(50) for layer in range(40))
    assert set(seen) == {0, 1, 2, 3}
    assert all(abs(count - 500) < 100 for count in seen.values())


def test_two_unets_do_not_influence_each_other(make):
    pipe, _ = make()
    other = copy.deepcopy(pipe)
    arguments = inputs("sd")
    plain = run_at(other, 0, 10, arguments)
    sparsereel.extend(pipe, height=32, width=32)
    extended = run_at(pipe, 0, 10, arguments)
    assert torch.equal(run_at(other, 0, 10, arguments), plain)
    sparsereel.extend(other, height=32, width=32, method="tlc")
    assert torch.equal(run_at(pipe, 0, 10, arguments), extended)
    twin = copy.deepcopy(pipe)
    sparsereel.restore(pipe)
    assert torch.equal(run_at(pipe, 0, 10, arguments), plain)
    assert torch.equal(run_at(twin, 0, 10, arguments), extended)


def test_it_composes_with_a_plan(make):
    pipe, _ = make()
    arguments = inputs("sd")
    plan = AttentionPlan.uniform(Neighborhood(window=(1, 5, 5)))
    sparsereel.extend(pipe, height=32, width=32, plan=plan)
    both = run_at(pipe, 0, 10, arguments)
    density = sparsereel.report(pipe).density
    sparsereel.extend(pipe, height=32, width=32, method=Recipe(unet=HiDiffusion(windows=False)))
    assert not torch.equal(run_at(pipe, 0, 10, arguments), both)
    assert sparsereel.report(pipe).density >= density
    assert both.isfinite().all()


def test_an_unknown_step_shrinks_nothing_and_says_so(make, caplog):
    pipe, _ = make()
    arguments = inputs("sd")
    plain = pipe.unet(**arguments).sample
    sparsereel.extend(pipe, height=32, width=32, method=Recipe(unet=HiDiffusion(windows=False)))
    pipe.scheduler.num_inference_steps = None
    with caplog.at_level(logging.WARNING, logger="sparsereel"):
        assert torch.equal(pipe.unet(**arguments).sample, plain)
    assert "the denoising step is unknown" in caplog.text


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_controlnet_features_are_fitted_and_end_after_their_share(make, kind):
    pipe, _ = make(kind)
    torch.manual_seed(4)
    control = ControlNetModel.from_unet(pipe.unet).eval()
    for module in control.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.1)
    arguments = inputs(kind)
    with torch.no_grad():
        down, mid = control(**arguments, controlnet_cond=torch.rand(1, 3, 128, 128), return_dict=False)
    steered = {**arguments, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    sparsereel.extend(pipe, height=32, width=32)
    for step in (0, 2):
        out = run_at(pipe, step, 10, steered)
        assert out.shape == arguments["sample"].shape
        assert not torch.equal(out, run_at(pipe, step, 10, arguments))
    assert torch.equal(run_at(pipe, 8, 10, steered), run_at(pipe, 8, 10, arguments))


def test_inpainting_and_image_to_image_pipelines(tiny, make):
    pipe, call = tiny.sd_pipe(EulerDiscreteScheduler(), image_to_image=True)
    pipe.register_modules(unet=make()[0].unet)
    call["image"] = torch.randn(1, 4, 16, 16)
    sparsereel.extend(pipe, height=32, width=32)
    # Half of the ten steps are run: of those five the first two are dilated.
    seen = []
    hook = pipe.unet.mid_block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    out = pipe(**call, num_inference_steps=10).images
    hook.remove()
    assert out.isfinite().all()
    assert seen == [1, 1, 2, 2, 2]


# ------------------------------------------------------------------ parts


@pytest.mark.parametrize("grid", [TokenGrid(1, 8, 8), TokenGrid(2, 7, 9), TokenGrid(1, 5, 3)], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [Regions(2, 2), Regions(2, 2, (1, 3)), Regions(3, 2), Regions(2, 3, strided=True), Regions(9, 9)],
    ids=str,
)
def test_groups_equal_the_mask(grid, pattern):
    q, k, v = (torch.randn(2, 3, grid.seq_len, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    groups = pattern.groups(grid, torch.device("cpu"))
    assert torch.cat([g.flatten() for g in groups]).sort().values.tolist() == list(range(grid.seq_len))
    mask = pattern.token_mask(grid)
    out = attend_in_groups(q, k, v, groups, 0.3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask, scale=0.3), rtol=1e-4, atol=1e-5)
    assert torch.equal(pattern.block_mask(grid).to_dense()[0, 0], mask)


def test_agent_attention_is_the_papers_formula():
    grid = TokenGrid(1, 6, 5)
    q, k, v = (
        torch.randn(1, 2, 30, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(3)
    )
    rule = AgentAttention(cell=2)
    cells = [
        [y * 5 + x for y in range(top, min(top + 2, 6)) for x in range(left, min(left + 2, 5))]
        for top in range(0, 6, 2)
        for left in range(0, 5, 2)
    ]
    agents = torch.stack([q[:, :, members].mean(2) for members in cells], dim=2)
    scale = 4**-0.5
    answers = (agents @ k.transpose(-1, -2) * scale).softmax(-1) @ v
    expected = (q @ agents.transpose(-1, -2) * scale**0.3).softmax(-1) @ answers + 0.075 * v
    torch.testing.assert_close(rule.attend(q, k, v, scale=scale, grid=grid, inner=None), expected)


def test_agents_work_in_early_steps_at_the_highest_level_only(make):
    pipe, _ = make()
    arguments = inputs("sd")
    plain = run_at(pipe, 0, 10, arguments)
    sparsereel.extend(pipe, height=32, width=32, method="agent")
    assert not torch.equal(run_at(pipe, 0, 10, arguments), plain)
    assert torch.equal(run_at(pipe, 4, 10, arguments), plain)


def test_local_statistics_are_those_of_each_window():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 7, 9, generator=g) * 3 + 100
    weight, bias = torch.randn(6, generator=g), torch.randn(6, generator=g)
    out = local_group_norm(x, 3, (3, 4), weight, bias, 1e-5)
    for row in range(7):
        for column in range(9):
            top, left = min(max(row - 1, 0), 4), min(max(column - 1, 0), 5)
            part = x[:, :, top : top + 3, left : left + 4]
            normed = F.group_norm(part, 3, weight, bias)
            torch.testing.assert_close(
                out[..., row, column], normed[..., row - top, column - left], rtol=1e-3, atol=1e-3
            )
    whole = local_group_norm(x, 3, (7, 9), weight, bias, 1e-5)
    torch.testing.assert_close(whole, F.group_norm(x, 3, weight, bias), rtol=1e-3, atol=1e-3)
    pooled = F.avg_pool2d(x, (3, 4), stride=1)
    torch.testing.assert_close(box_mean(x.double(), (3, 4))[..., 1:6, 1:7].float(), pooled, rtol=1e-4, atol=1e-4)
    assert torch.equal(box_mean(torch.ones(1, 1, 5, 5), (3, 3)), torch.ones(1, 1, 5, 5))


def test_local_statistics_in_the_decoder(make):
    pipe, _ = make()
    small, large = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 24, 24)
    before = pipe.vae.decode(small).sample, pipe.vae.decode(large).sample
    sparsereel.extend(pipe, height=48, width=48, method=Recipe(statistics=LocalStatistics()))
    assert torch.equal(pipe.vae.decode(small).sample, before[0])
    assert not torch.equal(pipe.vae.decode(large).sample, before[1])
    sparsereel.restore(pipe.unet)
    assert torch.equal(pipe.vae.decode(large).sample, before[1])
    sparsereel.restore(pipe)
    assert not any("forward" in vars(module) for module in pipe.vae.modules())


def test_what_cannot_work_is_refused(make):
    pipe, _ = make()
    with pytest.raises(ValueError, match="makes pictures, which have no frames"):
        sparsereel.extend(pipe, frames=2.0)
    with pytest.raises(ValueError, match="'ultravico' is for wan and hunyuan_video, not for stable_diffusion"):
        sparsereel.extend(pipe, height=2.0, method="ultravico")
    with pytest.raises(
        ValueError,
        match="unknown method 'warp'; allowed: auto, plain, multidiffusion, demofusion, upscale, cupscale",
    ):
        sparsereel.extend(pipe, height=2.0, method="warp")
    with pytest.raises(ValueError, match="share of the steps from 0 to 1, got 2"):
        HiDiffusion(t1=2.0)
    assert not hasattr(pipe, "_sparsereel_extension")
