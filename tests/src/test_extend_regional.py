"""C-Upscale's regional priors on tiny Wan and Stable Diffusion pipelines that read: cross-attention of each window
against a plain restatement, masked and composed by hand."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

import sparsereel
from sparsereel import AttentionPlan
from sparsereel.extend.cross_attention import Composer, Work, masked, query_and_key
from sparsereel.extend.guide import Guide
from sparsereel.extend.prompts import special_tokens
from sparsereel.extend.recipes import Recipe
from sparsereel.extend.regional import RegionalPrior, overlap
from sparsereel.extend.screening import PromptMap, mass_in_windows, mean_over_heads, screened, share_of_largest
from sparsereel.extend.views import Views
from sparsereel.patterns import Neighborhood

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("a", "red", "fox", "and", "one", "dog", "on", "snow")
TOKENS = 8
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
FOX = RegionalPrior(prompts=(("a red fox", LEFT),), threshold=0)


def recipe(prior, **views):
    return Recipe(views=Views(**{"time": False, **views}), guide=Guide(mode="lowpass"), regional=prior)


# ------------------------------------------------------------------ tiny pipelines that read


def tokenizer(start):
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<s>", "<unk>", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=TOKENS, **names)


class Short(WanPipeline):
    """A pipeline that was "trained" on 5 frames of 128 x 128 (2 x 8 x 8 tokens) and prompts of 8 tokens."""

    def __call__(self, height=128, width=128, num_frames=5, max_sequence_length=TOKENS, **kwargs):
        more = {"height": height, "width": width, "num_frames": num_frames, "max_sequence_length": max_sequence_length}
        return super().__call__(**more, **kwargs)


def wan(tiny):
    torch.manual_seed(5)
    sizes = {"d_model": 12, "d_ff": 16, "d_kv": 4, "num_heads": 2, "num_layers": 1, "vocab_size": 16}
    words = {"tokenizer": tokenizer(start=False), "text_encoder": UMT5EncoderModel(UMT5Config(**sizes)).eval()}
    pipe, _ = tiny.wan_pipe(FlowMatchEulerDiscreteScheduler(), **words)
    pipe.__class__ = Short
    return pipe


CLIP = {"vocab_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2} | {
    "max_position_embeddings": TOKENS,
    "eos_token_id": 1,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
XL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}


def vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **blocks)


def sd(tiny):
    torch.manual_seed(6)
    pipe = StableDiffusionPipeline(
        scheduler=EulerDiscreteScheduler(),
        unet=UNet2DConditionModel(**UNET).eval(),
        vae=vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=12, **CLIP)).eval(),
        tokenizer=tokenizer(start=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return tiny.quiet(pipe)


def sdxl(tiny):
    torch.manual_seed(7)
    pipe = StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(),
        unet=UNet2DConditionModel(**{**UNET, **XL}).eval(),
        vae=vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=4, **CLIP)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, projection_dim=8, **CLIP)).eval(),
        tokenizer=tokenizer(start=True),
        tokenizer_2=tokenizer(start=True),
        add_watermarker=False,
    )
    return tiny.quiet(pipe)


MAKERS = {"wan": wan, "sd": sd, "sdxl": sdxl}
LARGE = {"wan": {"height": 256, "width": 192}, "sd": {"height": 32, "width": 24}, "sdxl": {"height": 32, "width": 24}}
SMALL = {"wan": {}, "sd": {"height": 16, "width": 16}, "sdxl": {"height": 16, "width": 16}}
PER_PROMPT = {"wan": "num_videos_per_prompt", "sd": "num_images_per_prompt", "sdxl": "num_images_per_prompt"}


@pytest.fixture
def build(tiny):
    """A pipeline of a kind, and a function that calls it for latents."""

    def make(kind):
        pipe = MAKERS[kind](tiny)

        def run(prompt="one dog on snow", steps=2, seed=1, **more):
            g = torch.Generator().manual_seed(seed)
            call = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "latent", **more}
            return pipe(prompt=prompt, generator=g, return_dict=False, **call)[0]

        return pipe, run

    return make


def model_of(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def layers_of(pipe):
    return [module for name, module in model_of(pipe).named_modules() if name.endswith(".attn2")]


def extend(pipe, kind, method):
    return sparsereel.extend(pipe, method=method, **LARGE[kind])


# ------------------------------------------------------------------ the plain restatement


def attend(module, hidden, context, without=None):
    """Cross-attention of (B, S, C) with (B, T, C), written out; `without` bool (B, T)."""
    q, k, v = module.to_q(hidden), module.to_k(context), module.to_v(context)
    if module.norm_q is not None:
        q, k = module.norm_q(q), module.norm_k(k)
    q, k, v = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if without is not None:
        logits = logits.masked_fill(without[:, None, None], float("-inf"))
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return module.to_out[0](out), logits.softmax(-1)


class Spy:
    """What every cross-attention was given and answered."""

    def __init__(self, pipe):
        self.pipe, self.model = pipe, model_of(pipe)
        self.calls = []
        self.embeds = None
        self.hooks = [self.model.register_forward_pre_hook(self.called, with_kwargs=True)]
        self.hooks += [layer.register_forward_hook(self.seen, with_kwargs=True) for layer in layers_of(pipe)]

    def called(self, module, args, kwargs):
        self.embeds = kwargs["encoder_hidden_states"]

    def seen(self, module, args, kwargs, output):
        names = ("hidden_states", "encoder_hidden_states")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        extension = self.model._sparsereel_injection.runtime.extension
        hidden, context = (given[name].detach().clone() for name in names)
        found = {"module": module, "hidden": hidden, "context": context, "out": output.detach().clone()}
        self.calls.append(SimpleNamespace(**found, place=extension.place, embeds=self.embeds))

    def close(self):
        for hook in self.hooks:
            hook.remove()


def conditional_rows(call, prompt):
    """Rows of the prompt; the rest is guidance's other branch."""
    size = len(prompt)
    return [s for s in range(0, len(call.embeds), size) if torch.equal(call.embeds[s : s + size], prompt)]


