"""The transformer's training: its data, its loss, and that ComfyUI loads the result."""

from __future__ import annotations

import json
import random
from pathlib import Path

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.latent_formats import Wan21
from safetensors.torch import save_file

from raylight.dev.demo.train import transformer
from raylight.dev.demo.train.autoencoder import Codec
from raylight.dev.demo.train.scenes import SIZE, THINGS, Scene, draw_scene, render
from raylight.dev.demo.words import TOKENS, WIDTH


@pytest.fixture(scope="module")
def codec() -> Codec:
    latents = Wan21()
    return Codec.of_scenes(latents.latents_mean.flatten(), latents.latents_std.flatten(), seed=3, count=12)


def test_prompt_describes_scene() -> None:
    scene = Scene("red", "boat", "sea", "night")
    assert scene.prompt() == "a red boat on the sea at night"
    assert scene.prompt(time=False) == "a red boat on the sea" and scene.prompt(place=False) == "a red boat at night"
    assert render(scene).size == (SIZE, SIZE)
    assert all(scene.place in THINGS[scene.thing] for scene in map(draw_scene, [random.Random(0)] * 50))


def test_seed_decides_weights(codec: Codec) -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        return transformer.train(codec, 2, seed, lambda step, loss: None, batch=2)

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.head.weight"], other["head.head.weight"])
    assert not comfy.model_management.in_training


def test_loss_falls(codec: Codec) -> None:
    losses = []
    transformer.train(codec, 30, 0, lambda step, loss: losses.append(loss), batch=4, learning_rate=4e-3)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_batch_drops_some_prompts(codec: Codec) -> None:
    latents, prompts = transformer.batch_of(random.Random(1), codec, 40)
    assert latents.shape == (40, 16, 1, 16, 16) and prompts.shape == (40, TOKENS, WIDTH)
    without = int((prompts.abs().sum((1, 2)) == 0).sum())
    assert 0 < without < 15


def test_comfyui_reads_configuration(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(transformer.build(0).state_dict(), path, {"config": json.dumps({"transformer": transformer.CONFIG})})
    model = comfy.sd.load_diffusion_model(str(path)).model.diffusion_model
    assert (model.num_heads, model.text_dim, len(model.blocks)) == (4, WIDTH, 4)
