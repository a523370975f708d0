"""Perturbed heads: the lerp against explicit attention maps, the guider, ordinary pipelines, the hunt for heads."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sparsereel
from sparsereel import minireel
from sparsereel.families.layout import text, video
from sparsereel.guidance import HeadPerturbation, HeadPerturbationGuidance, guided, hunt_heads, perturbed
from sparsereel.guidance.perturbation import Perturbing
from sparsereel.patterns import Neighborhood

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE: dict[str, Any] = {"num_frames": 9, "height": 48, "width": 48, "num_inference_steps": 4}
PROMPT = "a red 3 moving right on navy"


def a_runtime(layers: int = 2, heads: int = 4) -> Any:
    """As much of a runtime as a perturbation looks at."""
    plan = SimpleNamespace(heads=[None] * heads)
    return SimpleNamespace(layers=[SimpleNamespace(name=f"blocks.{n}", index=n, plan=plan) for n in range(layers)])


def with_maps(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: list[int], u: float, rows: slice
) -> torch.Tensor:
    """The definition: every map is drawn towards the identity."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    eye = torch.eye(q.shape[2], dtype=q.dtype)
    for head in heads:
        maps[:, head, rows] = (1 - u) * maps[:, head, rows] + u * eye[rows]
    return maps @ v


@pytest.mark.parametrize("rows", ["image", "all"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
def test_mixing_with_values_is_mixing_maps_with_the_identity(rows, kv_heads, u):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 20, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, 20, 8, dtype=torch.float64)
    layout = (*text(2), *video(2, 3, 3))
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    found = Perturbing(HeadPerturbation({1: [0, 3]}, u, rows), a_runtime())
    actual = found.apply(dense, v, 1, layout)
    wanted = slice(2, 20) if rows == "image" else slice(0, 20)
    assert torch.allclose(actual, with_maps(q, k, v, [0, 3], u, wanted), atol=1e-12)
    assert torch.equal(actual[:, 1:3], dense[:, 1:3])
    assert found.apply(dense, v, 0, layout) is dense


def test_strength_0_is_dense_to_the_bit_and_everything_is_undone(tiny):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    plain = tiny.run(model, inputs)
    with perturbed(model, HeadPerturbation({0: [1]}, strength=0.0)):
        assert torch.equal(tiny.run(model, inputs), plain)
    with pytest.raises(KeyboardInterrupt), perturbed(model, HeadPerturbation({0: [1]})):
        raise KeyboardInterrupt
    assert torch.equal(tiny.run(model, inputs), plain)
    assert not hasattr(model, "_sparsereel_injection")


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "unet"])
def test_all_heads_of_a_layer_are_perturbed_attention_guidance(tiny, name):
    """At strength 1 on every head and row a layer returns its values, as diffusers' PAG makes it do."""
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    case = tiny.CASES[name]
    model, inputs = case.model(), case.inputs()
    report = sparsereel.sparsify(model, "radial")
    counts = {n: len(layer.plan.heads) for n, layer in enumerate(model._sparsereel_injection.runtime.layers)}
    assert len(report.layers) == case.layers
    sparsereel.restore(model)
    with AttentionScoreSkipFunctionMode():
        expected = tiny.run(model, inputs)
    # Cross-attention has other lengths, so that mode leaves it alone; so do we.
    with perturbed(model, HeadPerturbation({n: range(count) for n, count in counts.items()}, rows="all")):
        actual = tiny.run(model, inputs)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_single_heads_whatever_the_kernel(tiny):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    heads = HeadPerturbation({1: [1]}, strength=0.5)
    found = {}
    for backend in ("cpu", "torch", "reference"):
        with sparsereel.sparsified(model, Neighborhood(window=(1, 3, 3)), backend=backend):
            sparse = tiny.run(model, inputs)
            with perturbed(model, heads):
                found[backend] = tiny.run(model, inputs)
            assert (found[backend] - sparse).abs().max() > 1e-4
            assert torch.equal(tiny.run(model, inputs), sparse)
    assert torch.allclose(found["cpu"], found["reference"], atol=1e-4)
    assert torch.allclose(found["torch"], found["reference"], atol=1e-4)


