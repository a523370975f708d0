"""The step found for every model call, in pipelines with real schedulers and loops, and what schedules make of it."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import torch

import sparsereel
from sparsereel import AttentionPlan
from sparsereel.patterns import Neighborhood
from sparsereel.step import StepInfo

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = Neighborhood(window=(1, 3, 3))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def seeded():
    return torch.Generator().manual_seed(0)


def runtime_of(model):
    return model._sparsereel_injection.runtime


def record(model, into):
    """Note the step of every call of a sparsified model."""
    return model.register_forward_pre_hook(lambda module, args: into.append(runtime_of(module).step()))


def steps_of(pipe, model, **call):
    """(steps found, times the pipeline's loop went round)."""
    found, rounds = [], []

    def count(pipe, step, timestep, values):
        rounds.append(step)
        return values

    handle = record(model, found)
    try:
        pipe(**call, generator=seeded(), callback_on_step_end=count)
    finally:
        handle.remove()
    return found, rounds


def in_order(total, each=1):
    return [StepInfo(index, total) for index in range(total) for _ in range(each)]


WAN_SCHEDULERS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
}


@DTYPES
@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_wan(tiny, name, dtype):
    pipe, call = tiny.wan_pipe(WAN_SCHEDULERS[name](), dtype=dtype)
    sparsereel.sparsify(pipe, NEAR)
    found, rounds = steps_of(pipe, pipe.transformer, **call, num_inference_steps=7)
    assert len(rounds) == 7
    assert found == in_order(7, each=2)  # with and without the prompt
    found, _ = steps_of(pipe, pipe.transformer, **call, num_inference_steps=3, guidance_scale=1.0)
    assert found == in_order(3)


def test_many_steps_at_a_strong_shift_in_bf16(tiny):
    """Model timesteps collide here: 50 steps have fewer distinct values in bf16."""
    pipe, call = tiny.wan_pipe(WAN_SCHEDULERS["euler"](), dtype=torch.bfloat16)
    sparsereel.sparsify(pipe, NEAR)
    found, _ = steps_of(pipe, pipe.transformer, **call, num_inference_steps=50, guidance_scale=1.0)
    assert found == in_order(50)


SD_SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
}


@DTYPES
@pytest.mark.parametrize("name", list(SD_SCHEDULERS))
def test_stable_diffusion(tiny, name, dtype):
    pipe, call = tiny.sd_pipe(SD_SCHEDULERS[name](), dtype=dtype)
    sparsereel.sparsify(pipe, NEAR)
    found, rounds = steps_of(pipe, pipe.unet, **call, num_inference_steps=6)
    assert len(rounds) == {"heun": 11, "pndm": 7}.get(name, 6)  # second order counts calls; pndm warms up
    assert found == in_order(len(rounds))


def test_a_scheduler_set_after_sparsify(tiny):
    """One that visits a timestep twice and keeps no index: the loop's own count tells."""
    pipe, call = tiny.sd_pipe(diffusers.DDIMScheduler())
    sparsereel.sparsify(pipe, NEAR)
    pipe.scheduler = SD_SCHEDULERS["pndm"]()
    found, rounds = steps_of(pipe, pipe.unet, **call, num_inference_steps=4)
    assert len(rounds) == 5
    assert found == in_order(5)


@pytest.mark.parametrize("name", list(SD_SCHEDULERS))
def test_image_to_image_counts_the_steps_it_runs(tiny, name):
    pipe, call = tiny.sd_pipe(SD_SCHEDULERS[name](), image_to_image=True)
    sparsereel.sparsify(pipe, NEAR)
    found, rounds = steps_of(pipe, pipe.unet, **call, num_inference_steps=8)
    assert len(rounds) < 8 or name == "heun"
    assert found == in_order(len(rounds))


@DTYPES
@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_cogvideox(tiny, name, dtype):
    pipe, call = tiny.cogvideox_pipe(getattr(diffusers, name)(), dtype=dtype)
    sparsereel.sparsify(pipe, NEAR)
    found, rounds = steps_of(pipe, pipe.transformer, **call, num_inference_steps=5)
    assert len(rounds) == 5
    assert found == in_order(5)


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_minireel(name):
    pipe = sparsereel.minireel.load()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = WAN_SCHEDULERS[name]()
    plan = AttentionPlan.uniform(Neighborhood(window=(1, 3, 3)), dense_first=1, dense_last=0.25)
    sparsereel.sparsify(pipe, plan)
    call = {"prompt": "a red 3 moving right on navy", "height": 48, "width": 48, "num_frames": 9}
    found, _ = steps_of(pipe, pipe.transformer, **call, num_inference_steps=4, output_type="latent")
    assert found == in_order(4, each=2)
    assert {(row.calls, row.dense_calls) for row in sparsereel.report(pipe)} == {(8, 4)}


