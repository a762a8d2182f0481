"""A node that writes latents to a file as they are: ComfyUI's own takes one tensor, and a latent may be several."""

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
        parts = latent.unbind() if getattr(latent, "is_nested", False) else [latent]
        path = os.path.join(folder_paths.get_output_directory(), f"{name}.pt")
        torch.save([part.float().cpu().clone() for part in parts], path)
        return {"ui": {"latents": [{"filename": f"{name}.pt", "subfolder": "", "type": "output"}]}}


NODE_CLASS_MAPPINGS = {"TemplateProbe": TemplateProbe}
