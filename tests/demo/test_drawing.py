"""The demo's model: pictures by ComfyUI's own sampler show what the prompt says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch

from raylight.dev.demo.__main__ import HERE, MODEL, VAE
from raylight.dev.demo.train.scenes import COLOURS, LEFT_RIGHT, LIGHT_LEFT_RIGHT, PLACES, THINGS, TIMES, Scene, render
from raylight.dev.demo.words import encode

LARGEST_BYTES = 15e6

SCENES = (
    Scene("red", "house", "snow", "night"),
    Scene("blue", "boat", "sea", "sunset"),
    Scene("green", "car", "desert", "day"),
    Scene("pink", "tree", "meadow", "sunset"),
    Scene("yellow", "balloon", "sea", "day"),
    Scene("white", "car", "meadow", "night"),
)


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """A picture (H, W, 3) in 0..1 for each of SCENES, sampled as the demo does."""
    model = comfy.sd.load_diffusion_model(str(HERE / "model" / MODEL))
    tensors, metadata = comfy.utils.load_torch_file(str(HERE / "model" / VAE), return_metadata=True)
    vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
    pictures = []
    for seed, scene in enumerate(SCENES):
        empty = torch.zeros(1, 16, 1, 16, 16)
        noise = comfy.sample.prepare_noise(empty, seed)
        with torch.inference_mode():
            latent = comfy.sample.sample(
                model,
                noise,
                20,
                3.0,
                "euler",
                "simple",
                [[encode(scene.prompt()), {}]],
                [[encode(""), {}]],
                empty,
                disable_pbar=True,
                seed=seed,
            )
            pictures.append(vae.decode(latent).cpu().numpy().reshape(128, 128, 3))
    return pictures


def distance(picture: np.ndarray, scene: Scene) -> float:
    """Return the distance to the nearest picture of a scene; the prompt leaves open where thing and sun are."""
    places = [dataclasses.replace(scene, x=x, light_x=light_x) for x in LEFT_RIGHT for light_x in LIGHT_LEFT_RIGHT]
    return min(float(((np.asarray(render(place)) / 255 - picture) ** 2).mean()) for place in places)


def others(scene: Scene) -> list[Scene]:
    """Return all scenes that differ in one word."""
    changed = [
        dataclasses.replace(scene, **{name: value})
        for name, values in (("colour", COLOURS), ("thing", THINGS), ("place", PLACES), ("time", TIMES))
        for value in values
    ]
    return [other for other in changed if other != scene and other.place in THINGS[other.thing]]


@pytest.mark.parametrize("index", range(len(SCENES)), ids=[scene.prompt().replace(" ", "-") for scene in SCENES])
def test_draws_the_prompt(index: int, drawn: list[np.ndarray]) -> None:
    scene, picture = SCENES[index], drawn[index]
    own = distance(picture, scene)
    assert own < 0.02
    nearest = min(others(scene), key=lambda other: distance(picture, other))
    assert own < distance(picture, nearest), f"more like {nearest.prompt()}"


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in Path(HERE / "model").iterdir()) < LARGEST_BYTES