def test_two_transformers_share_one_count(tiny):
    pipe, call = tiny.wan_pipe(WAN_SCHEDULERS["euler"](), transformer_2=tiny.CASES["wan"].model(), boundary_ratio=0.5)
    plan = AttentionPlan.uniform(NEAR, dense_first=1, dense_last=1)
    plain = pipe(**call, num_inference_steps=6, generator=seeded()).frames
    report = sparsereel.sparsify(pipe, plan)
    assert {row.name.split(".")[0] for row in report} == {"transformer", "transformer_2"}
    high, low = [], []
    handles = [record(pipe.transformer, high), record(pipe.transformer_2, low)]
    pipe(**call, num_inference_steps=6, generator=seeded())
    for handle in handles:
        handle.remove()
    assert high
    assert low
    assert high + low == in_order(6, each=2)
    rows = sparsereel.report(pipe)
    assert {r.dense_calls for r in rows} == {2}
    assert sum(r.calls for r in rows) == 12 * 3
    sparsereel.restore(pipe)
    assert not hasattr(pipe.transformer_2, "_sparsereel_injection")
    assert len(pipe.transformer_2._forward_pre_hooks) == 0
    again = pipe(**call, num_inference_steps=6, generator=seeded()).frames
    assert torch.equal(torch.as_tensor(again), torch.as_tensor(plain))


def test_timesteps_for_each_token(tiny):
    """Wan 2.2 text-image-to-video hands the model one timestep a token."""
    pipe, call = tiny.wan_pipe(WAN_SCHEDULERS["euler"](), expand_timesteps=True)
    shapes = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["timestep"].shape), with_kwargs=True
    )
    sparsereel.sparsify(pipe, AttentionPlan.uniform(NEAR, dense_first=0.5))
    found, _ = steps_of(pipe, pipe.transformer, **call, num_inference_steps=4)
    assert set(shapes) == {torch.Size([1, 320])}
    assert found == in_order(4, each=2)
    assert {row.dense_calls for row in sparsereel.report(pipe)} == {4}


@pytest.mark.parametrize(
    ("first", "last", "dense"),
    [(0, 0, set()), (2, 0, {0, 1}), (0, 1, {6}), (0.25, 0.0, {0, 1}), (1, 0.3, {0, 4, 5, 6}), (1.0, 0, set(range(7)))],
)
def test_dense_steps_are_the_ones_asked_for(tiny, first, last, dense):
    pipe, call = tiny.wan_pipe(WAN_SCHEDULERS["unipc"]())
    sparsereel.sparsify(pipe, AttentionPlan.uniform(NEAR, dense_first=first, dense_last=last))
    steps, dense_so_far = [], [0]

    def watch(module, args, output):
        steps.append(sparsereel.report(pipe).layers[0].dense_calls > dense_so_far[0])
        dense_so_far[0] = sparsereel.report(pipe).layers[0].dense_calls

    pipe.transformer.register_forward_hook(watch)
    pipe(**call, num_inference_steps=7, guidance_scale=1.0, generator=seeded())
    assert {index for index, was_dense in enumerate(steps) if was_dense} == dense
    row = sparsereel.report(pipe).layers[0]
    assert (row.calls, row.dense_calls) == (7, len(dense))
    assert ("dense step of the schedule" in row.reason) == bool(dense)


def test_patterns_by_step(tiny):
    pipe, call = tiny.cogvideox_pipe(diffusers.CogVideoXDDIMScheduler())
    timeline = [{"steps": "0.0-0.5", "use": "full"}, {"steps": "0.5-1.0", "use": {"neighborhood": {"window": 3}}}]
    plan = AttentionPlan.from_dict({"version": 1, "components": {"transformer": {"layers": {"*": timeline}}}})
    sparsereel.sparsify(pipe, plan)
    pipe(**call, num_inference_steps=6, generator=seeded())
    assert {(row.calls, row.dense_calls) for row in sparsereel.report(pipe)} == {(6, 3)}