def test_layers_go_by_number_or_name_and_what_is_not_there_is_refused(tiny):
    model = tiny.CASES["wan"].model()
    inputs = tiny.CASES["wan"].inputs()
    with perturbed(model, HeadPerturbation({"1": [0]})):
        by_number = tiny.run(model, inputs)
    with perturbed(model, HeadPerturbation({"blocks.1.attn1": [0]})):
        assert torch.equal(tiny.run(model, inputs), by_number)
    for heads, said in (({9: [0]}, "no replaced self-attention layer 9; numbers: 0 to 2"), ({0: [2]}, "heads 0 to 1")):
        with pytest.raises(ValueError, match=said), perturbed(model, HeadPerturbation(heads)):
            pass
    for arguments, said in (
        ({"strength": 1.5}, "strength must lie in"),
        ({"rows": "text"}, "rows must be one of image, all"),
    ):
        with pytest.raises(ValueError, match=said):
            HeadPerturbation({0: [0]}, **arguments)
    with pytest.raises(ValueError, match="must be a list of numbers"):
        HeadPerturbation({0: [-1]})


# ------------------------------------------------------------------ the guider


def drive(guider: Any, model: torch.nn.Module, call: Any, step: int, total: int) -> torch.Tensor:
    """What diffusers' modular denoising loop does with a guider at one step."""
    guider.set_state(step=step, num_inference_steps=total, timestep=torch.tensor(0))
    batches = guider.prepare_inputs({"prompt": (1.0, 0.0)})
    for batch in batches:
        guider.prepare_models(model)
        batch.noise_pred = call(batch.prompt)
        guider.cleanup_models(model)
    return guider(batches).pred


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_guider_adds_its_term(tiny, scale):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    words = inputs["encoder_hidden_states"]

    def call(on: float) -> torch.Tensor:
        return tiny.run(model, {**inputs, "encoder_hidden_states": words * on})

    cond, uncond = call(1.0), call(0.0)
    with perturbed(model, HeadPerturbation({1: [0]}, 0.7)):
        weak = call(1.0)
    guider = HeadPerturbationGuidance(
        heads={1: [0]},
        strength=0.7,
        guidance_scale=scale,
        perturbed_guidance_scale=2.0,
        perturbed_guidance_stop=0.5,
    )
    expected = uncond + scale * (cond - uncond)
    assert (weak - cond).abs().max() > 1e-4
    assert torch.allclose(drive(guider, model, call, 0, 4), expected + 2 * (cond - weak), atol=1e-5)
    assert torch.allclose(drive(guider, model, call, 2, 4), expected, atol=1e-6)
    assert torch.equal(call(1.0), cond)
    again = HeadPerturbationGuidance.from_config(guider.config)
    assert torch.equal(drive(again, model, call, 0, 4), drive(guider, model, call, 0, 4))


def test_a_guider_without_heads_costs_no_pass(tiny):
    model = tiny.CASES["wan"].model()
    guider = HeadPerturbationGuidance(heads={})
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(0))
    assert guider.num_conditions == 2
    with pytest.raises(ValueError, match="shares of the steps"):
        HeadPerturbationGuidance(heads={}, perturbed_guidance_start=0.5, perturbed_guidance_stop=0.2)
    assert not hasattr(model, "_sparsereel_injection")


# ------------------------------------------------------------------ ordinary pipelines


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = minireel.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **changed: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return pipe(PROMPT, generator=generator, output_type="latent", **{**SIZE, **changed}).frames


