"""The demo's VAE: its computed encoder, and the padding of its trained decoder."""

from __future__ import annotations

import random

import comfy.taesd.taesd
import pytest
import torch
from comfy.latent_formats import Wan21

from raylight.dev.demo.train import autoencoder
from raylight.dev.demo.train.autoencoder import (
    CHANNELS,
    SCALE,
    Codec,
    encoder_state,
    pictures,
    train_decoder,
    vae_state,
)


@pytest.fixture(scope="module")
def codec() -> Codec:
    latents = Wan21()
    return Codec.of_scenes(latents.latents_mean.flatten(), latents.latents_std.flatten(), seed=3, count=12)


def test_latents_are_about_normal(codec: Codec) -> None:
    latents = codec.encode(pictures(random.Random(4), 12))
    assert latents.shape == (12, CHANNELS, 16, 16)
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1


def test_encoder_equals_codec(codec: Codec) -> None:
    vae = comfy.taesd.taesd.TAESD(latent_channels=CHANNELS)
    vae.load_state_dict(vae_state(encoder_state(codec), vae.taesd_decoder.state_dict()))
    pixels = pictures(random.Random(5), 2)
    with torch.no_grad():
        raw = vae.encode(pixels * 2 - 1)
    latents = Wan21().process_in(raw.unsqueeze(2)).squeeze(2)
    assert torch.allclose(latents, codec.encode(pixels), atol=1e-4)


def test_padding_changes_nothing(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    padded = autoencoder._padded
    monkeypatch.setattr(autoencoder, "_padded", lambda tensors, shapes: kept.append(tensors) or padded(tensors, shapes))
    losses = []
    wide = train_decoder(codec, 3, seed=0, report=lambda step, loss: losses.append(loss), batch=2)
    assert len(losses) == 3
    vae = comfy.taesd.taesd.TAESD(latent_channels=CHANNELS)
    vae.load_state_dict(vae_state(encoder_state(codec), wide))
    narrow = autoencoder._decoder(autoencoder.WIDTH)
    narrow.load_state_dict(kept[0])
    latents = codec.for_decoder(torch.randn(1, CHANNELS, 8, 8)) / SCALE
    with torch.no_grad():
        assert torch.allclose(vae.decode(latents) / 2 + 0.5, narrow(latents * SCALE), atol=1e-5)
