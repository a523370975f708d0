"""Putting plans in and taking them out: exceptions, replacement, attention backends, copies, files, other libraries."""

from __future__ import annotations

import copy
import gc

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import sparsereel
from sparsereel import AttentionPlan
from sparsereel.families import diffusers_seam
from sparsereel.patterns import Full, Neighborhood, Spatial, Temporal

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = Neighborhood(window=(1, 3, 3))
#: one family of each seam
SEAMS = pytest.mark.parametrize("name", ["wan", "cogvideox"])


@pytest.fixture(autouse=True)
def _fresh_registries(monkeypatch):
    """Models that other tests left behind do not count here; what is set for all of diffusers is set back."""
    left = diffusers_seam.REGISTRATION
    if left.entered:
        left._leave()
        left.entered = False
    monkeypatch.setattr(diffusers_seam, "REGISTRATION", diffusers_seam._Registration())
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture
def made(tiny, request):
    def make(name):
        case = tiny.CASES[name]
        return case, case.model(), case.inputs()

    return make


# ------------------------------------------------------------------ what was there before


@SEAMS
def test_a_with_block_gives_back_the_plan_of_before(tiny, made, name):
    _, model, inputs = made(name)
    untouched = tiny.run(model, inputs)
    sparsereel.sparsify(model, Spatial(0), backend="torch")
    before = tiny.run(model, inputs)
    with sparsereel.sparsified(model, NEAR):
        assert not torch.equal(tiny.run(model, inputs), before)
    assert torch.equal(tiny.run(model, inputs), before)
    assert model._sparsereel_injection.runtime.backend == "torch"
    with sparsereel.sparsified(model, NEAR):
        sparsereel.restore(model)
    assert torch.equal(tiny.run(model, inputs), untouched)


# ------------------------------------------------------------------ exceptions


@SEAMS
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_after_an_exception_in_the_middle(tiny, made, name, error):
    case, model, inputs = made(name)
    before = tiny.run(model, inputs)
    last = (model.blocks if name == "wan" else model.transformer_blocks)[-1]

    def fail(module, args):
        raise error("stop")

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"), sparsereel.sparsified(model, NEAR):
        tiny.run(model, inputs)
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), before)
    assert diffusers_seam.ACTIVE.layer is None

    # Still in place: the next call is right again.
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = tiny.run(model, inputs)
    sparsereel.sparsify(model, NEAR)
    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        tiny.run(model, inputs)
    handle.remove()
    torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_failure_while_installing_leaves_nothing(tiny, made, monkeypatch):
    _, model, inputs = made("wan")
    before = tiny.run(model, inputs)
    processors = [block.attn1.processor for block in model.blocks]
    original, calls = diffusers_seam.replace_processor, []

    def fail_at_the_last(module, layer, seam):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(module, layer, seam)

    monkeypatch.setattr(diffusers_seam, "replace_processor", fail_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        sparsereel.sparsify(model, NEAR)
    assert [block.attn1.processor for block in model.blocks] == processors
    assert not model._forward_pre_hooks
    assert not registered()
    assert torch.equal(tiny.run(model, inputs), before)


# ------------------------------------------------------------------ replacing, restoring


@SEAMS
def test_a_second_plan_replaces_the_first(tiny, made, name):
    case, model, inputs = made(name)
    before = tiny.run(model, inputs)
    for pattern in (NEAR, Spatial(frames=1), Temporal()):
        with tiny.dense_under(tiny.same_mask(pattern), case.grids):
            expected = tiny.run(model, inputs) if not hasattr(model, "_sparsereel_injection") else None
        if expected is None:
            sparsereel.restore(model)
            with tiny.dense_under(tiny.same_mask(pattern), case.grids):
                expected = tiny.run(model, inputs)
            sparsereel.sparsify(model, NEAR)
        sparsereel.sparsify(model, pattern)
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
        assert sparsereel.report(model).layers[0].calls == 1
        assert len(model._forward_hooks) == 1
    sparsereel.restore(model)
    assert torch.equal(tiny.run(model, inputs), before)


@SEAMS
def test_restore_is_harmless_on_the_untouched(tiny, made, name):
    _, model, inputs = made(name)
    before = tiny.run(model, inputs)
    attributes = dict(vars(model))
    sparsereel.restore(model)
    sparsereel.restore(model)
    assert vars(model) == attributes
    assert torch.equal(tiny.run(model, inputs), before)


def test_a_bad_second_plan_keeps_the_first(tiny, made):
    _, model, _ = made("wan")
    sparsereel.sparsify(model, NEAR)
    with pytest.raises(ValueError, match="unknown backend"):
        sparsereel.sparsify(model, Full(), backend="fast")
    data = {"version": 1, "components": {"transformer": {"layers": {"0-9": {"radial": {}}}}}}
    with pytest.raises(ValueError, match="has 3 layers"):
        sparsereel.sparsify(model, AttentionPlan.from_dict(data))
    assert "neighborhood" in sparsereel.report(model).layers[0].pattern


# ------------------------------------------------------------------ attention backends


def backends(model):
    return [vars(block.attn1.processor).get("_attention_backend", "unset") for block in model.blocks]


def test_a_backend_set_before_is_used_and_comes_back(tiny, made):
    _, model, inputs = made("wan")
    model.set_attention_backend("_native_math")
    before, state = tiny.run(model, inputs), backends(model)
    calls = spy(AttentionBackendName._NATIVE_MATH)
    try:
        sparsereel.sparsify(model, AttentionPlan.uniform(NEAR, min_tokens=10_000))
        assert torch.equal(tiny.run(model, inputs), before)
        # Three self-attention layers stay dense on it, three cross-attention layers were never touched.
        assert len(calls) == 6
        calls.clear()
        sparsereel.sparsify(model, NEAR)
        tiny.run(model, inputs)
        assert len(calls) == 3
    finally:
        calls.undo()
    sparsereel.restore(model)
    assert backends(model) == state == [AttentionBackendName._NATIVE_MATH] * 3
    assert torch.equal(tiny.run(model, inputs), before)


def test_a_backend_set_in_between_is_carried_over(tiny, made):
    _, model, inputs = made("wan")
    before = tiny.run(model, inputs)
    assert backends(model) == ["unset"] * 3
    sparsereel.sparsify(model, NEAR)
    sparse = tiny.run(model, inputs)
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(tiny.run(model, inputs), sparse, rtol=1e-4, atol=1e-4)
    assert sparsereel.report(model).layers[0].dense_calls == 0
    sparsereel.restore(model)
    assert backends(model) == [AttentionBackendName._NATIVE_MATH] * 3
    torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-4, atol=1e-4)

    sparsereel.sparsify(model, NEAR)
    model.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    sparsereel.restore(model)
    assert backends(model) == [None] * 3
    assert torch.equal(tiny.run(model, inputs), before)


