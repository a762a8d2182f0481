"""Tiny files for the workflows of `public_forms.py`, and a pack that reads GGUF files in ComfyUI's process."""

from __future__ import annotations

import shutil
from pathlib import Path

import comfy.ops
import public_forms as forms
import torch
from comfy.ldm.flux.controlnet import ControlNetFlux
from gguf_files import write_gguf
from safetensors.torch import save_file

from raylight.dev.demo import comfy_server
from raylight.dev.demo.prompts import random_prompt, write_prompt
from raylight.dev.demo.tiny import HEAD_WIDTH, write_checkpoint
from raylight.dev.zoo.family import randomize

_HEADS = 3
_GGUF_PACK = '''"""The loader node of the stand-in for ComfyUI-GGUF."""

import comfy.sd
import folder_paths

from . import loader, nodes, ops

folder_paths.folder_names_and_paths["unet_gguf"] = (folder_paths.get_folder_paths("diffusion_models"), {".gguf"})


def _types(cls):
    return {"required": {"unet_name": (folder_paths.get_filename_list("unet_gguf"),)}}


def _load(self, unet_name):
    found = loader.gguf_sd_loader(folder_paths.get_full_path_or_raise("unet_gguf", unet_name))
    tensors, extra = found if isinstance(found, tuple) else (found, {})
    options = {"custom_operations": ops.GGMLOps()}
    model = comfy.sd.load_diffusion_model_state_dict(tensors, options, extra.get("metadata"))
    return (nodes.GGUFModelPatcher.clone(model),)


nodes.UnetLoaderGGUF.INPUT_TYPES = classmethod(_types)
nodes.UnetLoaderGGUF.RETURN_TYPES, nodes.UnetLoaderGGUF.FUNCTION = ("MODEL",), "load"
nodes.UnetLoaderGGUF.CATEGORY, nodes.UnetLoaderGGUF.load = "tests", _load
NODE_CLASS_MAPPINGS = {"UnetLoaderGGUF": nodes.UnetLoaderGGUF}
'''


def write_all(work: Path) -> dict[str, Path]:
    """Write models, prompts and the pack, and return ComfyUI's folders for them."""
    models, prompts, packs = work / "models", work / "datasets", work / "packs"
    write_checkpoint(models / forms.FLUX, "flux-dev", heads=_HEADS)
    write_checkpoint(models / forms.WAN, "wan-t2v", heads=_HEADS)
    write_gguf(models / forms.FLUX, models / forms.GGUF, "Q8_0", "flux")
    save_file(_controlnet(), models / forms.CONTROL)
    demo = Path(comfy_server.__file__).parent / "model"
    shutil.copy(demo / "raylight-demo-vae.safetensors", models / forms.VAE)
    for seed, one in enumerate(("positive", "negative")):
        write_prompt(prompts / f"wan-{one}", random_prompt(9, 4096, seed))
        write_prompt(prompts / f"flux-{one}", random_prompt(9, 160, seed, 96))
    shutil.copytree(Path(__file__).with_name("gguf_pack"), packs / "gguf_pack")
    (packs / "gguf_pack" / "__init__.py").write_text(_GGUF_PACK)
    folders = dict.fromkeys(("diffusion_models", "controlnet", "vae"), models)
    return folders | {"datasets": prompts, "custom_nodes": packs}


def _controlnet() -> dict[str, torch.Tensor]:
    """Return a ControlNet for the tiny Flux in the form of XLabs, which ComfyUI detects by its names."""
    network = ControlNetFlux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=96,
        context_in_dim=160,
        hidden_size=HEAD_WIDTH * _HEADS,
        mlp_ratio=4.0,
        num_heads=_HEADS,
        depth=2,
        depth_single_blocks=0,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    randomize(network, seed=9)
    return {name.replace("_norm.weight", "_norm.scale"): tensor for name, tensor in network.state_dict().items()}