@pytest.mark.parametrize("guidance_scale", [3.5, 1.0])
def test_a_pipeline_follows_the_formula(pipe, guidance_scale):
    """One step by hand against one step of the pipeline."""
    one = {"num_inference_steps": 1, "guidance_scale": guidance_scale}
    heads, scale = HeadPerturbation({2: [0, 1]}, 0.9), 1.5
    seen: list[torch.Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    plain = latents(pipe, **one)
    with perturbed(pipe.transformer, heads):
        latents(pipe, **one)
    handle.remove()
    cond, weak = seen[0], seen[len(seen) // 2]
    with guided(pipe, heads, scale=scale):
        moved = latents(pipe, **one)
    sigmas = pipe.scheduler.sigmas
    shift = (sigmas[1] - sigmas[0]) * scale * (cond - weak)
    assert shift.abs().max() > 1e-3
    assert torch.allclose(moved - plain, shift, atol=1e-4)


def test_what_changes_nothing_changes_nothing(pipe):
    plain = latents(pipe)
    for heads, options in (
        (HeadPerturbation({}), {"scale": 2.0}),
        (HeadPerturbation({2: [0]}), {"scale": 0.0}),
        (HeadPerturbation({2: [0]}), {"scale": 2.0, "start": 0.5, "stop": 0.5}),
    ):
        with guided(pipe, heads, **options):
            assert torch.equal(latents(pipe), plain)
    with guided(pipe, HeadPerturbation({2: [0]}), scale=2.0):
        assert not torch.equal(latents(pipe), plain)
    assert torch.equal(latents(pipe), plain)
    assert "cache_context" not in vars(pipe.transformer)
    assert not hasattr(pipe.transformer, "_sparsereel_injection")


def test_a_plan_stays_in_force(pipe):
    with sparsereel.sparsified(pipe, Neighborhood(window=(1, 3, 3))):
        sparse = latents(pipe)
        with guided(pipe, HeadPerturbation({2: [0]}), scale=2.0, stop=0.3):
            assert not torch.equal(latents(pipe), sparse)
        assert torch.equal(latents(pipe), sparse)
        assert all(row.replaced for row in sparsereel.report(pipe))


def test_refusals(pipe):
    heads = HeadPerturbation({2: [0]})
    for target, options, said in (
        (pipe.transformer, {"scale": 1.0}, "needs a pipeline"),
        (pipe, {"scale": -1.0}, "scale must be a number"),
        (pipe, {"scale": 1.0, "start": 0.6, "stop": 0.5}, "shares of the steps"),
    ):
        with pytest.raises(ValueError, match=said), guided(target, heads, **options):
            pass
    with pytest.raises(ValueError, match="heads 0 to 7"), guided(pipe, HeadPerturbation({2: [8]}), scale=1.0):
        pass


# ------------------------------------------------------------------ the hunt


HUNT: dict[str, Any] = {"frames": 5, "height": 32, "width": 32, "steps": 2, "scale": 4.0, "progress": False}


def redness(frames: np.ndarray, prompt: str) -> float:
    return float(frames[..., 0].mean())


def test_a_hunt_is_greedy_and_goes_on_where_it_stopped(pipe, tmp_path):
    heads = [(0, 0), (2, 1), (3, 2)]
    found = hunt_heads(pipe, [PROMPT], redness, heads=heads, rounds=2, folder=tmp_path, **HUNT)
    tried = dict(found.history)
    assert tried[()] == found.baseline
    assert set(tried) >= {((0, 0),), ((2, 1),), ((3, 2),)}
    first = max(((head,) for head in heads), key=lambda key: tried[key])
    pairs = {key for key in tried if len(key) == 2}
    assert len(pairs) == 2
    assert all(first[0] in key for key in pairs)
    assert found.score == max(tried.values())
    # What was scored is not generated again.
    calls: list[int] = []

    def counted(frames: np.ndarray, prompt: str) -> float:
        calls.append(1)
        return redness(frames, prompt)

    counted.__qualname__ = redness.__qualname__
    again = hunt_heads(pipe, [PROMPT], counted, heads=heads, rounds=2, folder=tmp_path, **HUNT)
    assert again == found
    assert calls == []
    found.save(tmp_path / "found.json")
    stored = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert HeadPerturbationGuidance(**stored["guider"]).perturbation == found.perturbation
    with pytest.raises(ValueError, match="of another hunt"):
        hunt_heads(pipe, [PROMPT], redness, heads=heads, folder=tmp_path, **{**HUNT, "scale": 1.0})


def test_the_judge_is_an_objective_and_a_record_makes_the_list_short(pipe):
    spread = [[0.9] * 8 for _ in range(6)]
    spread[4][5] = 0.1
    known = {"heads": {"transformer": {str(n): {"entropy": row} for n, row in enumerate(spread)}}}
    plan = sparsereel.AttentionPlan.uniform(Neighborhood(window=(1, 3, 3)))
    from dataclasses import replace

    record = replace(plan, calibration=known)
    found = hunt_heads(pipe, [PROMPT], shortlist=1, record=record, rounds=1, **HUNT)
    assert [heads for heads, _ in found.history] == [(), ((4, 5),)]
    assert 0 <= found.score <= 1


def test_hunts_that_cannot_be(pipe):
    for options, said in (
        ({"prompts": []}, "prompts must be a list"),
        ({"rounds": 0}, "rounds must be a whole number"),
        ({"heads": [(9, 0)]}, r"no head \(9, 0\)"),
        ({"shortlist": 2}, "a shortlist needs record"),
        ({"objective": "beauty"}, "or 'judge'"),
        ({"objective": lambda frames, prompt: float("nan"), "heads": [(0, 0)]}, "finite number"),
    ):
        with pytest.raises(ValueError, match=said):
            hunt_heads(pipe, **{"prompts": [PROMPT], "objective": redness, **HUNT, **options})