def test_registries_are_clean_after_the_last_restore(made):
    first, second = made("wan")[1], made("hunyuan_video")[1]
    for model in (first, second, first):
        sparsereel.sparsify(model, NEAR)
    sparsereel.restore(first)
    assert registered()
    sparsereel.restore(second)
    assert not registered()
    for table in ("_backends", "_constraints", "_supported_arg_names", "_supports_context_parallel"):
        assert not [entry for entry in getattr(_AttentionBackendRegistry, table) if "sparsereel" in str(entry)]


def test_a_model_thrown_away_does_not_keep_the_registration(made):
    first, second = made("wan")[1], made("wan")[1]
    sparsereel.sparsify(first, NEAR)
    sparsereel.sparsify(second, NEAR)
    del first
    gc.collect()
    assert registered()
    sparsereel.restore(second)
    assert not registered()


def registered():
    """Whether diffusers knows the pseudo-backend."""
    return "sparsereel" in AttentionBackendName._value2member_map_


class spy(list):
    """Counts the calls that reach a backend of diffusers."""

    def __init__(self, backend):
        super().__init__()
        self.backend, self.original = backend, _AttentionBackendRegistry._backends[backend]
        _AttentionBackendRegistry._backends[backend] = self._count

    def _count(self, **kwargs):
        self.append(kwargs["query"].shape)
        return self.original(**kwargs)

    def undo(self):
        _AttentionBackendRegistry._backends[self.backend] = self.original


# ------------------------------------------------------------------ other people's processors


class Scaled(WanAttnProcessor):
    """A user's own processor."""

    def __call__(self, *args, **kwargs):
        return 0.5 * super().__call__(*args, **kwargs)


def test_a_custom_processor_stays_dense_and_is_named(tiny, made, caplog):
    _, model, inputs = made("wan")
    theirs = Scaled()
    model.blocks[1].attn1.set_processor(theirs)
    before = tiny.run(model, inputs)
    report = sparsereel.sparsify(model, Full())
    assert [row.replaced for row in report] == [True, False, True]
    assert "attention processor Scaled is not understood" in report.layers[1].reason
    assert "Scaled" in str(report)
    torch.testing.assert_close(tiny.run(model, inputs), before, rtol=1e-5, atol=1e-5)
    sparsereel.restore(model)
    assert model.blocks[1].attn1.processor is theirs


