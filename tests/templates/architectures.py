"""Diffusion models for official file names: few layers, narrow where ComfyUI's detection allows, random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import comfy.model_detection
import comfy.supported_models
import ltx2
import torch
from official_names import DIFFUSION_MODELS, UnknownFile, by_name
from torch import Tensor

from raylight.dev.zoo import families
from raylight.dev.zoo.family import Family, randomize

_LIMIT = 1_200_000_000  # weights that a small machine can hold three times as float32
_WIDE = 200_000_000


class TooLarge(UnknownFile):
    """ComfyUI accepts this architecture only at a size that the test machine cannot hold."""


def diffusion_model(name: str) -> dict[str, Tensor]:
    """Return the tensors of a file with this name, which ComfyUI detects as it detects the official file."""
    family, hints = by_name(DIFFUSION_MODELS, name, "diffusion model")
    zoo = families()[family]
    unet_config = settled(zoo, hints, metadata_of(name))
    model = _build(zoo.config, unet_config, zoo.weights())
    randomize(model.diffusion_model, seed=_seed(name))
    zoo.prepare(model)
    tensors = model.diffusion_model.state_dict()
    # Wide ones are kept small on disk; ComfyUI makes them float32 again.
    wide = sum(t.numel() for t in tensors.values()) > _WIDE
    return {
        key: (t.to(torch.bfloat16) if wide and t.is_floating_point() and t.ndim > 1 else t).contiguous().clone()
        for key, t in tensors.items()
    }


def metadata_of(name: str) -> dict[str, str] | None:
    """Return the metadata of a file with this name, where ComfyUI reads the architecture from it."""
    family, hints = by_name(DIFFUSION_MODELS, name, "diffusion model")
    if families()[family].config != "LTXAV":
        return None
    config = {key: value for key, value in (families()[family].unet_config | hints).items() if key != "image_model"}
    return {"config": json.dumps({"transformer": config} | ltx2.CONFIG)}


def prefix_of_vae(name: str) -> str:
    """Return the prefix of a checkpoint's VAE weights."""
    family, _ = by_name(DIFFUSION_MODELS, name, "diffusion model")
    return getattr(comfy.supported_models, families()[family].config).vae_key_prefix[0]


def settled(zoo: Family, hints: Mapping[str, Any], metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the configuration that ComfyUI's detection finds in a file made from it.

    What detection does not read from a file is as in the official one. So much of what makes the zoo's family small is
    lost where ComfyUI assumes a width.
    """
    unet_config = dict(zoo.unet_config) | dict(hints)
    for _ in range(4):
        with torch.device("meta"):
            tensors = _build(zoo.config, unet_config, zoo.weights()).diffusion_model.state_dict()
        size = sum(tensor.numel() for tensor in tensors.values())
        if size > _LIMIT:
            raise TooLarge(f"{zoo.name} as ComfyUI detects it has {size / 1e9:.1f} billion weights, whatever is done")
        found = comfy.model_detection.detect_unet_config(tensors, "", metadata)
        if found is None:
            raise UnknownFile(f"ComfyUI sees no diffusion model in what is made of {zoo.name}")
        kind = comfy.model_detection.model_config_from_unet_config(dict(found), tensors)
        if type(kind).__name__ != zoo.config:
            raise UnknownFile(f"ComfyUI takes what is made of {zoo.name} for {type(kind).__name__}")
        if found == unet_config:
            return unet_config
        unet_config = found
    raise UnknownFile(f"ComfyUI's detection does not settle for {zoo.name}")


def _build(config: str, unet_config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    made = getattr(comfy.supported_models, config)(dict(unet_config))
    made.unet_config.update(unet_config)  # some classes set their own width
    made.set_inference_dtype(torch.float32, None)
    return made.get_model(dict(weights), "").eval().requires_grad_(False)


def _seed(name: str) -> int:
    """Return a seed of the file's name, so that two files of a template are two models."""
    return sum(name.encode())
