"""Loaders: a model on workers, from a file or from another loader, and LoRAs for it."""

from __future__ import annotations

from inspect import cleandoc

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from raylight.driver.options import all_workers
from raylight.host import gguf
from raylight.host.recipe import WEIGHT_DTYPES, LoraRecipe, ModelRecipe, RayModel, WorkerConfig, is_gguf, needs_pack

from .common import CATEGORY, RayActors, RayLora, driver, stamp_of, workers_input

FOLDERS = ("diffusion_models", "checkpoints")
GGUF_FOLDER = "unet_gguf"  # of ComfyUI-GGUF, where it is installed
LORAS = "loras"


class _ModelLoader(io.ComfyNode):
    @classmethod
    def _schema(
        cls, node_id: str, display_name: str, aliases: list[str], workers: io.Input, output: io.Output
    ) -> io.Schema:
        return io.Schema(
            node_id=node_id,
            display_name=display_name,
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=aliases,
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=model_files(),
                    tooltip="A file in models/diffusion_models or models/checkpoints. .gguf files need ComfyUI-GGUF.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Data type of the weights. default: the file's own, where the GPU supports it. "
                    "GGUF files need default.",
                ),
                workers,
                RayLora.Input("lora", optional=True, tooltip="LoRAs for the model, from Load LoRA (Ray)."),
            ],
            outputs=[output],
        )

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool | str:
        # Without this, ComfyUI would only say that a GGUF file is not in a list. A linked input is None here.
        if unet_name is None or unet_name in model_files():
            return True
        if is_gguf(unet_name) and not gguf.find():
            return needs_pack(unet_name)
        return f"there is no model file {unet_name}"

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None = None, **_: object) -> tuple[int, ...]:
        return stamp_of(unet_name, model_path)

    @classmethod
    def execute(
        cls,
        unet_name: str,
        weight_dtype: str,
        ray_actors_init: WorkerConfig | None = None,
        lora: tuple[LoraRecipe, ...] = (),
    ) -> io.NodeOutput:
        workers = ray_actors_init or all_workers()
        recipe = ModelRecipe.of(model_path(unet_name), weight_dtype, workers.sharding, lora, gguf.find())
        return io.NodeOutput(driver().load(RayModel(workers, recipe)))


class RayUNETLoader(_ModelLoader):
    """Load a diffusion model on every worker, for Raylight's own samplers.

    With FSDP on in the initializer, each worker keeps only its shard of the weights.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls._schema(
            "RayUNETLoader",
            "Load Diffusion Model (Ray)",
            ["ray unet loader", "multi gpu model"],
            workers_input(optional=False),
            RayActors.Output(display_name="ray_actors", tooltip="The model on its workers."),
        )


class RayModelLoader(_ModelLoader):
    """Load a diffusion model on every worker and return a MODEL for all of ComfyUI's nodes.

    Replaces Load Diffusion Model in any workflow: samplers, guiders, LoRA loaders and nodes that patch a model work as
    usual, on the workers.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls._schema(
            "RayModelLoader",
            "Load Diffusion Model as MODEL (Ray)",
            ["multi gpu model loader", "ray unet loader", "parallel model"],
            workers_input(optional=True),
            io.Model.Output(display_name="model", tooltip="The model, for any node that takes a MODEL."),
        )


class RayParallelizeModel(io.ComfyNode):
    """Run a MODEL from any loader on the workers, with its LoRAs and patches.

    Place it last, right before the sampler or guider. Workers read the model's file where it is known; otherwise they
    get the weights from ComfyUI's memory.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RayParallelizeModel",
            display_name="Parallelize Model (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["multi gpu model", "ray model", "distribute model"],
            inputs=[
                io.Model.Input("model", tooltip="A model from any loader, with LoRAs and patches."),
                workers_input(optional=True),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same model, run by the workers.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, ray_actors_init: WorkerConfig | None = None) -> io.NodeOutput:
        return io.NodeOutput(driver().parallelize(model, ray_actors_init or all_workers()))


class RayLoraLoader(io.ComfyNode):
    """Choose a LoRA (or LoHa, LoKr, DoRA, OFT, ...) for the model of a Ray loader.

    Chain several through prev_ray_lora. Changing LoRAs or strengths does not read the model again.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RayLoraLoader",
            display_name="Load LoRA (Ray)",
            category=CATEGORY,
            description=cleandoc(cls.__doc__),
            search_aliases=["ray lora", "multi gpu lora"],
            inputs=[
                io.Combo.Input(
                    "lora_name", options=folder_paths.get_filename_list(LORAS), tooltip="A file in models/loras."
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Strength of the LoRA; may be negative. 0 leaves it out.",
                ),
                RayLora.Input("prev_ray_lora", optional=True, tooltip="LoRAs to apply before this one."),
            ],
            outputs=[
                RayLora.Output(
                    display_name="ray_lora", tooltip="The LoRAs, for a Ray loader or the next of these nodes."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> tuple[int, ...]:
        return stamp_of(lora_name, _lora_path)

    @classmethod
    def execute(
        cls, lora_name: str, strength_model: float, prev_ray_lora: tuple[LoraRecipe, ...] = ()
    ) -> io.NodeOutput:
        if strength_model == 0:
            return io.NodeOutput(prev_ray_lora)
        return io.NodeOutput((*prev_ray_lora, LoraRecipe.of(_lora_path(lora_name), strength_model)))


def _lora_path(name: str) -> str:
    return folder_paths.get_full_path_or_raise(LORAS, name)


def _folders() -> tuple[str, ...]:
    return FOLDERS + ((GGUF_FOLDER,) if GGUF_FOLDER in folder_paths.folder_names_and_paths else ())


def model_files() -> list[str]:
    """Return the names of all files that may be diffusion models."""
    return list(dict.fromkeys(name for folder in _folders() for name in folder_paths.get_filename_list(folder)))


def model_path(name: str) -> str:
    """Return the full path of a model file. Raises FileNotFoundError: naming the folders searched."""
    for folder in _folders():
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    places = ", ".join(path for folder in FOLDERS for path in folder_paths.get_folder_paths(folder))
    raise FileNotFoundError(f"the model file {name} is not in {places}")
