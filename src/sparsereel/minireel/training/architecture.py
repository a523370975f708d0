"""The parts of minireel before training: transformer, VAE, text encoder, tokenizer, scheduler.

All are stock diffusers and transformers classes, so that the trained folder loads with stock `WanPipeline`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from sparsereel_eval.digits import WORDS

LATENT_CHANNELS = 16
TEXT_WIDTH = 128
# Time shift of the sampler: more of the steps are spent at high noise, where a clip's layout is decided.
SAMPLING_SHIFT = 4.0


def build_transformer(layers: int = 6, heads: int = 8, head_dim: int = 32) -> WanTransformer3DModel:
    """A Wan transformer with patch 1 x 1 x 1, started as a plain pre-norm transformer: open gates, small branches."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=4 * heads * head_dim,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )
    with torch.no_grad():
        model.condition_embedder.time_proj.weight.mul_(0.3)
        model.condition_embedder.time_proj.bias.zero_()
        for block in model.blocks:
            block.scale_shift_table.zero_()
            # Rows 2 and 5 are the gates of self-attention and feed-forward.
            block.scale_shift_table[:, 2] = 1
            block.scale_shift_table[:, 5] = 1
            for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
                torch.nn.init.normal_(last.weight, std=0.5 / math.sqrt(2 * layers * last.in_features))
                last.bias.zero_()
        model.scale_shift_table.zero_()
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    return model


def build_vae(width: int = 32) -> AutoencoderKLWan:
    """A Wan 2.2 style VAE (residual shortcuts, 2 x 2 pixel unshuffle) that compresses 8 x 8 pixels and 4 frames."""
    vae = AutoencoderKLWan(
        base_dim=width,
        decoder_base_dim=width,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            # The parameter-free shortcuts carry the first steps.
            module.conv2.weight.data.mul_(0.1)
    return vae


def build_text_encoder(layers: int = 2) -> UMT5EncoderModel:
    """A small UMT5 encoder, trained together with the transformer."""
    config = UMT5Config(
        vocab_size=64,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_tokenizer(words: Sequence[str] = WORDS, longest: int = 512) -> PreTrainedTokenizerFast:
    """One token a word, lower case, `</s>` at the end (so that the empty prompt has one token).

    Args:
        words: Those it knows.
        longest: Tokens of the longest prompt.
    """
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # "an orange 3" is good English and means what "a orange 3", seen in training, means.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\ban\b"), "a")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=longest
    )


def export(
    folder: Path,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    vae: AutoencoderKLWan,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a folder that stock `WanPipeline` loads; weights are stored in `dtype` as safetensors."""
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=cast(text_encoder, build_text_encoder(text_encoder.config.num_layers), dtype),
        vae=cast(vae, AutoencoderKLWan.from_config(vae.config), dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SAMPLING_SHIFT),
        transformer=cast(transformer, WanTransformer3DModel.from_config(transformer.config), dtype),
    )
    write_pipeline(pipeline, folder)


def write_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline with a word tokenizer so that transformers 4 and 5 load it."""
    pipeline.save_pretrained(folder)
    # transformers 5 writes a class name that 4 does not know; both know this one.
    for name, changes in (
        ("model_index.json", {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def export_transformer(folder: Path, transformer: WanTransformer3DModel, dtype: torch.dtype = torch.float16) -> None:
    """Write the transformer alone, stored in `dtype`: a folder for `WanTransformer3DModel.from_pretrained`."""
    # Where the weights once lay says nothing to others.
    config = {key: value for key, value in transformer.config.items() if key != "_name_or_path"}
    stored: WanTransformer3DModel = cast(transformer, WanTransformer3DModel.from_config(config), dtype)
    stored.save_pretrained(folder)


def cast(trained: torch.nn.Module, copy: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """`copy` with the trained weights in another dtype; the trained module stays as it is."""
    copy.load_state_dict(trained.state_dict())
    return copy.to(dtype)
