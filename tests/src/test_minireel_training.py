"""The training recipe on tiny settings: every stage runs, learns a little, and resumes exactly."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from sparsereel import minireel
from sparsereel.arithmetic import arithmetic
from sparsereel.minireel import train
from sparsereel.minireel.training import checkpoint, loop, stages, vae_stage
from sparsereel.minireel.training.architecture import build_text_encoder, build_tokenizer, build_transformer, build_vae
from sparsereel.minireel.training.attention import use_kernels
from sparsereel.minireel.training.clip_sets import ClipSet, EncodedSet, encode_set, tokenise
from sparsereel.minireel.training.flow_matching import flow_loss, predict_tokens, sample_noise_levels
from sparsereel.minireel.training.layouts import START
from sparsereel.minireel.training.optim import MovingAverage, Muon, orthogonalise, warm_up_and_decay
from sparsereel.minireel.training.recipe import Portion, Stage
from sparsereel.minireel.training.transformer_stage import TransformerTrainer
from sparsereel.minireel.training.vae_stage import VaeTrainer, held_out_psnr, render_pool
from sparsereel_eval.digits import WORDS

CLIPS = ClipSet("tiny", count=3, frames=5, height=32, width=32, two=0.0, seed=0)


def tiny_trainer(seed: int = 0, **portion) -> TransformerTrainer:
    torch.manual_seed(0)
    # Plain latents, a value a channel: what a tiny network can learn in seconds.
    latents = torch.randn(1, 16, 1, 1, 1).expand(3, 16, 2, 4, 4).half()
    data = EncodedSet(CLIPS, latents, *tokenise([clip.prompt for clip in CLIPS.clips()]))
    stage = Stage("tiny", 1, (Portion(CLIPS, batch=2, share=1.0, **portion),), 1e-3, 1e-3, 0.5, CLIPS)
    transformer = build_transformer(layers=1, heads=2, head_dim=16)
    return TransformerTrainer(stage, {"tiny": data}, transformer, build_text_encoder(1), seed)


def tiny_vae_trainer() -> VaeTrainer:
    torch.manual_seed(0)
    return VaeTrainer(build_vae(width=8), render_pool(2, seed=0))


@pytest.mark.parametrize("make", [tiny_trainer, tiny_vae_trainer])
def test_an_interrupted_run_resumes_exactly(make, tmp_path, monkeypatch):
    monkeypatch.setattr(vae_stage, "CROPS", ((1.01, ((32, 1, 2), (32, 5, 1))),))
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

    assert resumed.steps == straight.steps == 4
    assert resumed.losses == straight.losses
    tensors, expected = resumed.state()[0], straight.state()[0]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_finished_run_is_left_alone(tmp_path):
    path = tmp_path / "done.safetensors"
    loop.run(tiny_trainer(), "first", path, steps=1)
    written = path.stat().st_mtime_ns
    assert loop.run(tiny_trainer(), "again", path, steps=1)
    assert path.stat().st_mtime_ns == written


def test_the_budget_is_checked(tmp_path):
    for budget in ({}, {"minutes": 1.0, "steps": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match="either minutes or steps"):
            loop.run(tiny_trainer(), "none", tmp_path / "x.safetensors", **budget)


def test_training_lowers_the_loss():
    trainer = tiny_trainer(long_text=0.2)
    data = trainer.sets["tiny"]
    before = trainer.held_out_loss(data)
    for index in range(60):
        trainer.step(index / 60)
    after = trainer.held_out_loss(data)
    assert all(after[level] < before[level] for level in before)


def test_the_loss_sees_what_the_stock_model_sees():
    torch.manual_seed(0)
    model = build_transformer(layers=2, heads=2, head_dim=16)
    torch.nn.init.normal_(model.proj_out.weight)
    latents, text, levels = torch.randn(2, 16, 3, 5, 7), torch.randn(2, 4, 128), torch.tensor([0.2, 0.9])
    whole = predict_tokens(model, latents, levels, text)
    stock = model(latents, 1000 * levels, text, return_dict=False)[0]
    torch.testing.assert_close(whole, stock.flatten(2).transpose(1, 2))
    clean = torch.full_like(latents, 0.5)
    noise = (latents - (1 - levels.view(2, 1, 1, 1, 1)) * clean) / levels.view(2, 1, 1, 1, 1)
    expected = (stock - (noise - clean)).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(flow_loss(model, clean, noise, levels, text), expected, rtol=1e-4, atol=1e-4)


def test_the_kernels_see_what_stock_attention_sees():
    """Outputs and gradients of a model on the kernels equal those of diffusers' own attention."""
    torch.manual_seed(0)
    stock = build_transformer(layers=2, heads=2, head_dim=16)
    torch.nn.init.normal_(stock.proj_out.weight)
    ours = copy.deepcopy(stock)
    use_kernels(ours)
    clean, noise, text = torch.randn(2, 16, 3, 5, 7), torch.randn(2, 16, 3, 5, 7), torch.randn(2, 4, 128)
    losses = [flow_loss(model, clean, noise, torch.tensor([0.2, 0.9]), text) for model in (ours, stock)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.sum().backward()
    for mine, theirs in zip(ours.blocks.parameters(), stock.blocks.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item())


def test_the_kernels_refuse_other_attention():
    model = build_transformer(layers=1, heads=2, head_dim=16)
    use_kernels(model)
    with pytest.raises(ValueError, match="self-attention with rotary"):
        model.blocks[0].attn1(torch.randn(1, 4, 32), torch.randn(1, 3, 32))


def test_noise_levels_cover_the_range():
    levels = sample_noise_levels(4000, torch.Generator().manual_seed(0), shift=5.0)
    assert 0 < levels.min() < 0.1
    assert 0.99 < levels.max() < 1
    assert levels.median() > 0.75


def test_orthogonalise_flattens_the_spectrum():
    matrices = torch.randn(3, 16, 40)
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_moves_by_its_rate():
    parameter = torch.nn.Parameter(torch.zeros(8, 4, 3, 3))
    parameter.grad = torch.randn(8, 4, 3, 3)
    Muon([parameter]).step(0.1)
    assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.02, rel=0.25)