def test_a_processor_set_after_sparsify_stays(tiny, made):
    _, model, inputs = made("wan")
    sparsereel.sparsify(model, NEAR)
    theirs = Scaled()
    model.blocks[1].attn1.set_processor(theirs)
    tiny.run(model, inputs)
    rows = list(sparsereel.report(model))
    assert [row.replaced for row in rows] == [True, False, True]
    assert "exchanged for Scaled" in rows[1].reason
    sparsereel.restore(model)
    assert model.blocks[1].attn1.processor is theirs


def test_processors_taken_away_while_sparse_work_after_restore(tiny, made):
    """Some code keeps `attn_processors` and puts them back later (PAG pipelines, fused projections)."""
    for name in ("wan", "cogvideox", "unet"):
        _, model, inputs = made(name)
        before = tiny.run(model, inputs)
        sparsereel.sparsify(model, NEAR)
        kept = model.attn_processors
        sparsereel.restore(model)
        model.set_attn_processor(kept)
        assert torch.equal(tiny.run(model, inputs), before)


@pytest.mark.parametrize("name", ["wan", "unet"])
def test_processors_made_anew_from_their_class(tiny, made, name):
    """Loading an IP adapter gives self-attention new processors of the class that it finds."""
    case, model, inputs = made(name)
    before = tiny.run(model, inputs)
    sparsereel.sparsify(model, NEAR)
    model.set_attn_processor({key: p.__class__() for key, p in model.attn_processors.items()})
    assert torch.equal(tiny.run(model, inputs), before)
    report = sparsereel.report(model)
    assert report.replaced == 0
    assert all("exchanged for" in row.reason for row in report)
    sparsereel.restore(model)
    assert torch.equal(tiny.run(model, inputs), before)
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = tiny.run(model, inputs)
    with sparsereel.sparsified(model, NEAR):
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "unet"])
def test_fused_projections(tiny, made, name):
    case, model, inputs = made(name)
    model.fuse_qkv_projections()
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids) as masked:
        expected = tiny.run(model, inputs)
    assert masked
    with sparsereel.sparsified(model, NEAR):
        actual = tiny.run(model, inputs)
        assert sparsereel.report(model).replaced == case.layers
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ copies and files


@SEAMS
def test_a_deep_copy_is_independent(tiny, made, name):
    _, model, inputs = made(name)
    before = tiny.run(model, inputs)
    sparsereel.sparsify(model, NEAR)
    sparse = tiny.run(model, inputs)
    for kept_is_copy in (False, True):
        twin = copy.deepcopy(model)
        gone, kept = (model, twin) if kept_is_copy else (twin, model)
        assert torch.equal(tiny.run(twin, inputs), sparse)
        calls = sparsereel.report(kept).layers[0].calls
        sparsereel.restore(gone)
        assert torch.equal(tiny.run(gone, inputs), before)
        assert torch.equal(tiny.run(kept, inputs), sparse)
        assert sparsereel.report(kept).layers[0].calls == calls + 1
        assert sparsereel.report(kept).layers[0].dense_calls == 0
        sparsereel.restore(kept)
        assert torch.equal(tiny.run(kept, inputs), before)
        assert not registered()
        del twin, gone
        model = kept
        sparsereel.sparsify(model, NEAR)
    sparsereel.restore(model)


def test_a_copied_pipeline_counts_its_own_steps(tiny):
    pipe, _ = tiny.cogvideox_pipe(diffusers.CogVideoXDDIMScheduler())
    sparsereel.sparsify(pipe, NEAR)
    twin = copy.deepcopy(pipe)
    noise = torch.zeros(1, 2, 4, 4, 4)
    pipe.scheduler.set_timesteps(4)
    twin.scheduler.set_timesteps(7)
    twin.scheduler.step(noise, twin.scheduler.timesteps[0], noise)
    found = [p.transformer._sparsereel_injection.runtime.steps.current(p.transformer) for p in (pipe, twin)]
    assert [(step.index, step.total) for step in found] == [(0, 4), (1, 7)]
    sparsereel.restore(twin)
    assert "step" not in vars(twin.scheduler)
    assert "step" in vars(pipe.scheduler)
    sparsereel.restore(pipe)
    assert "step" not in vars(pipe.scheduler)


