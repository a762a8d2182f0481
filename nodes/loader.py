"""Ray UNET loader: a diffusion model on the workers."""

from __future__ import annotations

import os
from inspect import cleandoc

import folder_paths
from comfy_api.latest import io

from raylight.host import gguf_pack
from raylight.host.handles import RayModel, Workers
from raylight.host.recipe import WEIGHT_DTYPES, LoraRecipe, ModelRecipe, is_gguf, needs_pack

from .engine import driver
from .types import CATEGORY, RayActors, RayActorsInit, RayLora

FOLDERS = ("diffusion_models", "checkpoints")
GGUF_FOLDER = "unet_gguf"  # of ComfyUI-GGUF, where it is installed


class RayUNETLoader(io.ComfyNode):
    """Loads a diffusion model on every worker, split by sequence over them.

    With FSDP switched on in the initializer each worker keeps a part of the weights only.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RayUNETLoader",
            display_name="Load Diffusion Model (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray unet loader", "multi gpu model"],
            inputs=[
                io.Combo.Input("unet_name", options=_files(),
                               tooltip="A model file in models/diffusion_models or models/checkpoints; .gguf files "
                                       "where ComfyUI-GGUF is installed."),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default",
                               tooltip="The type that weights are kept in. 'default' takes what the file has, as "
                                       "far as the GPU can use it. GGUF files take no other."),
                RayActorsInit.Input("ray_actors_init", tooltip="The workers, from a Ray initializer."),
                RayLora.Input("lora", optional=True, tooltip="LoRAs for the model, from a Ray LoRA loader."),
            ],
            outputs=[RayActors.Output(display_name="ray_actors", tooltip="The model on its workers.")],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool | str:
        # Without this ComfyUI would only say that a GGUF file is not in a list.
        if unet_name is None or unet_name in _files():
            return True
        if is_gguf(unet_name) and not gguf_pack.find():
            return needs_pack(unet_name)
        return f"there is no model file {unet_name}"

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, **_: object) -> tuple[int, int]:
        # A file replaced under the same name is another model.
        status = os.stat(_path(unet_name))
        return status.st_size, status.st_mtime_ns

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str, ray_actors_init: Workers,
                lora: tuple[LoraRecipe, ...] = ()) -> io.NodeOutput:
        recipe = ModelRecipe.of(_path(unet_name), weight_dtype, ray_actors_init.sharding, lora, gguf_pack.find())
        return io.NodeOutput(driver().load(RayModel(ray_actors_init, recipe)))


def _folders() -> tuple[str, ...]:
    return FOLDERS + ((GGUF_FOLDER,) if GGUF_FOLDER in folder_paths.folder_names_and_paths else ())


def _files() -> list[str]:
    return list(dict.fromkeys(name for folder in _folders() for name in folder_paths.get_filename_list(folder)))


def _path(name: str) -> str:
    """The full path of a model file. Raises FileNotFoundError, naming where it was looked for."""
    for folder in _folders():
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    places = ", ".join(path for folder in FOLDERS for path in folder_paths.get_folder_paths(folder))
    raise FileNotFoundError(f"the model file {name} is not in {places}")
