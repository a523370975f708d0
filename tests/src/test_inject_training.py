"""Gradients through sparse layers, gradient checkpointing, and compilation."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sparsereel
from sparsereel import AttentionPlan
from sparsereel.patterns import Neighborhood, SlidingTile, Spatial

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = Neighborhood(window=(1, 5, 5))
#: three layers, three masks
LAYERS = [Neighborhood(window=(1, 5, 5)), Spatial(frames=3), Neighborhood(window=(5, 3, 3))]


def gradients(model, inputs, between=lambda: None):
    """Gradients of a scalar of the output to all parameters and to the input."""
    inputs = dict(inputs)
    key = "sample" if "sample" in inputs else "hidden_states"
    inputs[key] = inputs[key].clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(**inputs, return_dict=False)[0]
    between()
    out.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "input": inputs[key].grad}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-3, atol=1e-6 + 1e-3 * value.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("name", ["wan", "wan_vace", "hunyuan_video", "cogvideox", "unet"])
@pytest.mark.parametrize("checkpointing", ["before", "after", "off"])
def test_gradients_equal_dense_under_the_token_mask(tiny, name, checkpointing):
    case = tiny.CASES[name]
    model, inputs = case.model(), case.inputs()
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = gradients(model, inputs)
    plain = gradients(model, inputs)
    assert max((plain[n] - expected[n]).abs().max().item() for n in plain) > 1e-4
    model.train()
    if checkpointing == "before":
        model.enable_gradient_checkpointing()
    sparsereel.sparsify(model, NEAR)
    if checkpointing == "after":
        model.enable_gradient_checkpointing()
    assert_same(gradients(model, inputs), expected)
    rows = list(sparsereel.report(model))
    assert [row.calls for row in rows] == [1] * case.layers  # what runs again in backward is not counted again
    assert all(row.dense_calls == 0 for row in rows)
    sparsereel.restore(model)
    assert_same(gradients(model, inputs), plain)


CHANGES = {
    "another plan": lambda model: sparsereel.sparsify(model, Spatial(frames=1)),
    "restore": sparsereel.restore,
    "full": lambda model: sparsereel.sparsify(model, AttentionPlan.uniform(NEAR, min_tokens=10**6)),
}


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_a_plan_changed_between_forward_and_backward_changes_nothing(tiny, name, checkpointing, change):
    case = tiny.CASES[name]
    model, inputs = case.model(), case.inputs()
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = gradients(model, inputs)
    if checkpointing:
        model.enable_gradient_checkpointing()
    function = model._gradient_checkpointing_func
    sparsereel.sparsify(model, NEAR)
    assert_same(gradients(model, inputs, between=lambda: CHANGES[change](model)), expected)
    sparsereel.restore(model)
    assert model._gradient_checkpointing_func is function
    assert not any(hasattr(type(m.processor), "sparsereel_base") for m in model.modules() if hasattr(m, "processor"))


def test_a_plan_put_in_between_forward_and_backward_changes_nothing(tiny):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    model.enable_gradient_checkpointing()
    expected = gradients(model, inputs)
    sparsereel.sparsify(model, AttentionPlan.uniform(NEAR, min_tokens=10**6))
    assert_same(gradients(model, inputs, between=lambda: sparsereel.sparsify(model, NEAR)), expected)


def test_two_forward_passes_before_one_backward(tiny):
    """The first pass is dense (other size, fewer tokens than min_tokens), the second sparse; both are run again."""
    case = tiny.CASES["wan"]
    model, small, large = case.model(), tiny.wan_inputs(2, 16, 16), tiny.wan_inputs(5, 16, 16)

    def both():
        model.zero_grad(set_to_none=True)
        first = model(**small, return_dict=False)[0].square().mean()
        second = model(**large, return_dict=False)[0].square().mean()
        (first + second).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = both()
    model.enable_gradient_checkpointing()
    sparsereel.sparsify(model, AttentionPlan.uniform(NEAR, min_tokens=200))
    assert_same(both(), expected)
    rows = list(sparsereel.report(model))
    assert {(row.calls, row.dense_calls) for row in rows} == {(2, 1)}


def test_the_users_own_checkpoint_around_a_block(tiny):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = gradients(model, inputs)
    block = model.blocks[1]
    original = block.forward
    block.forward = lambda *args: torch.utils.checkpoint.checkpoint(original, *args, use_reentrant=False)
    sparsereel.sparsify(model, NEAR)
    assert_same(gradients(model, inputs), expected)


# ------------------------------------------------------------------ compilation


@pytest.fixture
def compiling():
    torch._dynamo.reset()
    # Deterministic fills are not what is tested here, and double the time of compilation.
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch._dynamo.reset()


def layered_plan():
    table = {str(i): {"use": pattern} for i, pattern in enumerate(("near", "space", "long"))}
    layers = {key: value["use"] for key, value in table.items()}
    return AttentionPlan.from_dict(
        {
            "version": 1,
            "patterns": {
                "near": {"neighborhood": {"window": [1, 5, 5]}},
                "space": {"spatial": {"frames": 3}},
                "long": {"neighborhood": {"window": [5, 3, 3]}},
            },
            "components": {"transformer": {"layers": layers}},
        }
    )


def test_blocks_compile_once_for_all_masks(tiny, compiling):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    with tiny.dense_under(lambda call, grid: LAYERS[call].token_mask(grid), case.grids):
        expected = tiny.run(model, inputs)
    sparsereel.sparsify(model, layered_plan())
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    tiny.run(model, inputs)
    assert counter.frame_count == 1
    rows = list(sparsereel.report(model))
    assert [row.calls for row in rows] == [2, 2, 2]
    assert len({row.token_density for row in rows}) == 3
    assert all(row.backend for row in rows)


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", *slow("wan_ti2v", "cogvideox15", "unet")])
def test_compiled_models_equal_eager_ones(tiny, compiling, name):
    case = tiny.CASES[name]
    model, inputs = case.model(), case.inputs()
    with sparsereel.sparsified(model, NEAR):
        expected = tiny.run(model, inputs)
    before = tiny.run(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    report = sparsereel.sparsify(compiled, NEAR)
    assert report.replaced == case.layers
    torch.testing.assert_close(tiny.run(compiled, inputs), expected, rtol=1e-4, atol=1e-4)
    rows = list(sparsereel.report(compiled))
    assert [(row.calls, row.dense_calls) for row in rows] == [(1, 0)] * case.layers
    sparsereel.restore(compiled)
    torch.testing.assert_close(tiny.run(compiled, inputs), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(tiny.run(model, inputs), before)


@pytest.mark.slow
def test_inductor(tiny, compiling):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    with sparsereel.sparsified(model, NEAR):
        expected = tiny.run(model, inputs)
        model.compile_repeated_blocks(fullgraph=True)
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-3, atol=1e-3)


def test_a_compiled_model_in_tile_order(tiny, compiling):
    model = tiny.CASES["wan"].model()
    inputs, grid = tiny.wan_inputs(4, 32, 32), sparsereel.TokenGrid(4, 16, 16)
    pattern = SlidingTile(window=(1, 1, 1), tile=(4, 8, 8))
    with tiny.dense_under(tiny.same_mask(pattern), (grid,)):
        expected = tiny.run(model, inputs)
    sparsereel.sparsify(model, pattern)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(tiny.run(compiled, inputs), expected, rtol=1e-4, atol=1e-4)
    assert sparsereel.report(model).density == pytest.approx(0.25)


def test_compiled_steps_follow_the_schedule(tiny, compiling):
    """A step is looked up when the graph runs, not when it is made."""
    import diffusers

    pipe, call = tiny.wan_pipe(diffusers.FlowMatchEulerDiscreteScheduler())
    options = {**call, "num_inference_steps": 4, "guidance_scale": 1.0}
    plan = AttentionPlan.uniform(NEAR, dense_first=1, dense_last=1)
    with sparsereel.sparsified(pipe, plan):
        expected = pipe(**options, generator=torch.Generator().manual_seed(0)).frames
    counter = CompileCounterWithBackend("eager")
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=counter)
    sparsereel.sparsify(pipe, plan)
    actual = pipe(**options, generator=torch.Generator().manual_seed(0)).frames
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 1
    assert {(row.calls, row.dense_calls) for row in sparsereel.report(pipe)} == {(4, 2)}


def test_gradients_of_a_compiled_model(tiny, compiling):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = gradients(model, inputs)
    sparsereel.sparsify(model, NEAR)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, inputs), expected)
    between = lambda: sparsereel.sparsify(model, Spatial(frames=1))  # noqa: E731
    sparsereel.sparsify(model, NEAR)
    assert_same(gradients(model, inputs, between), expected)


def test_compiled_and_checkpointed(tiny, compiling):
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    sparsereel.sparsify(model, NEAR)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, inputs), expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_calls_that_stay_dense_are_reported(tiny, compiling, monkeypatch, backend):
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    def causal(query, key, value, **kwargs):
        return dispatch_attention_fn(query, key, value, **{**kwargs, "is_causal": query.shape[1] == key.shape[1]})

    monkeypatch.setattr("diffusers.models.transformers.transformer_wan.dispatch_attention_fn", causal)
    case = tiny.CASES["wan"]
    model, inputs = case.model(), case.inputs()
    before = tiny.run(model, inputs)
    sparsereel.sparsify(model, NEAR)
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-4, atol=1e-4)
    rows = list(sparsereel.report(model))
    assert [(row.calls, row.dense_calls) for row in rows] == [(2, 2)] * 3
    assert {row.reason for row in rows} == {"2 dense: the model asks for causal attention"}


@pytest.mark.slow
def test_masks_changed_in_place_between_compiled_calls(tiny, compiling):
    case = tiny.CASES["hunyuan_video"]
    model, inputs = case.model(), case.inputs()
    expected, actual = [], []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for kept in (5, 2):
        inputs["encoder_attention_mask"][0] = torch.arange(tiny.TEXT) < kept
        with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
            expected.append(tiny.run(model, inputs))
    sparsereel.sparsify(model, NEAR)
    for kept in (5, 2):
        inputs["encoder_attention_mask"][0] = torch.arange(tiny.TEXT) < kept
        actual.append(tiny.run(compiled, inputs))
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
