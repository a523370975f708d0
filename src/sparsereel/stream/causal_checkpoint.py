"""Causal transformers made of Wan weights, from a folder of diffusers' format or one safetensors file.

Files of the Self-Forcing family (Self-Forcing, CausVid, LongLive, Rolling Forcing) use the names of Wan's repository:

    blocks.N.self_attn.{q,k,v,o,norm_q,norm_k}    ->  blocks.N.attn1.{to_q,to_k,to_v,to_out.0,norm_q,norm_k}
    blocks.N.cross_attn.*                         ->  blocks.N.attn2.*
    blocks.N.norm3                                ->  blocks.N.norm2
    blocks.N.ffn.{0,2}                            ->  blocks.N.ffn.net.{0.proj,2}
    blocks.N.modulation, head.modulation          ->  blocks.N.scale_shift_table, scale_shift_table
    text_embedding.{0,2}                          ->  condition_embedder.text_embedder.linear_{1,2}
    time_embedding.{0,2}, time_projection.1       ->  condition_embedder.time_embedder.linear_{1,2}, .time_proj
    head.head                                     ->  proj_out

after the wrappers `generator_ema.`, `generator.`, `model.` and `_fsdp_wrapped_module.` are taken off.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WRAPPERS = re.compile(
    r"^(generator_ema\.|generator\.|model\.|_fsdp_wrapped_module\.|module\.)+|_fsdp_wrapped_module\."
)
_RENAMES = [
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(\.attn[12])\.(q|k|v)\.", r"\1.to_\2."),
    (r"(\.attn[12])\.o\.", r"\1.to_out.0."),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
]


def diffusers_name(name: str) -> str:
    """A weight's name in diffusers' `WanTransformer3DModel`; names that are diffusers' own stay."""
    name = _WRAPPERS.sub("", name)
    for old, new in _RENAMES:
        name = re.sub(old, new, name)
    return name


def load_causal_transformer(path: str | Path, dtype: torch.dtype = torch.float32, head_dim: int = 128) -> Any:
    """A `WanTransformer3DModel` from a folder of diffusers' format or one safetensors file.

        pipe.transformer = load_causal_transformer("self_forcing_dmd.safetensors", torch.bfloat16)
        causal = CausalModel(chunk=3, window=21, timesteps=(1000, 750, 500, 250), shift=5.0, guidance=1.0)
        sparsereel.stream(pipe, "...", causal=causal, method="deep-forcing")

    Args:
        head_dim: channels a head; a file does not say. Wan's own is 128.

    Raises:
        ValueError: no such file or folder, another format than safetensors, or weights that are not those of a Wan
            transformer; the first name that does not fit is given.
    """
    from diffusers import WanTransformer3DModel

    where = Path(path).expanduser()
    if where.is_dir():
        if not (where / "config.json").is_file():
            raise ValueError(f"{where} holds no transformer: it has no config.json")
        return WanTransformer3DModel.from_pretrained(where, torch_dtype=dtype, use_safetensors=True).eval()
    if where.suffix != ".safetensors" or not where.is_file():
        raise ValueError(f"a causal checkpoint is a folder or a .safetensors file that exists, got {where}")
    weights = _read(where)
    model = WanTransformer3DModel(**_config(weights, head_dim, where))
    wanted = model.state_dict()
    wrong = [name for name in {**weights, **wanted} if name not in weights or name not in wanted]
    wrong += [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    if wrong:
        raise ValueError(f"{where} does not hold the weights of a Wan transformer: {sorted(wrong)[0]} does not fit")
    model.load_state_dict(weights)
    return model.to(dtype).eval()


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    # Where a file holds both, the averaged weights are the ones to use.
    if any(name.startswith("generator_ema.") for name in found):
        found = {name: x for name, x in found.items() if name.startswith("generator_ema.")}
    return {diffusers_name(name): x for name, x in found.items()}


def _config(weights: dict[str, Tensor], head_dim: int, path: Path) -> dict[str, Any]:
    """The model's sizes, read from shapes."""
    try:
        patch = weights["patch_embedding.weight"]
        volume = patch.shape[2] * patch.shape[3] * patch.shape[4]
        layers = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
        return {
            "patch_size": tuple(patch.shape[2:]),
            "num_attention_heads": patch.shape[0] // head_dim,
            "attention_head_dim": head_dim,
            "in_channels": patch.shape[1],
            "out_channels": weights["proj_out.weight"].shape[0] // volume,
            "text_dim": weights["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": weights["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "ffn_dim": weights["blocks.0.ffn.net.0.proj.weight"].shape[0],
            "num_layers": len(layers),
            "cross_attn_norm": "blocks.0.norm2.weight" in weights,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} does not hold the weights of a Wan transformer: no {error}") from error
