"""`sparsify` on models whose tokens diffusers spreads over processes (`enable_parallelism`): two give what one gives.

All cases run in one start of two processes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsereel
from sparsereel import AttentionPlan
from sparsereel.patterns import Full, Neighborhood, Sharded, SlidingTile
from sparsereel.report import LayerReport
from sparsereel.selectors import BlockTopk

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSES = 2
ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}
#: name: model, plan, how tokens are spread
CASES = {
    "near": ("wan", "near", ULYSSES),
    "a pattern a head": ("wan", "different", ULYSSES),
    "heads that know their number": ("wan", "sharded", ULYSSES),
    "tiles": ("wan", "tiles", ULYSSES),
    "selector": ("wan", "topk", ULYSSES),
    "compensated selector": ("wan", "mean key", ULYSSES),
    "full": ("wan", "full", ULYSSES),
    "odd number of tokens": ("wan odd", "different", {**ULYSSES, "ulysses_anything": True}),
    "a ring": ("wan", "different", RING),
    "a ring in numbered heads": ("wan", "sharded", RING),
    "a ring with an odd number of tokens": ("wan odd", "different", {**RING, "ring_anything": True}),
    "text across": ("ltx", "different", ULYSSES),
    "joint text": ("flux", "different", ULYSSES),
    "joint text, second version": ("flux2", "different", ULYSSES),
}
#: what stays dense, with the reason
DENSE = {
    "selectors in a ring": ("wan", "topk", RING, "ulysses_degree"),
    "joint text in a ring": ("flux", "near", RING, "ulysses_degree"),
    "unknown family": ("qwen_image", "near", ULYSSES, "context parallelism is not understood"),
}


DIFFERENT = {
    "version": 1,
    "keep_sinks": False,
    "patterns": {"near": {"neighborhood": {"window": [1, 3, 3]}}, "wide": {"neighborhood": {"window": [3, 1, 5]}}},
    "components": {"transformer": {"layers": {"*": {"default": "near", "heads": {"1": "wide"}}}}},
    "schedule": {"dense_first": 0, "min_tokens": 0, "max_density": 1.0},
}
FREE = {"dense_first": 0, "min_tokens": 0, "max_density": 1.0, "keep_sinks": False}
PLANS = {
    "near": AttentionPlan.uniform(Neighborhood((1, 3, 3)), **FREE),
    "different": AttentionPlan.from_dict(DIFFERENT),
    "sharded": AttentionPlan.uniform(Sharded(run=8, local=1, stride=4), **FREE),
    "tiles": AttentionPlan.uniform(SlidingTile((1, 3, 3), (2, 4, 4)), **FREE),
    "topk": AttentionPlan.uniform(BlockTopk(0.4), **FREE),
    "mean key": AttentionPlan.uniform(BlockTopk(0.4), compensation="mean_key", **FREE),
    "full": AttentionPlan.uniform(Full(), **FREE),
}


def load(name: str):
    """A module beside this file: tests are no packages."""
    spec = importlib.util.spec_from_file_location(f"sparsereel_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def model_and_inputs(name: str):
    """A tiny model and a batch of two."""
    if name.startswith("wan"):
        tiny = load("tiny_models")
        size = {"frames": 3, "height": 18, "width": 22} if name == "wan odd" else {}
        return tiny.CASES["wan"].model(), tiny.wan_inputs(**size)
    load("family_cases")
    family = {**load("family_videos").VIDEO_FAMILIES, **load("family_images").IMAGE_FAMILIES}[name]
    inputs = family.inputs(family.shapes[0])
    if name == "ltx":
        # diffusers repeats this mask for all heads, where a process has some.
        inputs["encoder_attention_mask"] = None
    if name == "flux2":
        # As its pipeline hands them; diffusers splits these only.
        inputs |= {key: inputs[key][None].expand(2, -1, -1) for key in ("img_ids", "txt_ids")}
    return family.model(), inputs


def run(model, inputs) -> torch.Tensor:
    """One forward pass."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def in_one(name: str, plan: str) -> torch.Tensor:
    """What one process gives."""
    model, inputs = model_and_inputs(name)
    with sparsereel.sparsified(model, PLANS[plan], backend="torch") as report:
        assert report.layers
        return run(model, inputs)


def spread(name: str, plan: str, config: dict, first: str = "parallelism"):
    """What this process of two gives, its report, and what it gives after `restore`.

    The dense rings of diffusers need log-sum-exps, which its attention on CPUs does not give: None stands for those.
    """
    from diffusers import ContextParallelConfig

    model, inputs = model_and_inputs(name)
    if first == "plan":
        sparsereel.sparsify(model, PLANS[plan], backend="torch")
    model.enable_parallelism(config=ContextParallelConfig(**config))
    if first == "parallelism":
        sparsereel.sparsify(model, PLANS[plan], backend="torch")
    found = run_if_possible(model, inputs)
    rows = list(sparsereel.report(model).layers)
    sparsereel.restore(model)
    return found, rows, run_if_possible(model, inputs)


