"""Streaming decode against decoding everything at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsereel.stream.decode import CausalDecoder, OverlapDecoder, decoder_for, unscale

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vae(streams):
    return streams.pipe().vae


@pytest.mark.parametrize("chunks", [[1] * 7, [3, 3, 1], [7]])
def test_equals_one_shot_decoding(vae, chunks):
    latents = torch.randn(16, 7, 2, 3)
    with torch.no_grad():
        expected = vae.decode(unscale(vae, latents[None]), return_dict=False)[0][0].transpose(0, 1)
    decoder = decoder_for(vae)
    assert isinstance(decoder, CausalDecoder)
    found = torch.cat([decoder.decode(part) for part in latents.split(chunks, dim=1)])
    assert found.shape == (25, 3, 16, 24)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_two_decoders_and_the_vae_itself_do_not_disturb_each_other(vae):
    a, b = torch.randn(2, 16, 4, 2, 3)
    alone = CausalDecoder(vae)
    expected = torch.cat([alone.decode(a[:, :2]), alone.decode(a[:, 2:])])
    first, second = CausalDecoder(vae), CausalDecoder(vae)
    found = [first.decode(a[:, :2])]
    second.decode(b)
    with torch.no_grad():
        vae.decode(b[None])
    found.append(first.decode(a[:, 2:]))
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_state_goes_on_with_the_same_bits(vae, at):
    latents = torch.randn(16, 6, 2, 3)
    one = CausalDecoder(vae)
    one.decode(latents[:, :at])
    other = CausalDecoder(vae)
    other.load(*one.state())
    assert torch.equal(one.decode(latents[:, at:]), other.decode(latents[:, at:]))


class LinearVae(nn.Module):
    """A causal video VAE whose frames do not depend on their neighbours: 1 + 2 (T - 1) frames of T latents."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=0.5, latent_channels=3, temporal_compression_ratio=2)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.causal = causal

    def decode(self, z, return_dict=True):
        frames = z.repeat_interleave(2, dim=2)
        return (frames[:, :, 1:] if self.causal else frames,)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_overlapping_tiles_join_without_a_seam(causal, overlap):
    """Where tiles agree about the overlap, cross-fading must give back exactly the one-shot result."""
    vae = LinearVae(causal)
    latents = 0.1 * torch.randn(3, 9, 2, 2)
    expected = vae.decode(unscale(vae, latents[None]))[0][0].transpose(0, 1).clamp(-1, 1)
    decoder = decoder_for(vae, overlap=overlap)
    assert isinstance(decoder, OverlapDecoder)
    parts = [decoder.decode(part) for part in latents.split([3, 2, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat([*parts, decoder.flush()]), expected, atol=1e-6, rtol=0)
    assert decoder.flush() is None


def test_overlap_is_faded_between_tiles_that_disagree():
    class Counting(LinearVae):
        calls = 0

        def decode(self, z, return_dict=True):
            self.calls += 1
            return (torch.full_like(super().decode(z)[0], 0.1 * self.calls),)

    decoder = OverlapDecoder(Counting(causal=False), overlap=2)
    decoder.decode(torch.zeros(3, 3, 1, 1))
    faded = decoder.decode(torch.zeros(3, 2, 1, 1))[:, 0, 0, 0]
    assert torch.all(faded[1:] >= faded[:-1])
    assert 0.1 < faded[0] < faded[3] < 0.2


def test_what_is_no_vae_is_refused():
    with pytest.raises(ValueError, match="no VAE"):
        decoder_for(SimpleNamespace(config=SimpleNamespace()))
