"""Attributes of ComfyUI's objects: of a MODEL's patcher, its model, a VAE, a sampling run. No import names them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import comfy.samplers
import comfy.sd
import torch
from comfy.model_management import LoadedModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor
from comfy.taesd.taesd import TAESD

from raylight.dev.zoo import families

from .seam import GONE, Seam

CPU = torch.device("cpu")


@functools.cache
def patcher() -> ModelPatcher:
    """Return a MODEL as ComfyUI's loaders make it, of a tiny Flux with uninitialized weights."""
    return ModelPatcher(families()["Flux Dev"].outline(), CPU, CPU)


@functools.cache
def vae() -> Any:
    """Return a VAE, of a small class with random weights."""
    return comfy.sd.VAE(sd=TAESD().state_dict())


# What is looked at, its name, the file that uses it, what stops, and the attributes.
_Row = tuple[Callable[[], Any], str, str, str, str]
ROWS: tuple[_Row, ...] = (
    (
        patcher,
        "ModelPatcher",
        "raylight/host/patcher_state.py",
        "what nodes set on a MODEL by it does not reach the workers, and the picture is another one",
        "object_patches weight_wrapper_patches force_cast_weights injections attachments additional_models callbacks "
        "model_options hook_patches hook_mode patches patches_uuid wrappers",
    ),
    (
        patcher,
        "ModelPatcher",
        "raylight/worker/patcher.py",
        "workers cannot load, move or patch weights",
        "load partially_load partially_unload patch_model unpatch_model detach get_free_memory clone model_size "
        "loaded_size load_device offload_device use_ejected unpatch_hooks patch_weight_to_device pin_weight_to_device "
        "backup add_patches is_dynamic get_key_patches",
    ),
    (
        patcher,
        "ModelPatcher",
        "raylight/driver/remote_model.py",
        "the MODEL (Ray) would do in ComfyUI's process what the workers have to do",
        "inject_model eject_model patch_hooks get_combined_hook_patches state_dict_for_saving get_model_object "
        "add_wrapper_with_key add_callback_with_key remove_callbacks_with_key object_patches_backup",
    ),
    (
        lambda: patcher().model,
        "BaseModel",
        "raylight/driver/remote_model.py",
        "models cannot be loaded in ComfyUI's process or in the workers",
        "diffusion_model model_config model_type latent_format model_sampling memory_required device "
        "current_patcher model_lowvram model_loaded_weight_memory current_weight_patches_uuid apply_model",
    ),
    (
        vae,
        "VAE",
        "raylight/worker/row_vae.py",
        "VAEs cannot be decoded or encoded by the workers",
        "first_stage_model patcher device output_device vae_dtype vae_output_dtype latent_dim latent_channels "
        "process_input process_output memory_used_decode memory_used_encode vae_encode_crop_pixels not_video "
        "disable_offload upscale_ratio downscale_ratio upscale_index_formula downscale_index_formula "
        "spacial_compression_decode spacial_compression_encode throw_exception_if_invalid",
    ),
    (
        lambda: comfy.samplers.CFGGuider(patcher()),
        "CFGGuider",
        "raylight/driver/outer_sample.py",
        "the workers cannot do a sampling run",
        "model_patcher model_options outer_sample inner_sample sample cfg original_conds",
    ),
    (
        lambda: WrapperExecutor.new_class_executor(len, None, []),
        "WrapperExecutor",
        "raylight/driver/outer_sample.py",
        "a sampling run cannot be handed to the workers",
        "original class_obj wrappers idx execute",
    ),
    (
        lambda: LoadedModel(patcher()),
        "LoadedModel",
        "raylight/driver/memory.py",
        "ComfyUI cannot ask the workers for memory of a GPU that both use",
        "model_unload model_offloaded_memory model_loaded_memory real_model device model",
    ),
)


def seams() -> list[Seam]:
    """Return a seam for each attribute."""
    return [
        Seam(f"{owner}.{name}", where, stops, functools.partial(_has, make, name))
        for make, owner, where, stops, names in ROWS
        for name in names.split()
    ]


def _has(make: Callable[[], Any], name: str) -> str | None:
    found = make()
    # Not by `hasattr`: an attribute that is there may still be a property that raises.
    return None if name in dir(found) else GONE