def test_moving_average_swaps_both_ways():
    parameter = torch.nn.Parameter(torch.ones(2))
    average = MovingAverage([parameter])
    with torch.no_grad():
        parameter.fill_(3.0)
    average.update(step=10)
    average.swap()
    assert parameter.tolist() == [2.0, 2.0]
    average.swap()
    assert parameter.tolist() == [3.0, 3.0]


def test_a_stage_ships_its_average():
    trainer = tiny_trainer()
    start = [parameter.detach().clone() for parameter in trainer.parameters]
    for index in range(3):
        trainer.step(index / 3)
    trained = [parameter.detach().clone() for parameter in trainer.parameters]
    with trainer.use_result():
        for after, average in zip(trainer.parameters, trainer.average.values, strict=True):
            torch.testing.assert_close(after.detach(), average)
        assert torch.equal(trainer.worker.proj_out.weight, trainer.transformer.proj_out.weight.to(arithmetic()))
    assert any(not torch.equal(first, last) for first, last in zip(start, trained, strict=True))
    assert all(torch.equal(after, last) for after, last in zip(trainer.parameters, trained, strict=True))


def test_rate_curve():
    assert warm_up_and_decay(0, 0.0, hold=0.5) == pytest.approx(1 / 60)
    assert warm_up_and_decay(100, 0.4, hold=0.5) == 1.0
    assert warm_up_and_decay(100, 0.75, hold=0.5) == pytest.approx(0.5)
    assert warm_up_and_decay(100, 1.0, hold=0.5) == pytest.approx(0.03)


def test_a_set_is_encoded_once(tmp_path):
    torch.manual_seed(0)
    vae = build_vae(width=8).eval()
    done: list[int] = []
    first = encode_set(CLIPS, vae, tmp_path, done.append)
    assert first.latents.shape == (3, 16, 2, 4, 4)
    assert done[-1] == 3
    again = encode_set(CLIPS, vae, tmp_path, lambda count: pytest.fail("encoded twice"))
    assert torch.equal(first.latents, again.latents)


def test_checkpoints_are_replaced_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"x": torch.ones(2)}, {"steps": 1})
    checkpoint.save(path, {"x": torch.zeros(2)}, {"steps": 2})
    tensors, facts = checkpoint.load(path)
    assert facts == {"steps": 2}
    assert tensors["x"].tolist() == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_stages_end_in_a_pipeline_folder(tmp_path, monkeypatch):
    """The command from a folder of weights: every stage with tiny sets; the result loads and runs."""
    stage = Stage("transformer", 1, (Portion(CLIPS, batch=2, share=1.0),), 1e-3, 1e-3, 0.5, CLIPS)
    monkeypatch.setattr(stages.recipe, "TRANSFORMER", stage)
    nine = replace(CLIPS, name="nine", count=2, frames=33)
    for name in ("CAUSAL_SMALL", "CAUSAL"):
        stage = Stage(name.lower(), 1, (Portion(nine, batch=1, share=1.0, layout=START),), 1e-3, 1e-3, 0.5, nine)
        monkeypatch.setattr(stages.recipe, name, stage)
    asked = ["--output", str(tmp_path), "--steps", "2", "--no-compile", "--start-from", str(minireel.WEIGHTS)]
    assert train.main(asked) == 0
    from sparsereel.minireel.loading import load_folder

    pipeline = load_folder(tmp_path / "transformer", torch.float32, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline("a red 3 on navy", height=32, width=32, num_frames=5, num_inference_steps=1).frames
    assert video.shape == (1, 5, 32, 32, 3)
    index = json.loads((tmp_path / "transformer" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt"))


def test_wrong_use_is_one_sentence(tmp_path, capsys):
    assert train.main(["--output", str(tmp_path), "--stage", "causal_small", "--steps", "1"]) == 2
    assert "to go on from" in capsys.readouterr().err
    assert train.main(["--output", str(tmp_path), "--steps", "1", "--minutes", "1"]) == 2
    assert "not both" in capsys.readouterr().err
    assert train.main(["--output", str(tmp_path), "--stage", "data", "--start-from", str(tmp_path)]) == 2
    assert "no folder to start from" in capsys.readouterr().err


def test_held_out_psnr_of_an_untrained_vae_is_low():
    torch.manual_seed(0)
    assert 0 < held_out_psnr(build_vae(width=8).eval(), count=1) < 20


def test_the_tokenizer_knows_the_world():
    tokenizer = build_tokenizer()
    assert tokenizer.unk_token_id not in tokenizer(list(WORDS)).input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    shipped = minireel.load().tokenizer
    assert shipped.get_vocab() == tokenizer.get_vocab()