def restated_chart(spy, prompt, whole):
    """The mean map of the small result, (samples, rows, columns, tokens), from what the layers were given."""
    total, count = 0, 0
    for call in (c for c in spy.calls if c.place is None):
        for start in conditional_rows(call, prompt):
            rows = slice(start, start + len(prompt))
            _, chart = attend(call.module, call.hidden[rows], call.context[rows])
            chart = chart.mean(1)
            frames = 2 if whole[2] == "wan" else 1
            side = round((chart.shape[1] // frames) ** 0.5)
            if side < whole[0] / 4:
                continue
            grid = chart.unflatten(1, (frames, side, side)).mean(1).movedim(-1, 1)
            total = total + F.interpolate(grid, size=whole[:2], mode="bilinear").movedim(1, -1)
            count += 1
    return total / count


def restated_mass(chart, windows):
    """Means over windows, from the map with every cell cut in 24 by 24."""
    fine = chart.repeat_interleave(24, 1).repeat_interleave(24, 2)
    found = []
    for _, (top, bottom), (left, right) in windows:
        rows, columns = (
            (round(x * fine.shape[1]) for x in (top, bottom)),
            (round(x * fine.shape[2]) for x in (left, right)),
        )
        found.append(fine[:, slice(*rows), slice(*columns)].mean((1, 2)))
    return torch.stack(found)


@torch.no_grad()
def check_windows(spy, prompt, kept, prior, regions, kind):
    """Every cross-attention of every window is the restated one; returns how many keys were left out and kept."""
    side = 8
    chart = restated_chart(spy, prompt, (side, side, kind)) if prior.threshold else None
    out, stayed = 0, 0
    for call in (c for c in spy.calls if c.place is not None):
        without = torch.zeros(kept.shape, dtype=torch.bool)
        if chart is not None:
            mass = restated_mass(chart, call.place.windows)
            share = mass / mass.amax(0)
            assert ((share - prior.threshold).abs() > 1e-5).all(), "choose a threshold off the shares"
            without = (share[call.place.number] < prior.threshold) & ~kept
        _, rows, columns = call.place.windows[call.place.number]
        met = []
        for (_, (top, left, bottom, right)), context in zip(prior.prompts, regions, strict=True):
            height = max(0, min(bottom, rows[1]) - max(top, rows[0]))
            width = max(0, min(right, columns[1]) - max(left, columns[0]))
            window = (rows[1] - rows[0]) * (columns[1] - columns[0])
            if height * width / min(window, (bottom - top) * (right - left)) >= prior.overlap:
                met.append(context)
        starts = conditional_rows(call, prompt)
        for start in range(0, len(call.embeds), len(prompt)):
            part = slice(start, start + len(prompt))
            hidden, context = call.hidden[part], call.context[part]
            expected, _ = attend(call.module, hidden, context, without if start in starts else None)
            if met and start in starts:
                answers = [attend(call.module, hidden, c.expand(len(prompt), -1, -1))[0] for c in met]
                expected = (1 - prior.weight) * expected + prior.weight * torch.stack(answers).mean(0)
            torch.testing.assert_close(call.out[part], expected, rtol=1e-4, atol=2e-6)
        if starts:
            out, stayed = out + int(without.sum()), stayed + int((~without).sum())
    return out, stayed


@torch.no_grad()
def encoded(pipe, kind, text):
    """Embeddings of a text by the pipeline's own encoder, (1, tokens, width)."""
    if kind == "wan":
        return pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=TOKENS)[0]
    return pipe.encode_prompt(prompt=text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]


def words_of(text, kind):
    """bool (tokens,): what stays in every window of a prompt of known words."""
    first = 1 if kind != "wan" else 0
    kept = torch.ones(TOKENS, dtype=torch.bool)
    kept[first : first + len(text.split())] = False
    kept[0] = True
    return kept


PROMPTS = ("one dog on snow", "a red fox")


@pytest.mark.parametrize("kind", ["wan", "sd", "sdxl"])
def test_windows_are_screened_and_composed_as_restated(build, kind):
    """Two prompts, each for two results; two regional prompts."""
    pipe, run = build(kind)
    prior = RegionalPrior(
        prompts=(("a fox", LEFT), ("red snow", (0.5, 0.0, 1.0, 1.0))), threshold=0.9985, weight=0.3, overlap=0.6
    )
    extend(pipe, kind, recipe(prior))
    spy = Spy(pipe)
    assert run(list(PROMPTS), **LARGE[kind], **{PER_PROMPT[kind]: 2}).isfinite().all()
    spy.close()
    prompt = torch.cat([encoded(pipe, kind, text) for text in PROMPTS]).repeat_interleave(2, 0)
    kept = torch.stack([words_of(text, kind) for text in PROMPTS]).repeat_interleave(2, 0)
    regions = [encoded(pipe, kind, text) for text, _ in prior.prompts]
    if kind == "wan":
        regions = [pipe.transformer.condition_embedder.text_embedder(region) for region in regions]
    out, stayed = check_windows(spy, prompt, kept, prior, regions, kind)
    assert out > 0
    assert stayed > 0
    assert {len(c.embeds) for c in spy.calls} == {4 if kind == "wan" else 8}


@pytest.mark.parametrize("kind", ["wan", "sd"])
def test_prompts_without_a_guide(build, kind):
    pipe, run = build(kind)
    extend(pipe, kind, Recipe(views=Views(time=False), regional=FOX))
    spy = Spy(pipe)
    run(**LARGE[kind])
    spy.close()
    prompt, region = encoded(pipe, kind, "one dog on snow"), encoded(pipe, kind, "a red fox")
    if kind == "wan":
        region = pipe.transformer.condition_embedder.text_embedder(region)
    check_windows(spy, prompt, torch.ones(1, TOKENS, dtype=torch.bool), FOX, [region], kind)


def test_calls_of_the_other_branch_keep_their_bits(build):
    pipe, run = build("wan")
    prior = RegionalPrior(prompts=(("a red fox", (0, 0, 1, 1)),), threshold=0.999)
    extend(pipe, "wan", recipe(prior))
    spy = Spy(pipe)
    run(**LARGE["wan"])
    spy.close()
    prompt = encoded(pipe, "wan", "one dog on snow")
    windows = [c for c in spy.calls if c.place is not None]
    plain = [torch.equal(c.module.forward(c.hidden, c.context, None, None), c.out) for c in windows]
    assert plain == [not conditional_rows(c, prompt) for c in windows]
    assert plain.count(True) == plain.count(False) > 0


# ------------------------------------------------------------------ where nothing may change


@pytest.mark.parametrize("kind", ["wan", "sd"])
def test_nothing_screened_and_no_prompts_is_views_and_guide(build, kind):
    pipe, run = build(kind)
    extend(pipe, kind, recipe(None))
    expected = run(**LARGE[kind])
    for prior in (RegionalPrior(threshold=0), RegionalPrior(prompts=FOX.prompts, threshold=0, weight=0)):
        extend(pipe, kind, recipe(prior))
        assert torch.equal(run(**LARGE[kind]), expected)
    extend(pipe, kind, recipe(RegionalPrior(threshold=0.9985)))
    assert not torch.equal(run(**LARGE[kind]), expected)


def test_one_window_has_every_token(build):
    """All of a token's mass is in it, whatever the threshold."""
    pipe, run = build("wan")
    extend(pipe, "wan", recipe(None, time=True, space=False))
    expected = run(**LARGE["wan"])
    extend(pipe, "wan", recipe(RegionalPrior(threshold=1.0), time=True, space=False))
    assert torch.equal(run(**LARGE["wan"]), expected)


@pytest.mark.parametrize("kind", ["wan", "sd"])
def test_native_calls_and_restore_keep_their_bits(build, kind):
    pipe, run = build(kind)
    native, large = run(**SMALL[kind]), run(**LARGE[kind])
    cls = type(pipe)
    extend(pipe, kind, recipe(RegionalPrior(prompts=FOX.prompts)))
    assert torch.equal(run(**SMALL[kind]), native)
    extended = run(**LARGE[kind])
    assert not torch.equal(extended, large)
    assert torch.equal(run(**LARGE[kind]), extended)
    assert "encode_prompt" not in vars(pipe)
    sparsereel.restore(pipe)
    assert type(pipe) is cls
    assert torch.equal(run(**LARGE[kind]), large)
    assert torch.equal(run(**SMALL[kind]), native)
    modules = [model_of(pipe), *layers_of(pipe)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_a_run_that_fails_leaves_nothing_behind(build):
    pipe, run = build("sd")
    extend(pipe, "sd", recipe(RegionalPrior(prompts=FOX.prompts)))
    expected = run(**LARGE["sd"])

    def stop(*args):
        raise RuntimeError("stop")

    hook = layers_of(pipe)[1].register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        run(**LARGE["sd"])
    hook.remove()
    extension = pipe.unet._sparsereel_injection.runtime.extension
    assert extension.prompted is None
    assert extension.place is None
    assert "encode_prompt" not in vars(pipe)
    assert torch.equal(run(**LARGE["sd"]), expected)


def test_two_pipelines_and_copies_are_their_own(build):
    pipe, run = build("sd")
    other, run_other = build("sd")
    plain = run_other(**LARGE["sd"])
    extend(pipe, "sd", recipe(RegionalPrior(prompts=FOX.prompts)))
    extended = run(**LARGE["sd"])
    assert torch.equal(run_other(**LARGE["sd"]), plain)
    extend(other, "sd", recipe(RegionalPrior(prompts=(("one dog", RIGHT),), weight=0.9)))
    assert not torch.equal(run_other(**LARGE["sd"]), extended)
    assert torch.equal(run(**LARGE["sd"]), extended)
    twin = copy.deepcopy(pipe.unet)
    sparsereel.restore(pipe)
    assert not torch.equal(run(**LARGE["sd"]), extended)
    assert twin._sparsereel_injection.runtime.extension.recipe.regional.prompts == FOX.prompts


def test_with_a_plan_that_moves_tokens(build, monkeypatch):
    """Maps are kept in grid order."""
    pipe, run = build("wan")
    extend(pipe, "wan", recipe(RegionalPrior(threshold=0.9985)))
    sparsereel.sparsify(pipe, AttentionPlan.uniform(Neighborhood(window=(1, 5, 5))))
    runtime = pipe.transformer._sparsereel_injection.runtime
    monkeypatch.setattr(runtime, "_tile_for", lambda layout, device_type: (1, 4, 4))
    hidden, kept = [], []

    def seen(module, args, kwargs, out):
        if runtime.extension.place is None:
            hidden.append(
                runtime.layout and (args[0].clone(), args[1].clone(), runtime.call_order(args[0], inverse=True))
            )

    hook = layers_of(pipe)[0].register_forward_hook(seen, with_kwargs=True)
    monkeypatch.setattr(PromptMap, "add", lambda self, layer, sides: kept.append(layer))
    run(steps=1, **LARGE["wan"])
    hook.remove()
    x, text, order = hidden[0]
    assert order is not None
    assert not torch.equal(order, torch.arange(len(order)))
    _, chart = attend(layers_of(pipe)[0], x[:, order], text)
    torch.testing.assert_close(kept[0], chart.mean(1))


def test_two_transformers_of_one_pipeline(tiny):
    """The map of the small result is that of both."""
    torch.manual_seed(4)
    other = tiny.CASES["wan"].model()
    pipe, call = tiny.wan_pipe(FlowMatchEulerDiscreteScheduler(), transformer_2=other, boundary_ratio=0.5)
    pipe.__class__ = Short
    sparsereel.extend(pipe, height=256, method=recipe(RegionalPrior(threshold=0.9985)))
    seen = []
    for model in (pipe.transformer, other):
        extension = model._sparsereel_injection.runtime.extension
        model.register_forward_hook(
            lambda m, a, out, e=extension: seen.append(
                (m is other, id(e.prompted), e.prompted.chart.count, e.place is None)
            )
        )
    g = torch.Generator().manual_seed(1)
    assert pipe(**call | {"height": 256}, num_inference_steps=4, generator=g).frames.isfinite().all()
    assert len({state for _, state, _, _ in seen}) == 1
    # Three layers of the prompt's calls, four steps; nothing is added by windows.
    assert {count for _, _, count, small in seen if not small} == {12}
    assert {second for second, _, _, _ in seen} == {False, True}


def test_a_guide_in_stages_keeps_the_first_map(build):
    pipe, run = build("sd")
    method = Recipe(views=Views(time=False), guide=Guide(stages=2), regional=RegionalPrior(threshold=0.9985))
    sparsereel.extend(pipe, height=48, width=48, method=method)
    counts = []
    extension = pipe.unet._sparsereel_injection.runtime.extension
    hook = pipe.unet.register_forward_hook(lambda *a: counts.append((extension.prompted.chart.count, extension.place)))
    assert run(height=48, width=48, steps=1).isfinite().all()
    hook.remove()
    assert len({count for count, _ in counts}) == 1
    assert len({place.windows for _, place in counts if place is not None}) == 2


def test_a_compiled_model_gives_what_it_gives_without(build):
    pipe, run = build("wan")
    extend(pipe, "wan", recipe(RegionalPrior(prompts=FOX.prompts, threshold=0.9985)))
    eager = run(steps=1, **LARGE["wan"])
    torch._dynamo.reset()
    pipe.transformer.compile(backend="eager")
    assert torch.equal(run(steps=1, **LARGE["wan"]), eager)
    torch._dynamo.reset()


# ------------------------------------------------------------------ parts


def test_the_map_of_a_layer_is_the_mean_of_its_heads():
    q, k, bias = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 1, 5)
    plain = (q @ k.transpose(-1, -2) / 2 + bias[:, None]).softmax(-1).mean(1)
    torch.testing.assert_close(mean_over_heads(q, k, bias), plain)


def test_maps_of_all_levels_are_summed_in_place():
    chart = PromptMap(2, (1, 4, 4), 3, torch.device("cpu"))
    total = chart.total
    fine, coarse = torch.rand(2, 16, 3).bfloat16(), torch.rand(2, 4, 3)
    chart.add(fine, (1, 4, 4))
    chart.add(coarse, (1, 2, 2))
    assert chart.total is total
    assert total.dtype == torch.float32
    grown = F.interpolate(coarse.unflatten(1, (2, 2)).movedim(-1, 1), size=(4, 4), mode="bilinear").movedim(1, -1)
    expected = (fine.float().unflatten(1, (1, 4, 4)) + grown[:, None]) / 2
    torch.testing.assert_close(chart.mean(), expected)


def test_mass_of_windows_that_cut_cells():
    chart = torch.rand(2, 4, 6, 3)
    windows = (((0.0, 1.0), (0.0, 0.375), (0.25, 0.75)), ((0.0, 1.0), (0.3125, 1.0), (0.5, 1.0)))
    torch.testing.assert_close(mass_in_windows(chart[:, None], windows), restated_mass(chart, windows))
    frames = torch.rand(1, 4, 2, 2, 3)
    half = mass_in_windows(frames, (((0.5, 1.0), (0.0, 1.0), (0.0, 1.0)),))
    torch.testing.assert_close(half[0], frames[:, 2:].mean((1, 2, 3)))


def test_what_is_screened():
    mass = torch.tensor([[[0.5, 0.4, 0.1, 0.0]], [[0.5, 0.02, 1.0, 0.0]]])
    kept = torch.tensor([[True, False, False, False]])
    share = share_of_largest(mass)
    torch.testing.assert_close(share[:, 0], torch.tensor([[1.0, 1.0, 0.1, 0.0], [1.0, 0.05, 1.0, 0.0]]))
    out = screened(share, 0.15, kept)
    # A token without mass anywhere is in no window.
    assert out.tolist() == [[[False, False, True, True]], [[False, True, False, True]]]
    assert not screened(share, 0.0, kept).any()
    assert not screened(torch.tensor([[[0.1]], [[1.0]]]), 0.5, torch.zeros(1, 1, dtype=torch.bool)).any()


def test_a_screened_token_has_no_mass(build):
    for kind in ("wan", "sd"):
        pipe, _ = build(kind)
        module = layers_of(pipe)[0]
        width = module.to_q.in_features
        hidden, context = torch.randn(2, 9, width), torch.randn(2, TOKENS, module.to_k.in_features)
        work = Work([slice(1, 2)], 2, TOKENS, without=torch.arange(TOKENS)[None] == 3)
        bias = masked(module, hidden, None, work)
        assert bias.flatten(1)[1].tolist() == [0, 0, 0, float("-inf"), 0, 0, 0, 0]
        assert not bias[0].any()
        changed = context.clone()
        changed[:, 3] = 100.0
        with torch.no_grad():
            one, other = (module(hidden, encoder_hidden_states=c, attention_mask=bias) for c in (context, changed))
        assert torch.equal(one[1], other[1]), (kind, (one[1] - other[1]).abs().max())
        assert not torch.equal(one[0], other[0])


def test_a_picture_before_the_text_stays(tiny):
    """Wan's image-to-video layers have it as keys of their own, 512 tokens before the end."""
    model = tiny.CASES["wan_i2v"].model()
    module = model.blocks[0].attn2
    model_stub = torch.nn.Module()
    prior = RegionalPrior(prompts=(("a fox", (0, 0, 1, 1)),), weight=0.25)
    composer = Composer(prior, model_stub, [], SimpleNamespace(), SimpleNamespace())
    hidden, context, region = torch.randn(1, 7, 32), torch.randn(1, 5 + 512, 32), torch.randn(1, 512, 32)
    without = torch.arange(512)[None] % 7 == 3
    composer.work = Work([slice(0, 1)], 1, 512, without=without, contexts=[region])
    args, kwargs = composer.screen(module, (hidden, context, None, None), {})
    out = composer.compose(module, args, kwargs, module(*args, **kwargs))
    picture = module(hidden, context, None, None) - attend(module, hidden, context[:, 5:])[0]
    words = 0.75 * attend(module, hidden, context[:, 5:], without)[0] + 0.25 * attend(module, hidden, region)[0]
    torch.testing.assert_close(out, words + picture, rtol=1e-4, atol=1e-5)


def test_fused_projections_give_the_same_map(build):
    pipe, _ = build("sd")
    module = layers_of(pipe)[0]
    hidden, text = torch.randn(1, 9, module.to_q.in_features), torch.randn(1, TOKENS, 12)
    plain = query_and_key(module, hidden, text)
    module.fuse_projections()
    for one, other in zip(plain, query_and_key(module, hidden, text), strict=True):
        torch.testing.assert_close(one, other)


WHOLE = ((0.0, 1.0), (0.0, 1.0), (0.0, 1.0))


@pytest.mark.parametrize(
    ("window", "box", "share"),
    [
        (WHOLE, LEFT, 1.0),
        (((0.0, 1.0), (0.0, 0.5), (0.0, 0.5)), LEFT, 1.0),
        (((0.0, 1.0), (0.0, 0.5), (0.25, 0.75)), LEFT, 0.5),
        (((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)), LEFT, 0.0),
        (((0.0, 1.0), (0.0, 0.5), (0.0, 0.5)), (0.25, 0.25, 0.75, 0.5), 0.5),
    ],
)
def test_overlap(window, box, share):
    assert overlap(window, box) == pytest.approx(share)


def test_kept_tokens_come_from_all_tokenizers(build):
    pipe, _ = build("sdxl")
    kept = special_tokens(pipe, {"prompt": ["a fox", "a"], "prompt_2": "one red dog"}, torch.Size((2, TOKENS, 12)))
    assert kept.int().tolist() == [[1, 0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1, 1]]
    assert special_tokens(pipe, {"prompt": None}, torch.Size((2, TOKENS, 12))) is None


# ------------------------------------------------------------------ what is said


def warnings_of(caplog):
    found = [r.getMessage() for r in caplog.records if r.name == "sparsereel" and r.levelno >= logging.WARNING]
    caplog.clear()
    return found


def test_prompts_as_embeddings(build, caplog):
    pipe, run = build("sd")
    extend(pipe, "sd", recipe(RegionalPrior(prompts=FOX.prompts, threshold=0.9985)))
    positive, negative = encoded(pipe, "sd", "one dog on snow"), encoded(pipe, "sd", "")
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert run(None, **given, **LARGE["sd"]).isfinite().all()
    run(None, **given, **LARGE["sd"])
    assert ["as embeddings" in text for text in warnings_of(caplog)] == [True]
    pipe, run = build("wan")
    extend(pipe, "wan", recipe(RegionalPrior(prompts=FOX.prompts, threshold=0.9985)))
    by_text = run(**LARGE["wan"])
    given = {
        f"{name}prompt_embeds": encoded(pipe, "wan", t) for name, t in (("", "one dog on snow"), ("negative_", ""))
    }
    # Zeros show where Wan's embeddings end.
    assert torch.equal(run(None, **given, **LARGE["wan"]), by_text)
    assert not warnings_of(caplog)


def test_what_cannot_be_known_is_said_once(build, caplog):
    pipe, run = build("wan")
    extend(pipe, "wan", recipe(RegionalPrior()))
    run(**LARGE["wan"])
    run(**LARGE["wan"])
    assert ["screens no tokens: the lowest share of one" in text for text in warnings_of(caplog)] == [True]
    run(negative_prompt="one dog on snow", **LARGE["wan"])
    assert [text.startswith("the regional prior cannot tell the prompt") for text in warnings_of(caplog)] == [True]
    latents = torch.randn(1, 4, 2, 32, 24)
    run(latents=latents, **LARGE["wan"])
    assert ["with latents that were given" in text for text in warnings_of(caplog)] == [True]
    run(latents=latents, **LARGE["wan"])
    assert not warnings_of(caplog)
    # Longer, not larger: nothing small is made.
    sparsereel.extend(pipe, frames=13, method=recipe(RegionalPrior(), time=True))
    run(num_frames=13)
    assert ["no small result was made" in text for text in warnings_of(caplog)] == [True]
    corner = RegionalPrior(prompts=(("a fox", (0.4, 0.4, 0.6, 0.6)),), threshold=0, overlap=1.0)
    sparsereel.extend(pipe, height=256, width=256, method=Recipe(views=Views(time=False, stride=1.0), regional=corner))
    run(height=256, width=256)
    assert ["no window shares enough with the box of 'a fox'" in t for t in warnings_of(caplog)] == [True]


def test_the_same_words_on_both_sides_of_one_batch(build):
    """In a batch the prompt comes last."""
    pipe, run = build("sd")
    extend(pipe, "sd", Recipe(views=Views(time=False), regional=FOX))
    spy = Spy(pipe)
    run(negative_prompt="one dog on snow", **LARGE["sd"])
    spy.close()
    call = next(c for c in spy.calls if c.place is not None and FOX.for_window(c.place.windows[c.place.number]))
    expected, _ = attend(call.module, call.hidden, call.context)
    torch.testing.assert_close(call.out[0], expected[0], rtol=1e-4, atol=2e-6)
    assert (call.out[1] - expected[1]).abs().max() > 1e-5


def test_a_model_without_cross_attention_to_text(build, caplog):
    pipe, _ = build("sd")
    extend(pipe, "sd", "plain")
    runtime = pipe.unet._sparsereel_injection.runtime
    bare = torch.nn.Module()
    assert RegionalPrior().install(bare, runtime.extension, runtime) == []
    assert RegionalPrior().install(bare, runtime.extension, runtime) == []
    assert ["has no cross-attention (attn2)" in text for text in warnings_of(caplog)] == [True]
    with pytest.raises(ValueError, match="regional prompts need cross-attention"):
        FOX.install(bare, runtime.extension, runtime)
    # One that turns its prompts into something else first.
    pipe.unet.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="regional prompts need cross-attention"):
        FOX.install(pipe.unet, runtime.extension, runtime)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"prompts": ("a red fox",)}, "a regional prompt is a pair"),
        ({"prompts": ((" ", LEFT),)}, "a regional prompt is a pair"),
        ({"prompts": (("a fox", (0, 0, 1)),)}, "the box of 'a fox' needs four numbers"),
        ({"prompts": (("a fox", (0, 0, 1, float("nan"))),)}, "needs four numbers"),
        ({"prompts": (("a fox", (0, 0, 1, 1.5)),)}, "in shares of the picture, from 0 to 1"),
        ({"prompts": (("a fox", (0.5, 0, 0.5, 1)),)}, "is empty: top < bottom and left < right must hold"),
        ({"threshold": 1.5}, "threshold of a regional prior is a share in"),
        ({"weight": -0.1}, "a regional prior needs a weight"),
        ({"overlap": 0.0}, "a regional prior needs a weight"),
    ],
)
def test_bad_priors(given, text):
    with pytest.raises(ValueError, match=text):
        RegionalPrior(**given)


def test_recipes_that_cannot_work(build):
    with pytest.raises(ValueError, match="is about windows; give views"):
        Recipe(regional=FOX)
    with pytest.raises(ValueError, match="windows over the picture, which these views see whole"):
        Recipe(views=Views(space=False), regional=FOX)
    with pytest.raises(ValueError, match="give a guide, or threshold=0"):
        Recipe(views=Views(), regional=RegionalPrior())
    pipe, _ = build("sd")
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="regional prompts need a text encoder"):
        extend(pipe, "sd", recipe(FOX))
    assert "forward" not in vars(pipe.unet)
    assert extend(pipe, "sd", "cupscale").recipe.regional == RegionalPrior()
