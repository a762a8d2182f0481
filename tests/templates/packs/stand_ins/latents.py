"""Nodes that write latents and pictures to files as they are.

ComfyUI's own take a latent of one tensor only, and round or compress pictures.
"""

from __future__ import annotations

import os
from typing import Any

import folder_paths
import torch


class TemplateProbe:
    """Saves a LATENT's tensors."""

    CATEGORY = "tests"
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "name": ("STRING",)}}

    def save(self, samples: dict[str, Any], name: str) -> dict[str, Any]:
        latent = samples["samples"]
        return _save(latent.unbind() if getattr(latent, "is_nested", False) else [latent], name)


class TemplateImageProbe:
    """Saves an IMAGE."""

    CATEGORY = "tests"
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",), "name": ("STRING",)}}

    def save(self, images: torch.Tensor, name: str) -> dict[str, Any]:
        return _save([images], name)


def _save(tensors: list[torch.Tensor], name: str) -> dict[str, Any]:
    path = os.path.join(folder_paths.get_output_directory(), f"{name}.pt")
    torch.save([tensor.float().cpu().clone() for tensor in tensors], path)
    return {"ui": {"tensors": [{"filename": f"{name}.pt", "subfolder": "", "type": "output"}]}}


NODE_CLASS_MAPPINGS = {"TemplateProbe": TemplateProbe, "TemplateImageProbe": TemplateImageProbe}
