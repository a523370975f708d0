"""Causal checkpoints of the Self-Forcing family, on a synthetic one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sparsereel.stream.causal_checkpoint import load_causal_transformer

#: diffusers' part of a name, and that of Wan's own repository
ORIGINAL = {
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "norm2.": "norm3.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}


def original_name(name):
    for ours, theirs in ORIGINAL.items():
        name = name.replace(ours, theirs)
    if name == "scale_shift_table":
        return "head.modulation"
    return name.replace("scale_shift_table", "modulation")


@pytest.fixture(scope="module")
def model(streams):
    return streams.pipe().transformer


@pytest.mark.parametrize("wrapper", ["", "model.", "generator_ema.model._fsdp_wrapped_module."])
def test_names_of_wans_repository_are_understood(model, tmp_path, wrapper):
    weights = {wrapper + original_name(name): x.contiguous() for name, x in model.state_dict().items()}
    assert wrapper + "blocks.1.self_attn.q.weight" in weights
    if wrapper.startswith("generator_ema"):
        weights |= {name.replace("generator_ema", "generator"): torch.zeros_like(x) for name, x in weights.items()}
    save_file(weights, tmp_path / "c.safetensors")
    loaded = load_causal_transformer(tmp_path / "c.safetensors", head_dim=24)
    latents, text = torch.randn(1, 16, 3, 2, 2), torch.randn(1, 16, 128)
    with torch.no_grad():
        found, expected = (m(latents, torch.tensor([500.0]), text, return_dict=False)[0] for m in (loaded, model))
    assert torch.equal(found, expected)


def test_a_folder_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert torch.equal(load_causal_transformer(tmp_path).proj_out.weight, model.proj_out.weight)


def test_what_does_not_fit_is_named(model, tmp_path):
    weights = {original_name(name): x.contiguous() for name, x in model.state_dict().items()}
    del weights["blocks.1.ffn.0.bias"]
    save_file(weights, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.net\.0\.proj\.bias does not fit"):
        load_causal_transformer(tmp_path / "c.safetensors", head_dim=24)
    save_file({"x": torch.zeros(1)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_causal_transformer(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="that exists, got"):
        load_causal_transformer(tmp_path / "nothing.pt")
    (tmp_path / "e.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        load_causal_transformer(tmp_path / "e.safetensors")