# ------------------------------------------------------------------ outside a pipeline's own call


def test_unknown_step_stays_dense_and_is_reported(tiny):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    before = tiny.run(model, inputs)
    sparsereel.sparsify(model, AttentionPlan.uniform(NEAR, dense_first=1))
    torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-5, atol=1e-5)
    row = sparsereel.report(model).layers[0]
    assert row.dense_calls == 1
    assert "step is unknown" in row.reason


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "CogVideoXDDIMScheduler"])
def test_own_loops_with_the_pipelines_scheduler(tiny, scheduler):
    """A loop of the user's own around the model of a pipeline: the scheduler, or a count of its steps, tells."""
    make = tiny.wan_pipe if scheduler.startswith("Flow") else tiny.cogvideox_pipe
    pipe, _ = make(getattr(diffusers, scheduler)())
    inputs = tiny.CASES["wan" if scheduler.startswith("Flow") else "cogvideox"].inputs()
    signature = inspect.signature(pipe.scheduler.step)
    before = dict(vars(pipe.scheduler))
    sparsereel.sparsify(pipe, AttentionPlan.uniform(NEAR, dense_first=2))
    assert inspect.signature(pipe.scheduler.step) == signature
    for _ in range(2):
        found = []
        handle = record(pipe.transformer, found)
        pipe.scheduler.set_timesteps(5)
        sample = inputs["hidden_states"]
        for t in pipe.scheduler.timesteps:
            noise = tiny.run(pipe.transformer, inputs)
            sample = pipe.scheduler.step(noise, t, sample, return_dict=False)[0]
        handle.remove()
        assert found == in_order(5)
    assert {(row.calls, row.dense_calls) for row in sparsereel.report(pipe)} == {(10, 4)}
    sparsereel.restore(pipe)
    assert set(vars(pipe.scheduler)) - set(before) <= {"timesteps", "sigmas", "num_inference_steps"}
    assert "step" not in vars(pipe.scheduler)


def test_counting_survives_another_model_and_copies(tiny):
    """Two models count on one scheduler; a copied scheduler is its own; wrappers of others stay."""
    pipe, _ = tiny.cogvideox_pipe(diffusers.CogVideoXDDIMScheduler())
    twin, _ = tiny.cogvideox_pipe(pipe.scheduler)
    calls = []
    original = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    users = pipe.scheduler.step
    for each in (pipe, twin, pipe):
        sparsereel.sparsify(each, NEAR)
    noise = torch.zeros(1, 2, 4, 4, 4)
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.step(noise, pipe.scheduler.timesteps[0], noise)
    assert len(calls) == 1
    sparsereel.restore(pipe)
    assert runtime_of(twin.transformer).steps.current(twin.transformer) == StepInfo(1, 4)
    pipe.scheduler.step(noise, pipe.scheduler.timesteps[1], noise)
    assert runtime_of(twin.transformer).steps.current(twin.transformer) == StepInfo(2, 4)

    copied = copy.deepcopy(pipe.scheduler)
    copied.set_timesteps(9)
    assert len(pipe.scheduler.timesteps) == 4
    assert len(copied.timesteps) == 9
    sparsereel.restore(twin)
    assert pipe.scheduler.step is users


def test_pipelines_that_share_a_model_use_the_scheduler_in_use(tiny):
    first, call = tiny.wan_pipe(WAN_SCHEDULERS["euler"]())
    second = tiny.quiet(
        diffusers.WanPipeline(
            scheduler=WAN_SCHEDULERS["unipc"](),
            transformer=first.transformer,
            vae=None,
            tokenizer=None,
            text_encoder=None,
        )
    )
    sparsereel.sparsify(first, NEAR)
    for pipe, steps in ((first, 4), (second, 3), (first, 5)):
        found, _ = steps_of(pipe, pipe.transformer, **call, num_inference_steps=steps, guidance_scale=1.0)
        assert found == in_order(steps)
    assert sparsereel.report(second).layers[0].calls == 12
    sparsereel.restore(second)
    assert not hasattr(first.transformer, "_sparsereel_injection")
    with pytest.raises(ValueError, match="nothing to report"):
        sparsereel.report(first)