def run_if_possible(model, inputs) -> torch.Tensor | None:
    """One forward pass, or None where it is one of diffusers' rings."""
    try:
        return run(model, inputs)
    except ValueError as error:
        if "return_lse" not in str(error):
            raise
        return None


def refused() -> str:
    """What an extended model says."""
    from diffusers import ContextParallelConfig

    model, inputs = model_and_inputs("wan")
    sparsereel.sparsify(model, PLANS["near"])
    model.enable_parallelism(config=ContextParallelConfig(**ULYSSES))
    sparsereel.inject.injection_of(model).runtime.perturbing = object()
    try:
        run(model, inputs)
    except ValueError as error:
        return str(error)
    return ""


def gather_uneven(tensor: torch.Tensor, dim: int, group) -> torch.Tensor:
    """diffusers' gather of shards that differ in length: gloo, other than NCCL, wants them equal."""
    parts = [None] * PROCESSES
    torch.distributed.all_gather_object(parts, tensor, group=group)
    return torch.cat(parts, dim)


def work(folder: Path) -> None:
    """One of the processes."""
    from diffusers.hooks import context_parallel

    context_parallel._all_gather_anything = gather_uneven
    torch.set_num_threads(1)
    # diffusers counts accelerators, asks for one a process, and keeps lengths there.
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.current_accelerator = lambda *args, **kwargs: torch.device("cpu")
    torch.distributed.init_process_group("gloo")
    found = {name: spread(*case) for name, case in CASES.items()}
    found["planned first"] = spread("wan", "different", ULYSSES, "plan")
    found |= {name: spread(*case[:3]) for name, case in DENSE.items()}
    tensors, rows = {}, {}
    for name, (out, rows_of_case, restored) in found.items():
        rows[name] = [asdict(row) for row in rows_of_case]
        tensors |= {
            f"{name}/{part}": x.contiguous() for part, x in (("out", out), ("restored", restored)) if x is not None
        }
    rank = torch.distributed.get_rank()
    save_file(tensors, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps({"rows": rows, "refused": refused()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory, gloo_processes):
    """What each process found."""
    folder = tmp_path_factory.mktemp("parallel")
    gloo_processes(__file__, folder, PROCESSES, timeout=240)
    return [stored(folder, rank) for rank in range(PROCESSES)]


def stored(folder: Path, rank: int):
    """What `work` wrote: (output, rows of the report, output once restored) by case, and what was refused."""
    tensors, told = load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text())
    found = {
        name: (tensors.get(f"{name}/out"), [LayerReport(**row) for row in rows], tensors.get(f"{name}/restored"))
        for name, rows in told["rows"].items()
    }
    return found, told["refused"]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(results, name):
    model, plan, _ = CASES[name]
    expected = in_one(model, plan)
    for found, _ in results:
        out, rows, _ = found[name]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert all(row.replaced for row in rows)
        if plan != "full":
            assert (out - run(*model_and_inputs(model))).abs().max() > 1e-3
    if plan != "full":
        # A picture is one frame: the process whose only head sees its own frame sees everything there.
        whole = all if model.startswith(("wan", "ltx")) else any
        for same in zip(*(found[name][1] for found, _ in results), strict=True):
            assert whole(row.dense_calls == 0 and row.token_density < 1 for row in same)


def test_parallelism_may_be_enabled_after_sparsify(results):
    expected = in_one("wan", "different")
    for found, _ in results:
        torch.testing.assert_close(found["planned first"][0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "ring_degree" not in case[2]])
def test_restored_models_are_dense(results, name):
    model, inputs = model_and_inputs(CASES[name][0])
    expected = run(model, inputs)
    for found, _ in results:
        torch.testing.assert_close(found[name][2], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_what_is_not_understood_stays_dense_and_is_said(results, name):
    model, inputs = model_and_inputs(DENSE[name][0])
    expected = run(model, inputs)
    for found, _ in results:
        out, rows, _ = found[name]
        if "ring_degree" not in DENSE[name][2]:
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        reached = [row for row in rows if row.calls]
        assert reached
        assert all(DENSE[name][3] in row.reason and row.density == 1 for row in reached)


def test_perturbed_heads_are_refused(results):
    assert all("do not go with context parallelism" in said for _, said in results)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
