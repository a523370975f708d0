"""ministill's recipe on tiny settings: every stage runs, learns a little, and resumes exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sparsereel import ministill
from sparsereel.minireel.training import loop
from sparsereel.ministill import train
from sparsereel.ministill.training import vae_stage
from sparsereel.ministill.training.architecture import (
    WORDS,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    tokenise,
)
from sparsereel.ministill.training.pictures import EncodedSet, draw, encode_set
from sparsereel.ministill.training.recipe import PictureSet
from sparsereel.ministill.training.unet_stage import UNetTrainer
from sparsereel.ministill.training.vae_stage import VaeTrainer, render_pool, standardise_latents
from sparsereel_eval.stills import sample_still

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_unet_trainer() -> UNetTrainer:
    torch.manual_seed(0)
    # Plain latents, a value a channel: what a tiny network can learn in seconds.
    latents = torch.randn(4, 4, 1, 1).expand(4, 4, 16, 16).half()
    data = EncodedSet(latents, tokenise([f"a red {digit} on navy" for digit in range(4)]))
    close_ups = EncodedSet(-latents, data.ids)
    models = build_unet((8, 8, 16, 16)), build_text_encoder(1)
    return UNetTrainer(data, *models, batch=2, close_ups=close_ups, close_after=1)


def tiny_vae_trainer() -> VaeTrainer:
    torch.manual_seed(0)
    return VaeTrainer(build_vae((8, 16, 16)), render_pool(3, seed=0))


@pytest.mark.parametrize("make", [tiny_unet_trainer, tiny_vae_trainer])
def test_an_interrupted_run_resumes_exactly(make, tmp_path, monkeypatch):
    monkeypatch.setattr(vae_stage, "CROPS", ((0.5, (32, 2)), (1.01, (64, 1))))
    straight = make()
    assert loop.run(straight, "straight", tmp_path / "straight.safetensors", steps=4)

    stopped = make()
    step = stopped.step

    def step_twice(progress):
        if stopped.steps == 2:
            raise KeyboardInterrupt
        step(progress)

    monkeypatch.setattr(stopped, "step", step_twice)
    assert not loop.run(stopped, "stopped", tmp_path / "resumed.safetensors", steps=4)
    resumed = make()
    assert loop.run(resumed, "resumed", tmp_path / "resumed.safetensors", steps=4)

    assert resumed.losses == straight.losses
    tensors, expected = resumed.state()[0], straight.state()[0]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_training_lowers_the_loss_at_every_level():
    trainer = tiny_unet_trainer()
    before = trainer.held_out_loss(trainer.data)
    for index in range(60):
        trainer.step(index / 60)
    after = trainer.held_out_loss(trainer.data)
    assert all(after[level] < before[level] for level in before)


def test_close_ups_join_where_the_layout_is_decided():
    trainer = tiny_unet_trainer()
    levels = torch.arange(100).repeat_interleave(10) * 10
    clean, ids = torch.zeros(1000, 4, 16, 16), torch.zeros(1000, 12, dtype=torch.long)
    latents, prompts = trainer._bring_close(clean, ids, levels)
    close = latents.abs().amax((1, 2, 3)) > 0
    assert torch.equal(close, prompts.amax(1) > 0)
    assert not close[levels >= 600].any()
    assert close[levels < 600].float().mean() == pytest.approx(0.5, abs=0.1)


def test_close_ups_show_strokes():
    pictures = list(draw(PictureSet("close", 12, seed=0, sides=(2, 4))))
    assert all(pixels.shape == (3, 64, 64) and prompt.startswith("a ") for pixels, prompt in pictures)
    # The inside of a large 0 may fill a window.
    assert sum(bool(pixels.std((1, 2)).max() > 0.1) for pixels, _ in pictures) >= 10


def test_the_last_level_holds_no_signal():
    scheduler = build_scheduler()
    assert scheduler.alphas_cumprod[-1] == pytest.approx(0, abs=1e-6)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


def test_standard_latents_decode_as_before():
    torch.manual_seed(0)
    vae = build_vae((8, 16, 16)).eval()
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
        deviation = vae.encode(pictures).latent_dist.std
        standardise_latents(vae, 4, seed=0)
        after = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
        drawn = vae.encode(torch.stack([vae_stage.to_pixels(still) for still in stills(4)])).latent_dist
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert drawn.mode().mean((0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(drawn.mode().std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=1e-3)
    assert not torch.equal(vae.encode(pictures).latent_dist.std, deviation)


def stills(count: int) -> list:
    """What `standardise_latents` measures with seed 0."""
    rng = np.random.default_rng(0)
    return [sample_still(rng, 64) for _ in range(count)]


def test_a_set_is_encoded_once(tmp_path):
    torch.manual_seed(0)
    vae, spec, done = build_vae((8, 16, 16)).eval(), PictureSet("tiny", 3, seed=0), []
    first = encode_set(spec, vae, tmp_path, done.append)
    assert first.latents.shape == (3, 4, 16, 16)
    assert done == [3]
    again = encode_set(spec, vae, tmp_path, lambda count: pytest.fail("encoded twice"))
    assert torch.equal(first.latents, again.latents)


def test_stages_end_in_a_pipeline_folder(tmp_path):
    """The command on tiny sets; the result loads with stock diffusers, and runs."""
    assert train.main(["--output", str(tmp_path), "--steps", "1", "--pictures", "8"]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red 3 on navy", num_inference_steps=1, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt"))
    assert ministill.load(weights=tmp_path / "pipeline").unet.config.sample_size == 16


def test_wrong_use_is_one_sentence(tmp_path, capsys):
    assert train.main(["--output", str(tmp_path), "--stage", "unet", "--steps", "1"]) == 2
    assert "run --stage vae first" in capsys.readouterr().err
    assert train.main(["--output", str(tmp_path), "--steps", "1", "--minutes", "1"]) == 2
    assert "not both" in capsys.readouterr().err


def test_the_tokenizer_knows_the_world():
    tokenizer = build_tokenizer()
    assert tokenizer.unk_token_id not in tokenizer(list(WORDS)).input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    assert tokenizer("an orange 3 on navy").input_ids == tokenizer("a orange 3 on navy").input_ids