@SEAMS
def test_saving_while_sparse_writes_the_same_files(tiny, made, tmp_path, name):
    _, model, _ = made(name)
    model.save_pretrained(tmp_path / "before")
    sparsereel.sparsify(model, NEAR)
    model.save_pretrained(tmp_path / "during")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "during").iterdir())
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "during" / file).read_bytes()


def test_changing_the_dtype_after_sparsify(tiny, made):
    case, model, inputs = made("cogvideox")
    sparsereel.sparsify(model, NEAR)
    model.to(torch.bfloat16)
    cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    sparse = tiny.run(model, cast)
    assert sparse.dtype == torch.bfloat16
    assert sparsereel.report(model).layers[0].dense_calls == 0
    sparsereel.restore(model)
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = tiny.run(model, cast)
    torch.testing.assert_close(sparse.float(), expected.float(), rtol=0.1, atol=0.1)


# ------------------------------------------------------------------ LoRA and offloading


def test_lora_added_before_and_after(tiny, made):
    peft = pytest.importorskip("peft")
    case, model, inputs = made("wan")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    sparsereel.sparsify(model, NEAR)
    plain = tiny.run(model, inputs)
    model.add_adapter(config)
    sparse = tiny.run(model, inputs)
    assert (sparse - plain).abs().max() > 1e-3
    sparsereel.restore(model)
    with tiny.dense_under(tiny.same_mask(NEAR), case.grids):
        expected = tiny.run(model, inputs)
    torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=1e-4)
    with sparsereel.sparsified(model, NEAR):
        torch.testing.assert_close(tiny.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
        model.delete_adapters("default")
        torch.testing.assert_close(tiny.run(model, inputs), plain, rtol=1e-4, atol=1e-4)


def test_lora_loaded_into_a_sparse_pipeline(tiny, tmp_path):
    pytest.importorskip("peft")
    pipe, _ = tiny.wan_pipe(diffusers.FlowMatchEulerDiscreteScheduler())
    g = torch.Generator().manual_seed(1)
    weights = {
        f"transformer.blocks.{i}.attn1.{p}.lora_{side}.weight": torch.randn(shape, generator=g) * 0.1
        for i in range(3)
        for p in ("to_q", "to_k")
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    sparsereel.sparsify(pipe, NEAR)
    plain = tiny.run(pipe.transformer, tiny.CASES["wan"].inputs())
    pipe.load_lora_weights(weights)
    sparse = tiny.run(pipe.transformer, tiny.CASES["wan"].inputs())
    assert (sparse - plain).abs().max() > 1e-3
    assert sparsereel.report(pipe).replaced == 3
    pipe.unload_lora_weights()
    torch.testing.assert_close(tiny.run(pipe.transformer, tiny.CASES["wan"].inputs()), plain)
    sparsereel.restore(pipe)


@SEAMS
def test_accelerate_offload_hooks(tiny, made, name):
    """What `enable_model_cpu_offload` puts on a model, with the CPU as the device it computes on."""
    accelerate = pytest.importorskip("accelerate")
    _, model, inputs = made(name)
    expected_model = copy.deepcopy(model)
    with sparsereel.sparsified(expected_model, NEAR):
        expected = tiny.run(expected_model, inputs)
    before = tiny.run(model, inputs)
    sparsereel.sparsify(model, NEAR)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    assert torch.equal(tiny.run(model, inputs), expected)
    hook.remove()
    assert torch.equal(tiny.run(model, inputs), expected)
    sparsereel.restore(model)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    sparsereel.sparsify(model, NEAR)
    assert torch.equal(tiny.run(model, inputs), expected)
    sparsereel.restore(model)
    assert torch.equal(tiny.run(model, inputs), before)


@SEAMS
def test_group_offload(tiny, made, name):
    _, model, inputs = made(name)
    with sparsereel.sparsified(model, NEAR):
        expected = tiny.run(model, inputs)
    device = torch.device("cpu")
    model.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")
    with sparsereel.sparsified(model, NEAR):
        assert torch.equal(tiny.run(model, inputs), expected)
        assert sparsereel.report(model).layers[0].dense_calls == 0


@pytest.mark.gpu
def test_model_cpu_offload(tiny):
    pipe, call = tiny.wan_pipe(diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.to("cuda")
    sparsereel.sparsify(pipe, NEAR)
    options = {**call, "num_inference_steps": 3}
    expected = pipe(**options, generator=torch.Generator().manual_seed(0)).frames
    pipe.enable_model_cpu_offload()
    actual = pipe(**options, generator=torch.Generator().manual_seed(0)).frames
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=1e-3, atol=1e-3)
    assert sparsereel.report(pipe).density < 1
