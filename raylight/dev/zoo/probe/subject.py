"""The model to probe, and its inputs at several sizes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import comfy.model_detection
import comfy.utils
import torch
from comfy.model_base import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raylight.dev.zoo import families
from raylight.dev.zoo.family import Draw, Family

Inputs = dict[str, Any]

# Names of the text width in ComfyUI's configurations.
_TEXT_WIDTHS = (
    "context_in_dim",
    "joint_attention_dim",
    "text_dim",
    "cap_feat_dim",
    "caption_channels",
    "text_feat_dim",
    "crossattn_emb_channels",
    "cross_attention_dim",
    "cond_seq_dim",
    "context_dim",
    "in_text_dim",
    "text_embed_dim",
    "txt_embed_dim",
    "text_in_dim",
    "cond_token_dim",
)
_POOLED_WIDTHS = ("vec_in_dim", "adm_in_channels", "text_emb_dim", "in_text_dim2")
SIZES = ("base", "larger image", "longer text")
# Some models pad their tokens to 32, so more than that is added.
_LETTERS = {
    "base": {"T": 11, "F": 3, "H": 16, "W": 20},
    "larger image": {"T": 11, "F": 3, "H": 16, "W": 60},
    "longer text": {"T": 48, "F": 3, "H": 16, "W": 20},
}


@dataclass(frozen=True)
class Subject:
    """A model, and the arguments of its `apply_model` at each of SIZES."""

    model: BaseModel
    inputs: Mapping[str, Inputs]


def subject(name: str, given: Sequence[str], device: str) -> Subject:
    """Return the family or file of that name; `given` are inputs of a file, as `NAME=1,16,H,W`.

    Raises ValueError: it is neither, or an input has the wrong form.
    """
    if name in families():
        return _of_family(families()[name], device)
    if not os.path.isfile(name):
        raise ValueError(f"neither a .safetensors file nor one of the families: {', '.join(families())}")
    return _of_file(name, given, device)


def _of_family(family: Family, device: str) -> Subject:
    base = next(iter(family.calls.values()))(Draw(0))
    base.pop("transformer_options", None)
    sizes = {"base": base, "larger image": _wider(base), "longer text": _longer(base)}
    return Subject(family.build().to(device), {size: _to(inputs, device) for size, inputs in sizes.items()})


def _of_file(path: str, given: Sequence[str], device: str) -> Subject:
    try:
        with safe_open(path, "pt") as file:
            weights = {key: _empty(file.get_slice(key)) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    prefix = comfy.model_detection.unet_prefix_from_state_dict(weights)
    weights = comfy.utils.state_dict_prefix_replace(weights, {prefix: ""}, filter_keys=True) or weights
    config = comfy.model_detection.model_config_from_unet(weights, "")
    if config is None:
        raise ValueError("ComfyUI does not know this model")
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(weights, "", device=torch.device(device)).eval().requires_grad_(False).to(device)
    templates = _templates(model) | dict(_parsed(text) for text in given)
    return Subject(
        model,
        {
            size: {
                name: torch.zeros([letters.get(part, part) for part in sizes], dtype=torch.bfloat16, device=device)
                if sizes
                else None
                for name, sizes in templates.items()
            }
            | {"t": torch.ones(1, device=device)}
            for size, letters in _LETTERS.items()
        },
    )


def _empty(part: Any) -> Tensor:
    return torch.empty(part.get_shape(), dtype=torch.bfloat16, device="meta")


def _templates(model: BaseModel) -> dict[str, list[int | str]]:
    """Return the arguments that most models take, with letters for the varied sizes."""
    latent, config = model.latent_format, model.model_config.unet_config
    space = ["F", "H", "W"] if latent.latent_dimensions == 3 else ["H", "W"]
    templates: dict[str, list[int | str]] = {"x": [1, latent.latent_channels, *space]}
    parameters = signature(model.diffusion_model.__init__).parameters
    config = {name: parameter.default for name, parameter in parameters.items()} | config
    width = next((config[key] for key in _TEXT_WIDTHS if isinstance(config.get(key), int)), None)
    if width is not None:
        templates["c_crossattn"] = [1, "T", width]
    pooled = next((config[key] for key in _POOLED_WIDTHS if isinstance(config.get(key), int)), None)
    if pooled is not None:
        templates["y"] = [1, pooled]
    return templates | ({"guidance": [1]} if config.get("guidance_embed") else {})


def _parsed(text: str) -> tuple[str, list[int | str]]:
    name, _, sizes = text.partition("=")
    parts = [part.strip() for part in sizes.split(",") if part.strip()]
    if not name or not all(part.isdigit() or part in "TFHW" for part in parts):
        raise ValueError(f"--input {text}: write it as c_crossattn=1,T,4096")
    return name, [int(part) if part.isdigit() else part for part in parts]


def _wider(inputs: Inputs) -> Inputs:
    """Enlarge everything that has the image's last size."""
    size = inputs["x"].shape[-1]
    return {
        key: _more(value, value.ndim - 1, 40) if _has(value, -1, size) and value.ndim >= 3 else value
        for key, value in inputs.items()
    }


def _longer(inputs: Inputs) -> Inputs:
    """Lengthen everything that has the prompt's length."""
    text = inputs.get("c_crossattn")
    if text is None:
        return inputs
    return {
        key: _more(value, 1, 37) if _has(value, 1, text.shape[1]) and key != "x" else value
        for key, value in inputs.items()
    }


def _has(value: Any, dim: int, size: int) -> bool:
    return torch.is_tensor(value) and value.ndim > max(dim, 0) and value.shape[dim] == size


def _more(value: Tensor, dim: int, count: int) -> Tensor:
    return torch.cat([value, value.narrow(dim, 0, 1).repeat_interleave(count, dim)], dim)


def _to(value: Any, device: str) -> Any:
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return [_to(item, device) for item in value] if isinstance(value, list) else value
